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
    check_masters,
    check_peers,
    chunk_elements,
    chunk_ranges,
    copy_masters_to_weights,
    device_of,
    gradient_or_zeros,
    hyperparameters,
    moment_dtype,
)
from trainer.optim.matrix_exchange import ExchangeLayout, MatrixBucket, plan_buckets
from trainer.optim.shards import ParameterShard, StagePeers

BUCKET = 1 << 26
"""Elements that a rank holds and owns in a bucket: with both exchanges, the next bucket's parts and what an iteration
needs, at most 1.2 GiB of scratch in fp32, half of that in bf16. An H100 takes a third longer at a quarter of it."""
_A, _B, _C = 3.4445, -4.7750, 2.0315
_TINY = 1e-7


def orthogonalize(matrices_LMN: Tensor, steps: int) -> Tensor:
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
class _MomentumState:
    """A matrix shard with its momentum."""

    shard: ParameterShard
    momentum: Tensor


@dataclass(frozen=True)
class _PendingExchange:
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
    """The protocol `trainer.optim.shards.Optimizer`."""

    def __init__(
        self,
        shards: Sequence[ParameterShard],
        optim: OptimConfig,
        width: int,
        peers: StagePeers,
        dtype: torch.dtype = torch.float32,
        bucket: int = BUCKET,
    ) -> None:
        """Plan who works on what, with moments of zero.

        Args:
            width: of the model.
            dtype: that matrices are exchanged and multiplied in; bf16 is for tensor cores, see `orthogonalize`.
            bucket: elements that a rank holds and owns of the matrices that are worked on at a time.
        """
        check_masters(shards)
        check_peers(shards, peers)
        self._optim, self._peers, self._dtype = optim, peers, dtype
        self._hyper = hyperparameters("matrix", optim, width)
        kept = moment_dtype(optim)
        self._states = {
            number: _MomentumState(shard, torch.zeros_like(shard.tensor, dtype=kept))
            for number, shard in enumerate(shards)
            if shard.kind == "matrix"
        }
        self._adamw = AdamW(
            [shard for shard in shards if shard.kind != "matrix"], optim, width, device_of(shards)
        )
        self._device = device_of(shards)
        self._buckets = plan_buckets(peers, {shard.name: shard.kind for shard in shards}, bucket)
        self._targets = [self._result_targets(bucket) for bucket in self._buckets]

    @torch.no_grad()
    def step(self, lr: float, factor: Tensor, skip: Tensor) -> None:
        """Update the masters (see the protocol). Ranks of the stage step together."""
        skipped = skip != 0
        updates = {
            number: self._nesterov(state, factor, skipped)
            for number, state in self._states.items()
            if state.shard.tensor.numel()
        }
        rate = lr * self._hyper.lr_scale
        if updates:
            left = torch.where(skipped, 1.0, 1 - rate * self._hyper.weight_decay)
            torch._foreach_mul_([self._states[number].shard.tensor for number in updates], left)
        pending: _PendingExchange | None = None
        for number, bucket in enumerate(self._buckets):
            now = pending or self._send_parts(bucket, updates)
            parts = now.wait()
            # The next bucket's parts are under way while this one's matrices are multiplied.
            pending = (
                self._send_parts(self._buckets[number + 1], updates)
                if number + 1 < len(self._buckets)
                else None
            )
            results = self._send_results(bucket, self._orthogonalize_owned(bucket, parts))
            self._apply_results(number, results.wait(), rate, skipped)
        copy_masters_to_weights(state.shard for state in self._states.values())
        self._adamw.step(lr, factor, skip)

    def state(self) -> Iterator[tuple[str, Tensor, ParameterShard | None]]:
        """Momentum of matrices, moments of the rest, and the count of applied steps."""
        for state in self._states.values():
            yield "momentum", state.momentum, state.shard
        yield from self._adamw.state()

    def _nesterov(self, state: _MomentumState, factor: Tensor, skipped: Tensor) -> Tensor:
        """The shard's next momentum, and in its gradient's place what is orthogonalised: [matrices, rows, columns]."""
        grad, decay = gradient_or_zeros(state.shard), self._optim.momentum
        kept = torch.where(skipped, 1.0, decay)
        flat, momentum = grad.view(-1), state.momentum.view(-1)
        for start, end in chunk_ranges(flat.numel(), chunk_elements(flat.device)):
            part, buffer = flat[start:end], momentum[start:end]
            # Adding -0 changes nothing, not even the sign of a 0: a skipped step leaves the momentum's bits.
            part.mul_(factor).masked_fill_(skipped, -0.0)
            after = torch.addcmul(part, buffer, kept)
            buffer.copy_(after)
            part.add_(after, alpha=decay)
        return grad.view(-1, *grad.shape[-2:])

    def _send_parts(self, bucket: MatrixBucket, updates: dict[int, Tensor]) -> _PendingExchange:
        """Start to send this rank's parts of a bucket to their owners."""
        parts = [updates[part.shard][part.index] for _, part in bucket.part_sends.parts]
        return self._exchange(parts, bucket.part_sends, bucket.part_receives, bucket.communicates)

    def _orthogonalize_owned(self, bucket: MatrixBucket, received: Tensor) -> list[Tensor]:
        """Results of the bucket's own matrices, put together from the parts that were received."""
        by_shape: dict[tuple[int, int], list[int]] = {}
        for position, matrix in enumerate(bucket.owned):
            by_shape.setdefault(matrix.shape, []).append(position)
        matrices = [received] * len(bucket.owned)
        batches = []
        for shape, positions in by_shape.items():
            batches.append(received.new_empty(len(positions), *shape))
            for position, block in zip(positions, batches[-1].unbind(), strict=True):
                matrices[position] = block
        if bucket.part_receives.parts:
            blocks = [
                matrices[position][slice(*p.rows), slice(*p.columns)]
                for position, p in bucket.part_receives.parts
            ]
            torch._foreach_copy_(blocks, _views(received, bucket.part_receives))
        for batch, positions in zip(batches, by_shape.values(), strict=True):
            results = orthogonalize(batch, self._optim.orthogonal_steps)
            for position, result in zip(positions, results.unbind(), strict=True):
                matrices[position] = result
        return matrices

    def _send_results(self, bucket: MatrixBucket, results: list[Tensor]) -> _PendingExchange:
        """Start to send results to all holders of the owned matrices."""
        parts = [
            results[position][slice(*part.rows), slice(*part.columns)]
            for position, part in bucket.result_sends.parts
        ]
        return self._exchange(parts, bucket.result_sends, bucket.result_receives, bucket.communicates)

    def _exchange(
        self, parts: list[Tensor], out: ExchangeLayout, into: ExchangeLayout, communicates: bool
    ) -> _PendingExchange:
        sent = torch.empty(sum(out.split_sizes), dtype=self._dtype, device=self._device)
        if parts:
            torch._foreach_copy_(_views(sent, out), parts)
        if not communicates:
            return _PendingExchange(sent, sent, None)
        buffer = sent.new_empty(sum(into.split_sizes))
        work = dist.all_to_all_single(
            buffer, sent, into.split_sizes, out.split_sizes, group=self._peers.group, async_op=True
        )
        return _PendingExchange(buffer, sent, work)

    def _apply_results(self, number: int, results: Tensor, rate: float, skipped: Tensor) -> None:
        """Add a bucket's results to this rank's values."""
        targets, scales = self._targets[number]
        if not targets:
            return
        # Adding -rate * 0 = -0 changes nothing where the step is skipped.
        updates = _views(results.float().masked_fill_(skipped, 0.0), self._buckets[number].result_receives)
        torch._foreach_mul_(updates, scales)
        torch._foreach_add_(targets, updates, alpha=-rate)

    def _result_targets(self, bucket: MatrixBucket) -> tuple[list[Tensor], list[float]]:
        """Views of the values that a bucket's results update, with their factors: an update's rms is 0.2, AdamW's."""
        targets, scales = [], []
        for _, part in bucket.result_receives.parts:
            shard = self._states[part.shard].shard
            targets.append(shard.tensor.detach().view(-1, *shard.tensor.shape[-2:])[part.index])
            scales.append(0.2 * math.sqrt(max(shard.box.whole[-2:])))
        return targets, scales


def _views(buffer: Tensor, layout: ExchangeLayout) -> list[Tensor]:
    """The parts in an exchange's buffer, as blocks of rows and columns."""
    pieces = buffer.split([part.elements for _, part in layout.parts])
    return [piece.view(part.shape) for piece, (_, part) in zip(pieces, layout.parts, strict=True)]
