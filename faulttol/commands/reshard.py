"""Rewrites a checkpoint as the files of another layout: the same tensors, bit by bit, committed in another folder."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from math import prod
from typing import Any

from configs.errors import UserError, nearest
from faulttol.checkpoint import save as saving
from faulttol.checkpoint.boxes import Box
from faulttol.checkpoint.folder import CheckpointFolder, folder_of
from faulttol.checkpoint.hashes import MAX_READ, THREADS, CheckpointSource, Progress, no_progress
from faulttol.checkpoint.manifest import Identity, Plain, Tensor
from faulttol.checkpoint.pieces import BLOCK, DTYPES, TensorPiece
from faulttol.checkpoint.shards import layout as laid_out
from faulttol.checkpoint.shards import ordered
from faulttol.checkpoint.store import StoreLike
from faulttol.commands.terminal import axes, plural, rate, size
from faulttol.convert.job import ConversionProgress, Estimate
from faulttol.convert.target import lazy, write_all

AXES = ("pp", "dp", "cp", "ep", "etp", "tp")
_LAYER = re.compile(r"(?:^|\.)(\d+)(?:\.|$)")


@dataclass(frozen=True)
class Resharded:
    """A checkpoint that was written anew."""

    path: str
    step: int
    files: int
    layout: dict[str, int]
    bytes: int
    """Of all files."""
    read: int
    """Bytes that were read for it."""
    seconds: float

    def to_json(self) -> dict[str, Any]:
        """As plain data."""
        return asdict(self)

    def lines(self) -> list[str]:
        """For a person."""
        what = f"{plural(self.files, 'file')} for {axes(self.layout)}, {size(self.bytes)}"
        return [
            f"{self.path}: {what}, {size(self.read)} read, {self.seconds:.1f} s, {rate(self.bytes, self.seconds)}"
        ]


def parse_layout(text: str) -> dict[str, int]:
    """`pp=2,dp=2,ep=4` as sizes by axis; the others are 1.

    Raises:
        UserError: for an unknown axis, a size that is not a whole number above 0, and experts that don't fit.
    """
    sizes = dict.fromkeys(AXES, 1)
    for word in text.replace(" ", ",").split(","):
        if not word:
            continue
        axis, _, number = word.partition("=")
        if axis not in AXES:
            raise UserError(
                f"--layout={text}: no axis '{axis}'{nearest(axis, AXES)}; the axes are {', '.join(AXES)}: "
                "type e.g. pp=2,dp=4,ep=4"
            )
        if not number.isdecimal() or int(number) < 1:
            raise UserError(
                f"--layout={text}: {axis}={number} is not a whole number above 0; type e.g. {axis}=2"
            )
        sizes[axis] = int(number)
    width = prod(sizes[axis] for axis in ("dp", "cp", "tp"))
    if width % (sizes["ep"] * sizes["etp"]):
        raise UserError(
            f"--layout={text}: ep*etp={sizes['ep'] * sizes['etp']} doesn't divide dp*cp*tp={width}, the ranks of a "
            f"pipeline stage; type e.g. dp={sizes['ep'] * sizes['etp']}"
        )
    return sizes


def placed(tensors: dict[str, Tensor], layout: dict[str, int]) -> list[list[Plain]]:
    """What each file gets, by rank: every element once, so that a rank of the layout finds its part in few files.

    Layers go to the files of their pipeline stage; of a tensor whose name has the part `experts`, the files of an expert
    group get its experts. Within that, large tensors are cut evenly and small ones go where the least is. Whatever is
    placed where, any layout can load it.

    Args:
        layout: size by axis, as `parse_layout` gives it.
    """
    world = prod(layout[axis] for axis in ("pp", "dp", "cp", "tp"))
    width, groups, each = world // layout["pp"], layout["ep"], layout["etp"]
    layers = 1 + max((_layer(name) for name in tensors), default=-1)
    files: list[list[Plain]] = [[] for _ in range(world)]
    filled = [0] * world
    for name, tensor in tensors.items():
        layer, box = _layer(name), Box.full(tensor.shape)
        base = width * (layer * layout["pp"] // layers) if layer >= 0 else 0
        ranks = range(base, base + width) if layer >= 0 else range(world)
        shares: list[tuple[Box, Sequence[int]]] = [(box, ranks)]
        if layer >= 0 and groups > 1 and "experts" in name.split("/")[0].split(".") and box.shape[:1]:
            count = box.shape[0]
            if count and count % groups == 0:
                rows = count // groups
                shares = [
                    (
                        box.cut(0, e * rows, (e + 1) * rows),
                        [r for r in ranks if (r - base) // each % groups == e],
                    )
                    for e in range(groups)
                ]
        for share, owners in shares:
            for part, rank in _split(share, owners, DTYPES[tensor.dtype][1], filled):
                files[rank].append((name, tensor.dtype, part))
                filled[rank] += part.elements * DTYPES[tensor.dtype][1]
    return files


def _layer(name: str) -> int:
    """The first number in a name, -1 where it has none."""
    match = _LAYER.search(name.split("/")[0])
    return int(match[1]) if match else -1


def _split(box: Box, ranks: Sequence[int], item: int, filled: Sequence[int]) -> Iterator[tuple[Box, int]]:
    """Parts of a box and their ranks."""
    count = len(ranks)
    if box.elements * item < count * BLOCK:
        yield box, min(ranks, key=lambda rank: filled[rank])
        return
    rows = box.shape[0]
    for at, rank in enumerate(ranks):
        if rows >= count:
            yield box.cut(0, rows * at // count, rows * (at + 1) // count), rank
        else:
            first, last = (box.elements * turn // count for turn in (at, at + 1))
            yield from ((part, rank) for part in box.flat(first, last))


def estimate(source: CheckpointSource, layout: dict[str, int]) -> Estimate:
    """What `reshard` would read, write and take.

    Raises:
        Incomplete: where an index of the checkpoint is damaged.
    """
    files = placed(source.tensors, layout)
    read = sum(source.cost(name, box) for rows in files for name, _, box in rows)
    written = moved = 0
    for rank, rows in enumerate(files):
        identity = _identity(source, layout, rank, len(files))
        pieces = ordered(TensorPiece(name, dtype, box, memoryview(b"")) for name, dtype, box in rows)
        written += laid_out(source.commit.step, identity, pieces).size
        for name, dtype, box in rows:
            kept = [box.overlap(piece.entry.box) for piece in source.pieces(name) if piece.rank == rank]
            moved += (box.elements - sum(common.elements for common in kept if common)) * DTYPES[dtype][1]
    indexes = sum(file.index for file in source.manifest.files)
    peak = min(THREADS, len(files)) * (3 * MAX_READ + 2 * BLOCK) + indexes
    return Estimate(read + indexes, written, moved, peak)


def reshard(
    source: CheckpointSource, out: StoreLike, layout: dict[str, int], progress: Progress = no_progress
) -> Resharded:
    """Write a checkpoint's tensors to another folder as the files of a layout, and commit them.

    Run, attempt, step and facts stay; `lineage` in the facts tells where it is from. What is read is verified. Several
    files are written at once, each in bounded memory.

    Raises:
        UserError: where the other folder is this one, another run's, or has the step already.
        SaveSuperseded: where the other folder has a newer attempt's checkpoints.
        Uncertain: where it may have been committed or not.
        Incomplete: where the checkpoint is damaged. Then, as after any other error, nothing was committed.
    """
    began, manifest, step = time.monotonic(), source.manifest, source.commit.step
    refuse_out(source, out)
    files = placed(source.tensors, layout)
    who = [_identity(source, layout, rank, len(files)) for rank in range(len(files))]
    saving.check_owner(out, who[0])
    tell = ConversionProgress(progress, sum(map(source.size, source.tensors)))
    pieces = [
        [lazy(name, dtype, box, partial(source.chunks, name), tell) for name, dtype, box in rows]
        for rows in files
    ]
    lineage = [*manifest.facts.get("lineage", []), _origin(source)]
    count = write_all(out, step, who, pieces, {**manifest.facts, "lineage": lineage})
    path = f"{out.url.rstrip('/')}/{folder_of(step)}"
    return Resharded(path, step, len(files), layout, count, source.bytes, time.monotonic() - began)


def refuse_out(source: CheckpointSource, out: StoreLike) -> None:
    """Refuse a folder that the checkpoint can't be written to.

    Raises:
        UserError: where it is the checkpoint's own, or has the step already.
    """
    if _same(out.url, source.store.url):
        raise UserError(
            f"--out={out.url} is the folder of the checkpoint itself: name another, since a run's folder is written by "
            "the run alone"
        )
    for commit in CheckpointFolder(out).commits:
        if commit == source.commit:
            raise UserError(
                f"--out={out.url} has step {commit.step} of run {commit.run} already: name another folder, or remove "
                f"{folder_of(commit.step)} there"
            )


def _same(one: str, other: str) -> bool:
    from pathlib import Path

    if "://" in one or "://" in other:
        return one.rstrip("/") == other.rstrip("/")
    return Path(one).resolve() == Path(other).resolve()


def _identity(source: CheckpointSource, layout: dict[str, int], rank: int, world: int) -> Identity:
    return Identity(source.manifest.run, source.manifest.attempt, layout, rank, world)


def _origin(source: CheckpointSource) -> dict[str, Any]:
    """What the lineage remembers."""
    manifest = source.manifest
    return {
        "how": "reshard",
        "run": manifest.run,
        "attempt": manifest.attempt,
        "step": manifest.step,
        "layout": manifest.layout,
        "from": source.store.url,
    }
