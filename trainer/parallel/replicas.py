"""Whether ranks that hold equal copies of state still do, asked before each save.

Small weights with their masters and moments, norms, router biases and counts lie on several ranks, each of which moves its
own copy by the same rule. A device that computes wrongly, or whose memory flips a bit, makes its copy differ from then
on. Nothing else shows it, and a load would make the copy that happens to be saved everybody's.

Each rank sums the bits of what it shares, weighted by position. The sums of all copies of a tensor then go into one number
with factors that cancel where they are equal, so that a single reduction of `_BUCKETS` numbers tells whether any differs,
however many ranks and tensors there are. Only where one does are the sums themselves gathered.
"""

from __future__ import annotations

import hashlib
import os
import socket
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from configs.errors import ReplicasDiffer, WrongReplica
from faulttol import exits
from trainer.parallel.mesh import Mesh
from trainer.state import Slice

_BUCKETS = 256
"""Numbers that are reduced. Of several tensors in a bucket all are gathered where one differs."""
_PRIME = (1 << 40) - 87
"""Modulus of those numbers: the sum over 8 million ranks still fits 64 bits."""
_STRETCH = 1 << 20
"""Elements that are summed at once, which takes 40 MiB."""
_WORD = (1 << 64) - 1
_ODD = 0x9E3779B97F4A7C15
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By bytes of an element, the dtype that its bits are read as: equal bits are equal, whether they are a number or not."""
_NAMED = 8
"""Ranks that a message names at most."""


class HeldCopy(NamedTuple):
    """What a rank tells of one copy."""

    part: str
    """Name and box, and which replicas where not all have equal bits."""
    replica: int
    replicas: int
    sum: int
    """Of its bits, modulo 2**64."""

    @property
    def share(self) -> tuple[int, int]:
        """A bucket and what goes into it: the sum times a factor. The factors of all replicas add up to 0 modulo `_PRIME`.

        They are powers of a number that hangs on the tensor, so that neither several wrong copies nor several wrong
        tensors cancel, but once in 2**40 / `replicas`.
        """
        digest = hashlib.blake2b(self.part.encode(), digest_size=16).digest()
        base = 2 + int.from_bytes(digest[8:]) % (_PRIME - 3)
        factor = pow(base, self.replica, _PRIME)
        if self.replica == 0:
            others = base * (pow(base, self.replicas - 1, _PRIME) - 1) * pow(base - 1, -1, _PRIME)
            factor = -others % _PRIME
        return digest[0] % _BUCKETS, self.sum * factor % _PRIME


class RankPlace(NamedTuple):
    """Where a rank runs."""

    node: str
    name: str


@dataclass(frozen=True)
class Drift:
    """Copies that differ, and whose fault it is."""

    suspects: Sequence[int]
    """Ranks: of copies that a majority contradicts, or else of all copies that differ."""
    sure: bool
    """The fault is on these ranks' hosts, one of them or several: there was a majority, or all suspects share one host."""
    text: str
    """For a person."""


def compare(parts: Iterable[Slice], mesh: Mesh, step: int) -> None:
    """See that all replicas are equal; every rank calls this together.

    Args:
        parts: of this rank; only what has replicas is read.
        step: that they are the state behind, for the message.

    Raises:
        WrongReplica: on all ranks, where copies differ and the host of the wrong one is known: on the ranks of that copy as
            their own error, on the others as one that they have heard of.
        ReplicasDiffer: on all ranks, where it isn't known; as their own error on all that have a copy.
    """
    if mesh.world == 1:
        return
    copies = list(_copies(parts))
    buckets = [0] * _BUCKETS
    for copy in copies:
        place, share = copy.share
        buckets[place] = (buckets[place] + share) % _PRIME
    totals = mesh.reduce(torch.tensor(buckets), dist.ReduceOp.SUM).tolist()
    uneven = {place for place, total in enumerate(totals) if total % _PRIME}
    if not uneven:
        return
    suspicious = [copy for copy in copies if copy.share[0] in uneven]
    name = socket.gethostname()
    held = mesh.gather((RankPlace(os.environ.get("MEGARAY_NODE") or name, name), suspicious))
    drift: Drift | None = mesh.broadcast(judge(held, step) if held is not None else None)
    if drift is None:
        return
    error = WrongReplica(drift.text) if drift.sure else ReplicasDiffer(drift.text)
    raise error if mesh.rank in drift.suspects else exits.mark_as_peers(error)


def judge(held: Sequence[tuple[RankPlace, Sequence[HeldCopy]]], step: int) -> Drift | None:
    """Whose copies are wrong; None where all are equal.

    A copy is wrong where more than half of its tensor's agree on another value. Where no tensor has such a majority, as
    with two copies, all ranks of those that differ are suspects.

    Args:
        held: by rank.
    """
    values: dict[str, dict[int, list[int]]] = {}
    for rank, (_, copies) in enumerate(held):
        for copy in copies:
            values.setdefault(copy.part, {}).setdefault(copy.sum, []).append(rank)
    wrong: dict[str, set[int]] = {}
    differing: dict[str, set[int]] = {}
    for part, ranks in values.items():
        if len(ranks) == 1:
            continue
        everybody = [rank for some in ranks.values() for rank in some]
        most = max(ranks.values(), key=len)
        if 2 * len(most) > len(everybody):
            wrong[part] = {rank for some in ranks.values() if some is not most for rank in some}
        else:
            differing[part] = set(everybody)
    named = wrong or differing
    if not named:
        return None
    suspects = sorted(set().union(*named.values()))
    what = next(iter(named)) + (f" and {len(named) - 1} more" if len(named) > 1 else "")
    hosts = {held[rank][0].node for rank in suspects}
    where = ", ".join(f"rank {rank} on {held[rank][0].name}" for rank in suspects[:_NAMED])
    where += f" and {len(suspects) - _NAMED} more" if len(suspects) > _NAMED else ""
    text = f"the state behind step {step} is wrong: {what} "
    if wrong:
        text += f"of {where} isn't as the other ranks have it; test that device and its memory"
    elif len(hosts) == 1:
        text += f"isn't the same on {where}; test that host's devices and memory"
    else:
        text += f"isn't the same on {where}, and no majority says which is right; test both devices and their memory"
    return Drift(suspects, bool(wrong) or len(hosts) == 1, text)


def _copies(parts: Iterable[Slice]) -> Iterator[HeldCopy]:
    shared = [part for part in parts if part.replicas > 1 and part.tensor.numel()]
    sums = checksums([part.tensor for part in shared])
    for part, total in zip(shared, sums, strict=True):
        group, replica = divmod(part.replica, part.exact or part.replicas)
        box = part.box if part.tensor.ndim else ""  # a count has no box that says anything
        name = f"{part.name}{box}" + (f" in group {group}" if part.exact else "")
        yield HeldCopy(name, replica, part.exact or part.replicas, total)


@torch.no_grad()
def checksums(tensors: Sequence[Tensor]) -> list[int]:
    """Sums of tensors' bits weighted by position, modulo 2**64, computed where the tensors lie; the host waits once.

    Many small tensors are summed together: a model has thousands, and each kernel costs the host its launch.
    """
    totals = [0] * len(tensors)
    owners: list[int] = []
    sums: list[Tensor] = []
    for batch in _batches(tensors):
        owners += [owner for owner, _ in batch]
        sums.append(_summed([flat for _, flat in batch]))
    device = sums[0].device if sums else None
    values = torch.cat([some.to(device) for some in sums]).tolist() if sums else []
    for owner, value in zip(owners, values, strict=True):
        # The stretches of a long tensor count in their order.
        totals[owner] = (totals[owner] * _ODD + value) & _WORD
    return totals


def _batches(tensors: Sequence[Tensor]) -> Iterator[list[tuple[int, Tensor]]]:
    """Stretches of tensors, each with the tensor's number, in order: as many as may be summed at once, of one kind."""
    batch: list[tuple[int, Tensor]] = []
    kind: tuple[torch.device, torch.dtype] | None = None
    room = 0
    for owner, tensor in enumerate(tensors):
        flat = tensor.detach().reshape(-1).view(_BITS[tensor.element_size()])
        for stretch in flat.split(_STRETCH):
            if batch and (stretch.numel() > room or kind != (stretch.device, stretch.dtype)):
                yield batch
                batch = []
            if not batch:
                kind, room = (stretch.device, stretch.dtype), _STRETCH
            batch.append((owner, stretch))
            room -= stretch.numel()
    if batch:
        yield batch


def _summed(flats: Sequence[Tensor]) -> Tensor:
    """Sums of stretches, [stretches] int64, wrapping, so that differences of running sums are exact.

    The weights are odd, differ, and are below 2**21: one flipped bit changes the sum for sure, and so do two where elements
    have up to 4 bytes.
    """
    sizes = torch.tensor([flat.numel() for flat in flats])
    device = flats[0].device
    odd = torch.arange(1, 2 * int(sizes.max()), 2, device=device)
    weights = odd if len(flats) == 1 else torch.cat([odd[:size] for size in sizes.tolist()])
    so_far = (torch.cat(list(flats)).long() * weights).cumsum(0)
    return so_far[(sizes.cumsum(0) - 1).to(device)].diff(prepend=so_far.new_zeros(1))
