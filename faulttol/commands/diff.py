"""What differs between two checkpoints, tensor by tensor: by digests where the files are cut alike, by values elsewhere."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

from faulttol.checkpoint.boxes import Box
from faulttol.checkpoint.hashes import (
    MAX_READ,
    THREADS,
    CheckpointSource,
    Located,
    Progress,
    element_range,
    no_progress,
    parts_of,
)
from faulttol.checkpoint.manifest import flat
from faulttol.checkpoint.pieces import DTYPES
from faulttol.commands.dtype_values import numbers
from faulttol.commands.terminal import plural, size, table
from faulttol.convert.job import ConversionProgress

_SHOWN = 40
"""Tensors of a kind that a person is shown; JSON has all."""


@dataclass
class TensorDiff:
    """How the values of one tensor differ."""

    name: str
    elements: int
    """Of the tensor."""
    differ: int = 0
    """Elements whose bits differ."""
    largest: float = 0.0
    """Absolute difference, of the elements that are numbers in both."""
    not_numbers: int = 0
    """Elements that differ, of which one or both are NaN or infinite."""
    first: str = ""
    """Place of the first range that differs."""


@dataclass
class Difference:
    """What differs between two checkpoints, the first and the second."""

    only_first: list[str] = field(default_factory=list)
    only_second: list[str] = field(default_factory=list)
    shapes: dict[str, tuple[str, str]] = field(default_factory=dict)
    """By name, dtype and shape in both, where they differ."""
    values: list[TensorDiff] = field(default_factory=list)
    facts: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    """By dotted name, in both; None where it isn't there."""
    equal: int = 0
    """Tensors that are bitwise equal."""
    by_digest: int = 0
    """Of all tensors, those that weren't read, since digests tell it."""
    read: int = 0
    """Bytes."""

    @property
    def same(self) -> bool:
        """Whether all tensors are there in both, and bitwise equal."""
        return not (self.only_first or self.only_second or self.shapes or self.values)

    def to_json(self) -> dict[str, object]:
        """As plain data."""
        return {"same": self.same, **asdict(self)}

    def lines(self) -> list[str]:
        """For a person."""
        lines = []
        for title, names in (
            ("only in the first", self.only_first),
            ("only in the second", self.only_second),
        ):
            lines += _section(title, [f"  {name}" for name in names])
        lines += _section(
            "of another dtype or shape",
            table([(f"  {name}", *two) for name, two in self.shapes.items()]),
        )
        rows = [("  TENSOR", "ELEMENTS", "DIFFER", "LARGEST", "NOT NUMBERS", "FIRST AT")]
        for one in sorted(self.values, key=lambda c: -c.largest):
            many = f"{one.not_numbers:,}" if one.not_numbers else "-"
            rows.append(
                (
                    f"  {one.name}",
                    f"{one.elements:,}",
                    f"{one.differ:,}",
                    f"{one.largest:.4g}",
                    many,
                    one.first,
                )
            )
        lines += _section("with other values", table(rows, right=(1, 2, 3, 4)), head=1)
        lines += _section(
            "facts", table([(f"  {name}", str(a), str(b)) for name, (a, b) in self.facts.items()])
        )
        alike = f"{plural(self.equal, 'tensor')} bitwise equal"
        return [*lines, f"{alike}, {self.by_digest:,} of all by digests alone; {size(self.read)} read"]


def _section(title: str, rows: list[str], head: int = 0) -> list[str]:
    """Rows under a title that counts them; nothing without rows."""
    count = len(rows) - head
    if count <= 0:
        return []
    more = [f"  … and {count - _SHOWN} more"] if count > _SHOWN else []
    return [f"{title}: {count}", *rows[: _SHOWN + head], *more]


def diff(first: CheckpointSource, second: CheckpointSource, progress: Progress = no_progress) -> Difference:
    """Compare all tensors and facts of two checkpoints.

    Where both cut a tensor alike and the digests agree, nothing is read; where they don't agree, only those blocks are;
    where it is cut otherwise, all of it is read, in bounded memory.

    Raises:
        Incomplete: where what is read is damaged.
    """
    difference = Difference(facts=_facts(first.manifest.facts, second.manifest.facts))
    difference.only_first = [name for name in first.tensors if name not in second.tensors]
    difference.only_second = [name for name in second.tensors if name not in first.tensors]
    work: list[tuple[str, list[Box], list[_Pair]]] = []
    for name in first.tensors:
        if name not in second.tensors:
            continue
        one, other = (f"{t.dtype}{list(t.shape)}" for t in (first.tensors[name], second.tensors[name]))
        if one != other:
            difference.shapes[name] = one, other
            continue
        pairs = _suspects(first.pieces(name), second.pieces(name))
        if pairs is None:
            whole = Box.full(first.tensors[name].shape)
            work.append((name, list(parts_of(whole, MAX_READ // _item(first, name))), []))
        else:
            difference.by_digest += not pairs
            work.append((name, [], pairs))
    for change in _compare(first, second, work, progress):
        if change.differ:
            difference.values.append(change)
        else:
            difference.equal += 1
    difference.read = first.bytes + second.bytes
    return difference


_Pair = tuple[Located, Located, int]
"""A piece of the first, the same of the second, and a block whose digests differ."""


def _suspects(first: Sequence[Located], second: Sequence[Located]) -> list[_Pair] | None:
    """Blocks whose digests differ; None where a tensor isn't cut alike."""
    cut = [Counter((p.entry.box, p.block) for p in pieces) for pieces in (first, second)]
    if cut[0] != cut[1]:
        return None
    others = {piece.entry.box: piece for piece in second}
    pairs = []
    for piece in first:
        other = others[piece.entry.box]
        for number in range(-(-piece.entry.bytes // piece.block)):
            if piece.entry.digest(number) != other.entry.digest(number):
                pairs.append((piece, other, number))
    return pairs


def _compare(
    first: CheckpointSource,
    second: CheckpointSource,
    work: Sequence[tuple[str, list[Box], list[_Pair]]],
    progress: Progress,
) -> Iterator[TensorDiff]:
    """Read boxes and blocks in both, and compare them."""
    import numpy as np

    sizes = [box.elements * _item(first, name) for name, boxes, _ in work for box in boxes]
    total = sum(sizes) + sum(piece.block for *_, pairs in work for piece, _, _ in pairs)
    tell = ConversionProgress(progress, total)

    def one(task: tuple[str, list[Box], list[_Pair]]) -> TensorDiff:
        name, boxes, pairs = task
        tensor, kind = first.tensors[name], np.dtype(f"u{_item(first, name)}")
        change = TensorDiff(name, Box.full(tensor.shape).elements)
        mine, theirs = (first.pieces(name), second.pieces(name)) if boxes else ([], [])
        for box in boxes:
            one, other = first.read(name, box, mine), second.read(name, box, theirs)
            _count(change, str(box), one, other, tensor.dtype)
            tell(box.elements * _item(first, name))
        for piece, twin, number in pairs:
            one = np.frombuffer(first.blocks(piece, number, number + 1), kind)
            other = np.frombuffer(second.blocks(twin, number, number + 1), kind)
            place = str(piece.entry.box.flat(*element_range(piece, number, number + 1))[0])
            _count(change, place, one, other, tensor.dtype)
            tell(piece.block)
        return change

    with ThreadPoolExecutor(THREADS) as pool:
        yield from pool.map(one, work)


def _count(change: TensorDiff, place: str, one: Any, other: Any, dtype: str) -> None:
    """Add to a change what differs between two arrays of bits."""
    import numpy as np

    places = one != other
    count = int(np.count_nonzero(places))
    if not count:
        return
    change.differ += count
    change.first = change.first or place
    with np.errstate(invalid="ignore", over="ignore"):
        gaps = np.abs(numbers(one[places], dtype) - numbers(other[places], dtype))
    finite = gaps[np.isfinite(gaps)]
    change.not_numbers += count - int(finite.size)
    change.largest = max(change.largest, float(finite.max()) if finite.size else 0.0)


def _item(source: CheckpointSource, name: str) -> int:
    return DTYPES[source.tensors[name].dtype][1]


def _facts(first: dict[str, Any], second: dict[str, Any]) -> dict[str, tuple[Any, Any]]:
    one, other = flat(first), flat(second)
    names = dict.fromkeys([*one, *other])
    return {name: (one.get(name), other.get(name)) for name in names if one.get(name) != other.get(name)}
