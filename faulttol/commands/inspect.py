"""What lies in a folder of checkpoints: steps, attempts, layouts, tensors, bytes, facts, pins; what was interrupted."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from fnmatch import fnmatchcase
from math import prod
from typing import Any

from faulttol.checkpoint.folder import CheckpointCommit, CheckpointFolder
from faulttol.checkpoint.manifest import Incomplete, Manifest, flat
from faulttol.checkpoint.pieces import DTYPES
from faulttol.commands.locations import CheckpointLocation
from faulttol.commands.prune import keep_reasons, retention_of
from faulttol.commands.terminal import axes, plural, size, table

_LONGEST = 100
"""Characters of a fact that a person is shown."""


@dataclass
class CheckpointRow:
    """One committed checkpoint."""

    step: int
    attempt: int
    run: str
    files: int = 0
    bytes: int = 0
    layout: dict[str, int] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)
    """Why retention keeps it: pins, uses and rules; empty where it would go, or where no retention is known."""
    damage: str = ""
    """Why its manifest can't be read."""


@dataclass
class Inspected:
    """A folder of checkpoints, and the one in it that was named."""

    path: str
    checkpoints: list[CheckpointRow]
    """Oldest first."""
    interrupted: list[CheckpointCommit]
    """Begun and not committed: being written now, or left by what was killed."""
    format_1: list[int]
    retention: dict[str, Any] | None
    """Of the run; None where its configuration isn't known."""
    step: int
    attempt: int
    tensors: dict[str, dict[str, Any]]
    """Of the checkpoint that was named, or the newest."""
    facts: dict[str, Any]

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def lines(self, pattern: str | None = None) -> list[str]:
        """For a person.

        Args:
            pattern: of tensors to list, as in a shell; None: none of them.
        """
        rows = [("STEP", "ATTEMPT", "RUN", "FILES", "BYTES", "LAYOUT", "KEPT")]
        for row in self.checkpoints:
            note = row.damage or ", ".join(row.kept) or ("goes next" if self.retention else "-")
            cells = (plural(row.files, "file"), size(row.bytes), axes(row.layout))
            cells = ("-", "-", "-") if row.damage else cells
            rows.append((str(row.step), str(row.attempt), row.run, *cells, note))
        lines = [f"checkpoints in {self.path}", *table(rows, right=(0, 1, 3, 4))]
        for commit in self.interrupted:
            lines.append(f"interrupted, or being written: step {commit.step} of attempt {commit.attempt}")
        if self.format_1:
            lines.append(f"of format 1, which isn't read any more: {', '.join(map(str, self.format_1))}")
        if self.retention:
            every = self.retention["every"]
            lines.append(
                f"retention: the last {self.retention['last']}"
                + (f" and every {every}th step" if every else "")
            )
        return [*lines, *self._one(pattern)]

    def _one(self, pattern: str | None) -> list[str]:
        """The checkpoint that was named."""
        if not self.tensors:
            return []
        total = sum(one["bytes"] for one in self.tensors.values())
        elements = sum(one["elements"] for one in self.tensors.values())
        dtypes: dict[str, int] = {}
        for one in self.tensors.values():
            dtypes[one["dtype"]] = dtypes.get(one["dtype"], 0) + 1
        counts = ", ".join(f"{count} {dtype}" for dtype, count in dtypes.items())
        lines = ["", f"step {self.step} of attempt {self.attempt}"]
        rows = [
            (
                "  tensors",
                f"{plural(len(self.tensors), 'tensor')} ({counts}), {elements:,} elements, {size(total)}",
            )
        ]
        facts = {name: value for name, value in self.facts.items() if name != "lineage"}
        for name, value in flat(facts).items():
            rows.append((f"  {name}", _short(str(value))))
        lines += table(rows)
        for one in self.facts.get("lineage", []):
            lines.append("  lineage: " + _short(", ".join(f"{k} {v}" for k, v in one.items())))
        if pattern is not None:
            chosen = [(n, one) for n, one in self.tensors.items() if fnmatchcase(n, pattern)]
            body = [
                (f"  {n}", one["dtype"], str(one["shape"]), size(one["bytes"]), plural(one["files"], "file"))
                for n, one in chosen
            ]
            lines += ["", *table(body, right=(3, 4))] if body else ["", f"no tensor fits '{pattern}'"]
        return lines


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[: _LONGEST - 1] + "…"


def inspect(place: CheckpointLocation) -> Inspected:
    """Look at a folder; only manifests are read.

    Raises:
        UserError: where nothing is committed there, or not what was named.
        Incomplete: where the manifest of the step that was named is damaged.
    """
    folder = CheckpointFolder(place.store)
    shown = place.commits(folder)[-1]
    retention = retention_of(place)
    why = keep_reasons(folder, retention)
    rows: list[CheckpointRow] = []
    manifest: Manifest | None = None
    for commit in folder.commits:
        row = CheckpointRow(commit.step, commit.attempt, commit.run)
        rows.append(row)
        try:
            head = folder.head(commit)
        except Incomplete as error:
            row.damage = str(error)
            continue
        row.files, row.bytes, row.layout = head.world, head.size, head.layout
        row.kept = why.get(commit, [])
    try:
        manifest = folder.manifest(shown)
    except Incomplete:
        if place.step is not None:
            raise
    return Inspected(
        path=place.root,
        checkpoints=rows,
        interrupted=sorted(folder.begun),
        format_1=folder.old,
        retention=asdict(retention) if retention else None,
        step=shown.step,
        attempt=shown.attempt,
        tensors=_tensors(manifest),
        facts=manifest.facts if manifest else {},
    )


def _tensors(manifest: Manifest | None) -> dict[str, dict[str, Any]]:
    """What the manifest tells of each tensor."""
    rows = {}
    for name, tensor in manifest.tensors.items() if manifest else ():
        elements = prod(tensor.shape)
        rows[name] = {
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "elements": elements,
            "bytes": elements * DTYPES[tensor.dtype][1],
            "files": sum(last - first + 1 for first, last in tensor.ranks),
        }
    return rows
