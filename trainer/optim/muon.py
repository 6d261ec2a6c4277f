"""Muon (Jordan et al. 2024; scaled as in Liu et al. 2025, "Muon is scalable") for matrices, AdamW for the rest.

Matrices that span ranks are sent whole to one rank each, which orthogonalises them and sends the results back, as
ZAYA1's training does (Zyphra 2025): exact whatever the sharding, and each matrix is worked on once.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from configs.training import OptimConfig
from trainer.optim.adamw import AdamW
from trainer.optim.common import (
    check,
    check_names,
    chunk_of,
    device_of,
    gradient,
    moment_dtype,
    ranges,
    rate_of,
    refresh,
)
from trainer.optim.routes import ExchangeLane, Route, plan
from trainer.optim.slots import Slot, StagePeers

BUCKET = 1 << 26
"""Elements that a rank holds and owns in a bucket: with both exchanges, the next bucket's parts and what an iteration
needs, at most 1.2 GiB of scratch in fp32, half of that in bf16. An H100 takes a third longer at a quarter of it."""
_A, _B, _C = 3.4445, -4.7750, 2.0315
_TINY = 1e-7


def orthogonal(matrices_LMN: Tensor, steps: int) -> Tensor:
    """Nearly the nearest (semi-)orthogonal matrix of each, by a quintic Newton-Schulz iteration in the tensor's own type.

    After five steps singular values are between about 0.7 and 1.2, but for those that were under about 1/500 of the
    Frobenius norm. In bf16 the result differs from that in fp32 by a few percent of its norm, less than from an orthogonal
    one.
    """
    tall = matrices_LMN.shape[-2] > matrices_LMN.shape[-1]
    x_LMN = matrices_LMN.mT if tall else matrices_LMN
    norms_L11 = torch.linalg.vector_norm(x_LMN, dim=(-2, -1), keepdim=True, dtype=torch.float32)
    x_LMN = (x_LMN / (norms_L11 + _TINY)).to(matrices_LMN.dtype)
    for _ in range(steps):
        gram_LMM = x_LMN @ x_LMN.mT
        polynomial_LMM = torch.baddbmm(gram_LMM, gram_LMM, gram_LMM, beta=_B, alpha=_C)
        x_LMN = torch.baddbmm(x_LMN, polynomial_LMM, x_LMN, beta=_A)
    return x_LMN.mT if tall else x_LMN


@dataclass(frozen=True)
class _Row:
    """A matrix slot with its momentum."""

    slot: Slot
    momentum: Tensor


@dataclass(frozen=True)
class _Arriving:
    """A buffer that an exchange fills; what is sent lives as long as it does."""

    buffer: Tensor
    sent: Tensor
    work: dist.Work | None

    def wait(self) -> Tensor:
        """The filled buffer; on CUDA the stream waits, not the host."""
        if self.work is not None:
            self.work.wait()
        return self.buffer


class Muon:
    """The protocol `trainer.optim.slots.Optimizer`."""

    def __init__(
        self,
        slots: Sequence[Slot],
        optim: OptimConfig,
        width: int,
        peers: StagePeers,
        dtype: torch.dtype = torch.float32,
        bucket: int = BUCKET,
    ) -> None:
        """Plan who works on what, with moments of zero.

        Args:
            width: of the model.
            dtype: that matrices travel and are multiplied in; bf16 is for tensor cores, see `orthogonal`.
            bucket: elements that a rank holds and owns of the matrices that are worked on at a time.
        """
        check(slots)
        check_names(slots, peers)
        self._optim, self._peers, self._dtype = optim, peers, dtype
        self._rate = rate_of("matrix", optim, width)
        kept = moment_dtype(optim)
        self._rows = {
            number: _Row(slot, torch.zeros_like(slot.tensor, dtype=kept))
            for number, slot in enumerate(slots)
            if slot.kind == "matrix"
        }
        self._rest = AdamW([slot for slot in slots if slot.kind != "matrix"], optim, width, device_of(slots))
        self._device = device_of(slots)
        self._routes = plan(peers, {slot.name: slot.kind for slot in slots}, bucket)
        self._targets = [self._values(route) for route in self._routes]

    @torch.no_grad()
    def step(self, lr: float, factor: Tensor, skip: Tensor) -> None:
        """Move the masters; see the protocol. Ranks of the stage step together."""
        stopped = skip != 0
        updates = {
            number: self._nesterov(row, factor, stopped)
            for number, row in self._rows.items()
            if row.slot.tensor.numel()
        }
        rate = lr * self._rate.scale
        if updates:
            left = torch.where(stopped, 1.0, 1 - rate * self._rate.decay)
            torch._foreach_mul_([self._rows[number].slot.tensor for number in updates], left)
        arriving: _Arriving | None = None
        for number, route in enumerate(self._routes):
            now = arriving or self._give(route, updates)
            parts = now.wait()
            # The next bucket's parts are under way while this one's matrices are multiplied.
            arriving = (
                self._give(self._routes[number + 1], updates) if number + 1 < len(self._routes) else None
            )
            results = self._return(route, self._orthogonalised(route, parts))
            self._land(number, results.wait(), rate, stopped)
        refresh(row.slot for row in self._rows.values())
        self._rest.step(lr, factor, skip)

    def state(self) -> Iterator[tuple[str, Tensor, Slot | None]]:
        """Momentum of matrices, moments of the rest, and the count of applied steps."""
        for row in self._rows.values():
            yield "momentum", row.momentum, row.slot
        yield from self._rest.state()

    def _nesterov(self, row: _Row, factor: Tensor, stopped: Tensor) -> Tensor:
        """The slot's next momentum, and in its gradient's place what is orthogonalised: [matrices, rows, columns]."""
        grad, decay = gradient(row.slot), self._optim.momentum
        kept = torch.where(stopped, 1.0, decay)
        flat, momentum = grad.view(-1), row.momentum.view(-1)
        for start, end in ranges(flat.numel(), chunk_of(flat.device)):
            part, buffer = flat[start:end], momentum[start:end]
            # Adding -0 changes nothing, not even the sign of a 0: a skipped step leaves the momentum's bits.
            part.mul_(factor).masked_fill_(stopped, -0.0)
            after = torch.addcmul(part, buffer, kept)
            buffer.copy_(after)
            part.add_(after, alpha=decay)
        return grad.view(-1, *grad.shape[-2:])

    def _give(self, route: Route, updates: dict[int, Tensor]) -> _Arriving:
        """Start to send this rank's parts of a bucket to their owners."""
        parts = [updates[part.slot][part.index] for _, part in route.gives.parts]
        return self._exchange(parts, route.gives, route.takes, route.travels)

    def _orthogonalised(self, route: Route, received: Tensor) -> list[Tensor]:
        """Results of the route's own matrices, put together from the parts that were received."""
        by_shape: dict[tuple[int, int], list[int]] = {}
        for place, unit in enumerate(route.owned):
            by_shape.setdefault(unit.shape, []).append(place)
        matrices = [received] * len(route.owned)
        batches = []
        for shape, places in by_shape.items():
            batches.append(received.new_empty(len(places), *shape))
            for place, matrix in zip(places, batches[-1].unbind(), strict=True):
                matrices[place] = matrix
        if route.takes.parts:
            blocks = [matrices[place][slice(*p.rows), slice(*p.columns)] for place, p in route.takes.parts]
            torch._foreach_copy_(blocks, _views(received, route.takes))
        for batch, places in zip(batches, by_shape.values(), strict=True):
            results = orthogonal(batch, self._optim.orthogonal_steps)
            for place, result in zip(places, results.unbind(), strict=True):
                matrices[place] = result
        return matrices

    def _return(self, route: Route, results: list[Tensor]) -> _Arriving:
        """Start to send results to all holders of the owned matrices."""
        parts = [
            results[place][slice(*part.rows), slice(*part.columns)] for place, part in route.returns.parts
        ]
        return self._exchange(parts, route.returns, route.lands, route.travels)

    def _exchange(
        self, parts: list[Tensor], out: ExchangeLane, into: ExchangeLane, travels: bool
    ) -> _Arriving:
        sent = torch.empty(sum(out.counts), dtype=self._dtype, device=self._device)
        if parts:
            torch._foreach_copy_(_views(sent, out), parts)
        if not travels:
            return _Arriving(sent, sent, None)
        buffer = sent.new_empty(sum(into.counts))
        work = dist.all_to_all_single(
            buffer, sent, into.counts, out.counts, group=self._peers.group, async_op=True
        )
        return _Arriving(buffer, sent, work)

    def _land(self, number: int, results: Tensor, rate: float, stopped: Tensor) -> None:
        """Add a bucket's results to this rank's values."""
        targets, scales = self._targets[number]
        if not targets:
            return
        # Adding -rate * 0 = -0 changes nothing where the step is skipped.
        updates = _views(results.float().masked_fill_(stopped, 0.0), self._routes[number].lands)
        torch._foreach_mul_(updates, scales)
        torch._foreach_add_(targets, updates, alpha=-rate)

    def _values(self, route: Route) -> tuple[list[Tensor], list[float]]:
        """Views of the values that a route's results land on, with their factors: an update's rms is 0.2, AdamW's."""
        targets, scales = [], []
        for _, part in route.lands.parts:
            slot = self._rows[part.slot].slot
            targets.append(slot.tensor.detach().view(-1, *slot.tensor.shape[-2:])[part.index])
            scales.append(0.2 * math.sqrt(max(slot.box.whole[-2:])))
        return targets, scales


def _views(buffer: Tensor, lane: ExchangeLane) -> list[Tensor]:
    """A lane's parts in its buffer, as blocks of rows and columns."""
    pieces = buffer.split([part.elements for _, part in lane.parts])
    return [piece.view(part.shape) for piece, (_, part) in zip(pieces, lane.parts, strict=True)]
