"""What was fitted to a device profile, kept beside it so that a plan needs no fit.

`h100.fit.json` beside `h100.yaml` holds the `Tuning` and what it misses at each measured shape, under a digest of the
shapes and of the starting point. Where there is none, or the digest differs, the fit is done. It is kept where there was
none of these measurements: a plan with a device of other figures (`hardware.memory_gbps=3000`) leaves the file alone.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Callable, Sequence
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
    name: str,
    chip: Chip,
    start: Tuning,
    dense: Sequence[Measured],
    grouped: Sequence[Measured],
    is_whole: Callable[[], bool],
) -> tuple[Tuning, list[float], list[float]]:
    """A profile's tuning, and log of measured over predicted of each of its dense and grouped shapes.

    Args:
        is_whole: whether these are the measurements of the profile that lies under `name`, and not a part of them; asked
            after a fit alone.
    """
    key = _digest([*dense, *grouped], chip, start)
    path = profile.FOLDER / "device" / f"{name}.fit.json"
    kept = _read(path)
    if kept.get("key") == key:
        return _tuning(kept["tuning"]), kept["dense"], kept["grouped"]
    tuning = fitting.fit(chip, fitting.dense(chip, start, dense), fitting.GROUPED, grouped)
    form = Form(chip, tuning)
    misses = [fitting.misses(form, rows) for rows in (dense, grouped)]
    measured = _digest([*dense, *grouped])
    if kept.get("measured") != measured and is_whole():
        made = {
            "measured": measured,
            "key": key,
            "tuning": asdict(tuning),
            "dense": misses[0],
            "grouped": misses[1],
        }
        with contextlib.suppress(OSError):  # a folder that can't be written costs the next plan the same fit
            write_whole(path, json.dumps(made) + "\n")
    return tuning, misses[0], misses[1]


def _digest(rows: Sequence[Measured], *more: Chip | Tuning) -> str:
    """Of what a fit begins with, numbers to nine digits: processors differ in the last ones of `exp` and `log`."""
    given = (VERSION, [(asdict(shape), seconds) for shape, seconds in rows], [asdict(one) for one in more])
    return hashlib.sha256(repr(_rounded(given)).encode()).hexdigest()


def _rounded(value: Any) -> Any:
    if isinstance(value, float):
        return f"{value:.9g}"
    if isinstance(value, dict):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list | tuple) else value


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
