"""What becomes an artifact, and what it was made from: checkpoints, profiles, measurements, evidence. Plain data.

A checkpoint isn't uploaded: its artifact says where it lies. What is in an artifact's files decides which version it is, so
the one that saves a checkpoint and the one that loads it, in another run or attempt, name the same version, and the tracker
joins them.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from configs import profile
from configs.metrics import ResumedLine, SavedLine
from configs.paths import RunPaths
from orchestrator.record.events import EvidenceKept

_LARGEST = 32 << 20
"""Bytes of one artifact's files; what is beyond is left out and named."""
_FILE = 4 << 20
_FILES = 256


@dataclass(frozen=True)
class Artifact:
    """One artifact."""

    name: str
    kind: str
    files: dict[str, bytes]
    used: bool = False
    """Whether the run began from it; else it made it."""
    facts: dict[str, Any] = field(default_factory=dict)
    aliases: tuple[str, ...] = ()


def saved(run: RunPaths, line: SavedLine) -> Artifact | None:
    """The checkpoint that a line tells of; None for a snapshot in memory."""
    if line.tier != "store":
        return None
    facts = {
        "attempt": line.attempt,
        "bytes": line.bytes,
        "seconds": line.seconds,
        "held": line.held,
        "run": run.run_id,
    }
    return _checkpoint(line.path, line.step, False, facts)


def resumed(line: ResumedLine) -> Artifact | None:
    """The checkpoint that an attempt began from; None where it began from nothing."""
    return _checkpoint(line.path, line.step, True, {}) if line.path else None


def _checkpoint(path: str, step: int, used: bool, facts: dict[str, Any]) -> Artifact:
    """`path` is all that its version depends on: whoever loads it may know nothing else of it."""
    parts = path.split("/")
    owner = parts[parts.index("runs") + 1] if "runs" in parts[:-2] else ""
    name = f"checkpoints-{owner or hashlib.sha256(path.rpartition('/')[0].encode()).hexdigest()[:12]}"
    text = json.dumps({"path": path}, indent=1).encode()
    aliases = () if used else (f"step-{step}",)
    return Artifact(
        _named(name),
        "checkpoint",
        {"checkpoint.json": text},
        used,
        {"step": step, "path": path} | facts,
        aliases,
    )


def profiles(hardware: str) -> list[Artifact]:
    """Measured profiles that plans of this hardware take their rates from."""
    artifacts = []
    for kind in ("fabric", "device"):
        path = profile.FOLDER / kind / f"{hardware}.yaml"
        if path.is_file():
            name = _named(f"profile-{kind}-{hardware}")
            artifacts.append(
                Artifact(
                    name, "profile", {path.name: path.read_bytes()}, used=True, facts={"hardware": hardware}
                )
            )
    return artifacts


def measurement(run: RunPaths, hardware: str) -> list[Artifact]:
    """What a measurement has left, and the profile that was fitted to it."""
    folder = run.measurement
    if not folder.is_dir():
        return []
    files, left = _files(sorted(folder.rglob("*")), folder)
    made = [
        Artifact(
            _named(f"measurement-{run.run_id}"),
            "measurement",
            files,
            facts={"hardware": hardware, "left_out": left},
        )
    ]
    if (fitted := files.get("fabric.yaml")) is not None:
        # By its name in the catalogue, so that a plan that used it leads back here.
        made.append(
            Artifact(
                _named(f"profile-fabric-{hardware}"),
                "profile",
                {f"{hardware}.yaml": fitted},
                facts={"run": run.run_id},
            )
        )
    return [piece for piece in made if piece.files]


def evidence(run: RunPaths, event: EvidenceKept) -> Artifact | None:
    """Stacks and records that were kept of an incident; None where there are none."""
    folder = Path(event.path)
    files, left = _files(sorted(folder.rglob("*")) if folder.is_dir() else [], folder)
    facts = {
        "run": run.run_id,
        "attempt": event.attempt,
        "incident": event.incident,
        "folder": event.path,
        "left_out": left,
    }
    return Artifact(evidence_name(run, event.incident), "incident", files, facts=facts) if files else None


def evidence_name(run: RunPaths, incident: int | None) -> str:
    """Name of an incident's artifact."""
    return _named(f"evidence-{run.run_id}-{incident or 0}")


def _files(paths: list[Path], folder: Path) -> tuple[dict[str, bytes], list[str]]:
    """Files that fit, by name, and the names of those that don't."""
    files: dict[str, bytes] = {}
    left, room = [], _LARGEST
    for path in paths:
        try:
            if not path.is_file() or path.is_symlink():
                continue
            size, name = path.stat().st_size, str(path.relative_to(folder))
            if size > min(_FILE, room) or len(files) >= _FILES:
                left.append(name)
                continue
            files[name] = path.read_bytes()
            room -= size
        except OSError:
            continue
    return files, left[:100]


def _named(name: str) -> str:
    """As artifacts may be named."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "-_.") else "-" for c in name)[:120]
