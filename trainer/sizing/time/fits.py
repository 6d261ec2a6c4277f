"""What was fitted to a device profile, kept beside it so that a plan needs no fit.

`h100.fit.json` beside `h100.yaml` holds the `Tuning` and what it misses at each measured shape, under a digest of the
shapes and of the starting point. Where there is none, or the digest differs, the fit is done, and kept if the profile is
newer than what is there and its folder can be written.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from configs import profile
from configs.paths import write_whole
from trainer.sizing.time import fitting
from trainer.sizing.time.fitting import Measured
from trainer.sizing.time.kernels import Chip, Form, Tuning

VERSION = 1
"""Of the formula and of the fit: to be raised where either changes."""


def fitted(
    name: str, chip: Chip, start: Tuning, dense: Sequence[Measured], grouped: Sequence[Measured]
) -> tuple[Tuning, list[float], list[float]]:
    """A profile's tuning, and log of measured over predicted of each of its dense and grouped shapes."""
    key = _digest(chip, start, [*dense, *grouped])
    path = profile.FOLDER / "device" / f"{name}.fit.json"
    kept = _read(path)
    if kept.get("key") == key:
        return _tuning(kept["tuning"]), kept["dense"], kept["grouped"]
    tuning = fitting.fit(chip, fitting.dense(chip, start, dense), fitting.GROUPED, grouped)
    form = Form(chip, tuning)
    misses = [fitting.misses(form, rows) for rows in (dense, grouped)]
    if _is_due(path):
        made = {"key": key, "tuning": asdict(tuning), "dense": misses[0], "grouped": misses[1]}
        with contextlib.suppress(OSError):  # a folder that can't be written costs the next plan the same fit
            write_whole(path, json.dumps(made) + "\n")
    return tuning, misses[0], misses[1]


def _digest(chip: Chip, start: Tuning, rows: Sequence[Measured]) -> str:
    said = repr((VERSION, chip, start, [(asdict(shape), seconds) for shape, seconds in rows]))
    return hashlib.sha256(said.encode()).hexdigest()


def _tuning(values: dict[str, Any]) -> Tuning:
    made: dict[str, Any] = {
        name: tuple(value) if isinstance(value, list) else value for name, value in values.items()
    }
    return Tuning(**made)


def _read(path: Path) -> dict[str, Any]:
    try:
        kept = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return kept if isinstance(kept, dict) else {}


def _is_due(path: Path) -> bool:
    """Whether a profile of that name is there and no later fit of it: others of its name are parts of it."""
    measured = path.with_name(path.name.removesuffix(".fit.json") + ".yaml")
    try:
        return measured.stat().st_mtime > (path.stat().st_mtime if path.exists() else 0.0)
    except OSError:
        return False
