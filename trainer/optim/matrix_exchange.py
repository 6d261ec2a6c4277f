"""Which rank orthogonalises which matrix, and which parts are exchanged for it. Computed once, from all ranks' boxes.

A matrix may lie in parts on several ranks (split by FSDP, tensor or expert parallelism) and in several copies. One of its
holders owns it: the others send their parts there, and get back the results. All ranks derive the same plan, so
nothing is negotiated at run time; and one result goes to all copies, so that they stay equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod

from trainer.optim.shards import StagePeers
from trainer.state import Box

Span = tuple[int, int]


@dataclass(frozen=True)
class MatrixPart:
    """A block of a matrix in a shard of a rank."""

    rank: int
    shard: int
    """Which of the rank's shards."""
    index: int
    """Which of the shard's own matrices, its leading dims flattened."""
    rows: Span
    """Of the matrix, start and end."""
    columns: Span
    replica: int

    @property
    def shape(self) -> tuple[int, int]:
        """Rows and columns."""
        return self.rows[1] - self.rows[0], self.columns[1] - self.columns[0]

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)


@dataclass
class ShardedMatrix:
    """A matrix, with its parts on all ranks and the rank that works on it."""

    name: str
    shape: tuple[int, int]
    parts: list[MatrixPart] = field(default_factory=list)
    owner: int = -1

    @property
    def cost(self) -> int:
        """Multiplications of a Newton-Schulz step, up to a factor."""
        short, long = sorted(self.shape)
        return short * short * (2 * long + short)

    @property
    def elements(self) -> int:
        """Number of elements."""
        return prod(self.shape)

    @property
    def holders(self) -> dict[int, int]:
        """Elements by rank, of the ranks that hold any."""
        held: dict[int, int] = {}
        for part in self.parts:
            held[part.rank] = held.get(part.rank, 0) + part.elements
        return held

    def sources(self) -> list[MatrixPart]:
        """One copy of each block: the owner's where it has one, else replica 0."""
        own = {(part.rows, part.columns) for part in self.parts if part.rank == self.owner}
        return [
            part
            for part in self.parts
            if part.rank == self.owner or (part.replica == 0 and (part.rows, part.columns) not in own)
        ]


@dataclass(frozen=True)
class ExchangeLayout:
    """What one rank sends or receives in one all-to-all, in the order of the buffer: by the other rank, then by matrix."""

    parts: list[tuple[int, MatrixPart]]
    """Each with the position of its matrix among those of the bucket that the owner owns."""
    split_sizes: list[int]
    """Elements by the other rank, as the all-to-all takes them."""


@dataclass(frozen=True)
class MatrixBucket:
    """Matrices that are exchanged and orthogonalised together, as one rank sees them."""

    owned: list[ShardedMatrix]
    part_sends: ExchangeLayout
    """The rank's own parts, to the owners of their matrices."""
    part_receives: ExchangeLayout
    """Parts of the matrices that it owns, from the other holders."""
    result_sends: ExchangeLayout
    """Results, to all holders."""
    result_receives: ExchangeLayout
    """Results for the rank's own parts, from owners."""
    communicates: bool
    """Whether any rank exchanges anything in this bucket; the same on all ranks."""


def plan_buckets(peers: StagePeers, kinds: Mapping[str, str], limit: int) -> list[MatrixBucket]:
    """Buckets of rank `peers.rank`: first those that all ranks process together, then those of its own matrices.

    Args:
        kinds: kind of every shard name; matrices take part.
        limit: elements that a rank holds and owns in a bucket together; a larger matrix has a bucket of its own.

    Raises:
        ValueError: the first copies of a matrix's blocks don't make it up.
    """
    matrices = collect_matrices(peers, kinds)
    assign_owners(matrices, peers.size)
    matrices.sort(key=lambda matrix: (-matrix.cost, matrix.shape))  # stable, so all ranks have one order
    spanning = [matrix for matrix in matrices if len(matrix.holders) > 1]
    local = [matrix for matrix in matrices if len(matrix.holders) == 1 and matrix.owner == peers.rank]
    return [
        _matrix_bucket(bucket, peers, communicates)
        for some, communicates in ((spanning, True), (local, False))
        for bucket in split_buckets(some, limit)
    ]


def collect_matrices(peers: StagePeers, kinds: Mapping[str, str]) -> list[ShardedMatrix]:
    """All matrices of the stage, in the order in which ranks and shards name them."""
    matrices: dict[tuple[str, tuple[int, ...]], ShardedMatrix] = {}
    for rank, shards in enumerate(peers.shards):
        for number, (name, box, replica, _) in enumerate(shards):
            if kinds[name] != "matrix" or not box.elements:
                continue
            for index, lead in enumerate(_leading_indices(box)):
                matrix = matrices.setdefault(
                    (name, lead), ShardedMatrix(name, (box.whole[-2], box.whole[-1]))
                )
                rows, columns = ((s, s + n) for s, n in zip(box.start[-2:], box.shape[-2:], strict=True))
                matrix.parts.append(MatrixPart(rank, number, index, rows, columns, replica))
    for (name, lead), matrix in matrices.items():
        covered = sum(part.elements for part in matrix.parts if part.replica == 0)
        if covered != matrix.elements:
            raise ValueError(
                f"the ranks of the stage hold {covered} of the {matrix.elements} elements of {name}{list(lead)}"
            )
    return list(matrices.values())


def _leading_indices(box: Box) -> Iterator[tuple[int, ...]]:
    """Indices of the box's matrices in the whole tensor."""
    spans = zip(box.start[:-2], box.shape[:-2], strict=True)
    return product(*(range(start, start + length) for start, length in spans))


def assign_owners(matrices: Sequence[ShardedMatrix], size: int) -> None:
    """Give each matrix an owner among its holders: the most expensive first, each to the holder with the least work."""
    loads = [0] * size
    spread = []
    for matrix in matrices:
        holders = matrix.holders
        if len(holders) == 1:
            (matrix.owner,) = holders
            loads[matrix.owner] += matrix.cost
        else:
            spread.append((matrix, holders))
    for matrix, holders in sorted(spread, key=lambda pair: -pair[0].cost):
        matrix.owner = min(holders, key=lambda rank: (loads[rank], -holders[rank], rank))
        loads[matrix.owner] += matrix.cost


def split_buckets(matrices: Sequence[ShardedMatrix], limit: int) -> Iterator[list[ShardedMatrix]]:
    """Cut a list of matrices so that no rank holds and owns more than `limit` elements in a bucket."""
    bucket: list[ShardedMatrix] = []
    used: dict[int, int] = {}
    for matrix in matrices:
        need = matrix.holders
        need[matrix.owner] += matrix.elements
        if bucket and any(used.get(rank, 0) + count > limit for rank, count in need.items()):
            yield bucket
            bucket, used = [], {}
        bucket.append(matrix)
        for rank, count in need.items():
            used[rank] = used.get(rank, 0) + count
    if bucket:
        yield bucket


def _matrix_bucket(bucket: Sequence[ShardedMatrix], peers: StagePeers, communicates: bool) -> MatrixBucket:
    """What `peers.rank` does for the matrices of a bucket."""
    rank = peers.rank
    layouts: list[list[list[tuple[int, MatrixPart]]]] = [[[] for _ in range(peers.size)] for _ in range(4)]
    part_sends, part_receives, result_sends, result_receives = layouts
    positions = [0] * peers.size
    for matrix in bucket:
        position = positions[matrix.owner]
        positions[matrix.owner] += 1
        for part in matrix.sources():
            if part.rank == rank:
                part_sends[matrix.owner].append((position, part))
            if matrix.owner == rank:
                part_receives[part.rank].append((position, part))
        for part in matrix.parts:
            if matrix.owner == rank:
                result_sends[part.rank].append((position, part))
            if part.rank == rank:
                result_receives[matrix.owner].append((position, part))
    owned = [matrix for matrix in bucket if matrix.owner == rank]
    return MatrixBucket(
        owned,
        _exchange_layout(part_sends),
        _exchange_layout(part_receives),
        _exchange_layout(result_sends),
        _exchange_layout(result_receives),
        communicates,
    )


def _exchange_layout(by_rank: Sequence[Sequence[tuple[int, MatrixPart]]]) -> ExchangeLayout:
    parts = [pair for pairs in by_rank for pair in pairs]
    return ExchangeLayout(parts, [sum(part.elements for _, part in pairs) for pairs in by_rank])
