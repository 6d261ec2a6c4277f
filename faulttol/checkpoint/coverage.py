"""Whether what all ranks have written makes up whole tensors: each element once, at twelve thousand ranks in seconds."""

from __future__ import annotations

import threading
import zlib
from array import array
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from typing import Any, overload

from faulttol.checkpoint.boxes import Box, coverage_error, covers_exactly
from faulttol.checkpoint.manifest import Incomplete, Plain, Tensor, digest

_KEPT = 4
"""Results that are remembered: a run has one plan, or two where the last step saves something else."""


class FilePlan(Sequence[Plain]):
    """The pieces of one rank's file, in its order: a few KB that compare by their digest."""

    def __init__(self, rows: Sequence[Plain]) -> None:
        lines = "\n".join(f"{name}\t{dtype}\t{len(box.whole)}" for name, dtype, box in rows).encode()
        numbers = array("q")
        for name, _, box in rows:
            if not len(box.whole) == len(box.start) == len(box.shape):
                raise Incomplete(f"{name}{list(box.whole)} has a box {box}, which has other dims")
            numbers.extend((*box.whole, *box.start, *box.shape))
        data = len(rows).to_bytes(8, "little") + len(lines).to_bytes(8, "little") + lines + numbers.tobytes()
        self.digest = digest(data)
        self._packed = zlib.compress(data, 1)

    @classmethod
    def parse(cls, packed: bytes) -> FilePlan:
        """The inverse of `packed`."""
        plan = cls(())
        plan.digest, plan._packed = digest(zlib.decompress(packed)), packed
        return plan

    @property
    def packed(self) -> bytes:
        """As it is kept and sent."""
        return self._packed

    def unpack(self) -> tuple[list[str], bytes]:
        """For each piece `name TAB dtype TAB dims`, and the numbers of whole, start and shape as int64."""
        data = zlib.decompress(self._packed)
        count, size = int.from_bytes(data[:8], "little"), int.from_bytes(data[8:16], "little")
        lines = data[16 : 16 + size].decode().split("\n") if count else []
        return lines, data[16 + size :]

    def __len__(self) -> int:
        return len(self.unpack()[0])

    def __iter__(self) -> Iterator[Plain]:
        lines, data = self.unpack()
        numbers, at = array("q", data), 0
        for line in lines:
            name, dtype, count = line.rsplit("\t", 2)
            n = int(count)
            parts = (tuple(numbers[at + n * k : at + n * (k + 1)]) for k in range(3))
            yield name, dtype, Box(*parts)
            at += 3 * n

    @overload
    def __getitem__(self, at: int) -> Plain: ...
    @overload
    def __getitem__(self, at: slice) -> Sequence[Plain]: ...
    def __getitem__(self, at: int | slice) -> Plain | Sequence[Plain]:
        return list(self)[at]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, FilePlan) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)


def check_coverage(pieces: Sequence[Sequence[Plain]]) -> dict[str, Tensor]:
    """The global tensors that the ranks' pieces make up, after a check that each is whole.

    Every tensor must have one shape and dtype everywhere, and its boxes must cover it exactly: inside of it,
    disjoint, nothing left out.

    Args:
        pieces: by rank, what each has written.

    Raises:
        Incomplete: naming the tensor and the range or rank.
    """
    plans = [piece if isinstance(piece, FilePlan) else FilePlan(piece) for piece in pieces]
    rows = _Rows(plans)
    tensors: dict[str, Tensor] = {}
    for key, line in enumerate(rows.lines):
        name, dtype, _ = line.rsplit("\t", 2)
        ranks, whole, start, shape = rows.boxes(key)
        alike = (whole == whole[0]).all()
        if name in tensors or not alike or not covers_exactly(whole[0], start, shape):
            raise Incomplete(_why(name, plans))
        tensors[name] = Tensor(dtype, tuple(whole[0].tolist()), _runs(ranks))
    return tensors


class _Rows:
    """All pieces of all ranks in arrays, sorted by tensor."""

    def __init__(self, plans: Sequence[FilePlan]) -> None:
        import numpy as np

        keys: dict[str, int] = {}
        places, counts, numbers = [], [], []
        for plan in plans:
            lines, data = plan.unpack()
            places.append(np.array([keys.setdefault(line, len(keys)) for line in lines], np.int32))
            counts.append(len(lines))
            numbers.append(data)
        self.lines = list(keys)
        self._dims = np.array([int(line.rsplit("\t", 1)[1]) for line in self.lines], np.int64)
        key = np.concatenate([*places, np.empty(0, np.int32)])
        widths = 3 * self._dims[key] if len(key) else np.empty(0, np.int64)
        self._numbers = np.frombuffer(b"".join(numbers), np.int64)
        offsets = np.cumsum(widths) - widths
        order = np.argsort(key, kind="stable")
        self._ranks = np.repeat(np.arange(len(plans)), counts)[order]
        self._offsets = offsets[order]
        self._edges = np.searchsorted(key[order], np.arange(len(self.lines) + 1))

    def boxes(self, key: int) -> tuple[Any, Any, Any, Any]:
        """Of a tensor: ranks [N], and whole, start and shape [N, dims]."""
        import numpy as np

        rows = slice(self._edges[key], self._edges[key + 1])
        n = int(self._dims[key])
        numbers = self._numbers[self._offsets[rows, None] + np.arange(3 * n)]
        return self._ranks[rows], numbers[:, :n], numbers[:, n : 2 * n], numbers[:, 2 * n :]


def _why(name: str, plans: Sequence[FilePlan]) -> str:
    """Why a tensor isn't whole, with the range or the ranks."""
    parts = [(rank, dtype, box) for rank, plan in enumerate(plans) for n, dtype, box in plan if n == name]
    first, dtype, box = parts[0]
    for rank, other, part in parts:
        if (other, part.whole) != (dtype, box.whole):
            return f"{name} is {dtype}{list(box.whole)} on rank {first} and {other}{list(part.whole)} on rank {rank}"
    return f"{name}{coverage_error(Box.full(box.whole), [part for *_, part in parts])}"


def _runs(ranks: Any) -> tuple[tuple[int, int], ...]:
    """Runs of neighbours among ascending ranks, which may be there several times."""
    import numpy as np

    ends = np.flatnonzero(np.diff(ranks) > 1)
    firsts, lasts = ranks[np.append(0, ends + 1)], ranks[np.append(ends, len(ranks) - 1)]
    return tuple(zip(firsts.tolist(), lasts.tolist(), strict=True))


class CoverageCache:
    """What was proven whole, by the digests of all ranks' plans: those of a run's next save are the same."""

    def __init__(self) -> None:
        self._found: OrderedDict[str, dict[str, Tensor]] = OrderedDict()
        self._lock = threading.Lock()

    def known(self, digests: Sequence[str]) -> bool:
        """Whether ranks with these plans, in this order, were checked."""
        return digest("".join(digests).encode()) in self._found

    def check(self, digests: Sequence[str], plans: Sequence[FilePlan | None]) -> dict[str, Tensor]:
        """The tensors that the plans make up; checked once.

        Args:
            plans: None where a rank sent the digest alone, which only does where the whole is known.

        Raises:
            Incomplete: where the plans don't make up a whole, or aren't known.
        """
        key = digest("".join(digests).encode())
        with self._lock:
            if key in self._found:
                self._found.move_to_end(key)
                return self._found[key]
        given = [plan for plan in plans if plan is not None]
        if len(given) < len(plans):
            raise Incomplete("a rank sent the digest of its plan alone, and no such plan was checked here")
        tensors = check_coverage(given)
        with self._lock:
            self._found[key] = tensors
            while len(self._found) > _KEPT:
                self._found.popitem(last=False)
        return tensors
