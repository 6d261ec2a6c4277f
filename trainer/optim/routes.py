"""Which rank orthogonalises which matrix, and what travels for it: worked out once, from the boxes of all ranks alone.

A matrix may lie in parts on several ranks (split by FSDP, tensor or expert parallelism) and in several copies. One of its
holders owns it: the others send their parts there, and get back what becomes of them. All ranks derive the same plan, so
nothing is negotiated at run time; and one result goes to all copies, so that they stay equal bit for bit.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import product
from math import prod

from trainer.optim.slots import StagePeers
from trainer.state import Box

Span = tuple[int, int]


@dataclass(frozen=True)
class MatrixPart:
    """A block of a matrix in a slot of a rank."""

    rank: int
    slot: int
    """Which of the rank's slots."""
    index: int
    """Which of the slot's own matrices, its leading dims flattened."""
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
class Unit:
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
class ExchangeLane:
    """What one rank sends or gets in one exchange, in the order of the buffer: by the other rank, then by matrix."""

    parts: list[tuple[int, MatrixPart]]
    """Each with the place of its matrix among those of the route that the owner owns."""
    counts: list[int]
    """Elements by the other rank."""


@dataclass(frozen=True)
class Route:
    """A bucket of matrices as one rank sees it."""

    owned: list[Unit]
    gives: ExchangeLane
    """Of the rank's own parts, to owners."""
    takes: ExchangeLane
    """Parts of the matrices that it owns, from their sources."""
    returns: ExchangeLane
    """Results, to all holders."""
    lands: ExchangeLane
    """Results for the rank's own parts, from owners."""
    travels: bool
    """Whether any rank exchanges anything in this bucket; the same on all ranks."""


def plan(peers: StagePeers, kinds: Mapping[str, str], limit: int) -> list[Route]:
    """Routes of rank `peers.rank`: buckets that all ranks go through together, then its own matrices.

    Args:
        kinds: kind of every slot name; matrices take part.
        limit: elements that a rank holds and owns in a bucket together; a larger matrix has a bucket of its own.

    Raises:
        ValueError: the first copies of a matrix's blocks don't make it up.
    """
    units = find(peers, kinds)
    assign(units, peers.size)
    units.sort(key=lambda unit: (-unit.cost, unit.shape))  # stable, so all ranks have one order
    shared = [unit for unit in units if len(unit.holders) > 1]
    mine = [unit for unit in units if len(unit.holders) == 1 and unit.owner == peers.rank]
    return [
        _route(bucket, peers, travels)
        for some, travels in ((shared, True), (mine, False))
        for bucket in buckets(some, limit)
    ]


def find(peers: StagePeers, kinds: Mapping[str, str]) -> list[Unit]:
    """All matrices of the stage, in the order in which ranks and slots name them."""
    units: dict[tuple[str, tuple[int, ...]], Unit] = {}
    for rank, slots in enumerate(peers.slots):
        for number, (name, box, replica, _) in enumerate(slots):
            if kinds[name] != "matrix" or not box.elements:
                continue
            for index, lead in enumerate(_leads(box)):
                unit = units.setdefault((name, lead), Unit(name, (box.whole[-2], box.whole[-1])))
                rows, columns = ((s, s + n) for s, n in zip(box.start[-2:], box.shape[-2:], strict=True))
                unit.parts.append(MatrixPart(rank, number, index, rows, columns, replica))
    for (name, lead), unit in units.items():
        covered = sum(part.elements for part in unit.parts if part.replica == 0)
        if covered != unit.elements:
            raise ValueError(
                f"the ranks of the stage hold {covered} of the {unit.elements} elements of {name}{list(lead)}"
            )
    return list(units.values())


def _leads(box: Box) -> Iterator[tuple[int, ...]]:
    """Indices of the box's matrices in the whole tensor."""
    spans = zip(box.start[:-2], box.shape[:-2], strict=True)
    return product(*(range(start, start + length) for start, length in spans))


def assign(units: Sequence[Unit], size: int) -> None:
    """Give each matrix an owner among its holders: the dearest first, each to the least loaded one."""
    loads = [0] * size
    spread = []
    for unit in units:
        holders = unit.holders
        if len(holders) == 1:
            (unit.owner,) = holders
            loads[unit.owner] += unit.cost
        else:
            spread.append((unit, holders))
    for unit, holders in sorted(spread, key=lambda pair: -pair[0].cost):
        unit.owner = min(holders, key=lambda rank: (loads[rank], -holders[rank], rank))
        loads[unit.owner] += unit.cost


def buckets(units: Sequence[Unit], limit: int) -> Iterator[list[Unit]]:
    """Cut a list of matrices so that no rank holds and owns more than `limit` elements in a bucket."""
    bucket: list[Unit] = []
    used: dict[int, int] = {}
    for unit in units:
        need = unit.holders
        need[unit.owner] += unit.elements
        if bucket and any(used.get(rank, 0) + count > limit for rank, count in need.items()):
            yield bucket
            bucket, used = [], {}
        bucket.append(unit)
        for rank, count in need.items():
            used[rank] = used.get(rank, 0) + count
    if bucket:
        yield bucket


def _route(bucket: Sequence[Unit], peers: StagePeers, travels: bool) -> Route:
    """What `peers.rank` does for the matrices of a bucket."""
    rank = peers.rank
    lanes: list[list[list[tuple[int, MatrixPart]]]] = [[[] for _ in range(peers.size)] for _ in range(4)]
    gives, takes, returns, lands = lanes
    places = [0] * peers.size
    for unit in bucket:
        place = places[unit.owner]
        places[unit.owner] += 1
        for part in unit.sources():
            if part.rank == rank:
                gives[unit.owner].append((place, part))
            if unit.owner == rank:
                takes[part.rank].append((place, part))
        for part in unit.parts:
            if unit.owner == rank:
                returns[part.rank].append((place, part))
            if part.rank == rank:
                lands[unit.owner].append((place, part))
    owned = [unit for unit in bucket if unit.owner == rank]
    return Route(owned, _lane(gives), _lane(takes), _lane(returns), _lane(lands), travels)


def _lane(by_rank: Sequence[Sequence[tuple[int, MatrixPart]]]) -> ExchangeLane:
    parts = [pair for pairs in by_rank for pair in pairs]
    return ExchangeLane(parts, [sum(part.elements for _, part in pairs) for pairs in by_rank])
