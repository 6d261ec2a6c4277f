"""The engine on torch's own parts: FSDP2, process groups, `torch.distributed.pipelining`. Home of every axis.

Masters, accumulated gradients and reductions are fp32. The master of a parameter is FSDP's shard of it; under bf16 the
weights that matmuls use are cast while they are gathered.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from configs.schema import RunConfig
from trainer.engines import common
from trainer.engines.base import Batch, DataPlace, Phases, StepResult, never
from trainer.model.decoder import DecoderStage, inputs
from trainer.model.initial import kind
from trainer.model.seams import MicroBatch, Tally
from trainer.optim.build import build
from trainer.optim.common import copy_masters_to_weights
from trainer.optim.shards import ComputeWeight, ParameterShard, StagePeers
from trainer.parallel import apply
from trainer.parallel.context import token_positions
from trainer.parallel.exchange import all_reduce_packed
from trainer.parallel.mesh import Mesh, collective_timeout
from trainer.parallel.resident import Resident
from trainer.parallel.stages import reduce_now, split_layers, stages_of
from trainer.sizing.search.runnable import chunks_of
from trainer.state import Box, Slice

if TYPE_CHECKING:
    from trainer.parallel.pipeline import Pipeline


class NativeEngine:
    """Trains one rank's share of a model under any layout."""

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.place = DataPlace(mesh["dp"].index, mesh["dp"].size)
        self._dtype = common.DTYPES[str(config.train.precision)]
        self._stages: list[DecoderStage] = []
        self._partitions: list[dict[str, apply.Partition]] = []
        self._residents: list[Resident] = []
        """By stage."""
        parallel, model = config.parallel, config.model
        ends = split_layers(model.layers, mesh["pp"].size * chunks_of(parallel))
        for index in stages_of(parallel, mesh["pp"].index):
            with torch.device("meta"):
                stage = DecoderStage(model, *ends[index])
            self._partitions.append(apply.parallelize(stage, mesh, config))
            whole = apply.shard(stage, mesh, config)
            masters = apply.materialize(stage, self._partitions[-1], config, mesh, whole)
            dense = [name for name in masters if not self._partitions[-1][name].sparse]
            self._residents.append(Resident(stage, masters, dense, mesh["dp_cp"]))
            self._stages.append(stage)
        self._pipeline: Pipeline | None = None
        if mesh["pp"].size > 1:
            from trainer.parallel.pipeline import Pipeline  # slow to import

            self._pipeline = Pipeline(self._stages, mesh, model, parallel)
        self._alike: list[bool] = []
        """By shard: whether tp ranks have the same and see other tokens."""
        self._second: list[bool] = []
        """By shard: whether it is the embedding's copy beside the head."""
        self._exact: list[int] = []
        """By shard: `Slice.exact`."""
        self._parameters, self._shards = self._make_shards()
        self._ends = self._end_group()
        precision = config.train.precision or "fp32"
        self._optimizer = build(config.optim, model.hidden, self._shards, self._peers(), precision)
        self._applied = next(t for name, t, _ in self._optimizer.state() if name == "optimizer/step")
        self._positions = token_positions(
            config.data.sequence, parallel.context, mesh["cp"].size, mesh["cp"].index, mesh.device
        )

    # ---- what the optimizer sees ----

    def _make_shards(self) -> tuple[list[nn.Parameter], list[ParameterShard]]:
        """Parameters of all stages on this rank, and how the optimizer sees them.

        Where the embedding has a copy beside the head on this very rank, the copies are replicas of each other.
        """
        parameters, shards = [], []
        tp, data, both = self.mesh["tp"], self.mesh["dp_cp"], self.config.parallel.schedule == "zbv"
        for stage, partitions, resident in zip(self._stages, self._partitions, self._residents, strict=True):
            for name, parameter in stage.named_parameters():
                local, box = apply.local_part(parameter, partitions[name], self.mesh)
                weight, exact = None, 0
                index, size = (tp.index, tp.size) if partitions[name].alike else (0, 1)
                if name in resident.masters:
                    local, weight = resident.masters[name], ComputeWeight(resident.weight(name))
                    if not partitions[name].sparse:
                        # Each group of tp sums for itself, and three numbers or more in an order of its own.
                        exact = size if size > 2 else 0
                        index, size = index + size * data.index, size * data.size
                if both and self._is_copied(name):
                    index, size = index + size * (stage.first != 0), 2 * size
                shards.append(ParameterShard(name, local, box, kind(name), index, size, weight))
                parameters.append(parameter)
                self._exact.append(exact)
                self._alike.append(partitions[name].alike)
                self._second.append(self._is_copied(name) and stage.first != 0)
        return parameters, shards

    def _is_copied(self, name: str) -> bool:
        model = self.config.model
        return (
            name == "embedding.weight"
            and self.mesh["pp"].size > 1
            and bool(model.tie_embeddings or model.mtp_layers)
        )

    def _end_group(self) -> dist.ProcessGroup | None:
        """Communicator of the two ranks that hold the embedding's copies; None where one rank holds both or none does."""
        pp = self.mesh["pp"]
        first, last = pp.ranks[0], pp.ranks[-1]
        if not self._is_copied("embedding.weight") or self.config.parallel.schedule == "zbv":
            return None
        if self.mesh.rank not in (first, last):
            return None
        return dist.new_group(
            [first, last], timeout=collective_timeout(self.config), use_local_synchronization=True
        )

    def _peers(self) -> StagePeers:
        stage = self.mesh["stage"]
        mine = [(s.name, s.box, s.replica, s.replicas) for s in self._shards]
        if stage.size == 1:
            return StagePeers(None, 0, 1, [mine])
        everybody: list[list[tuple[str, Box, int, int]]] = [[] for _ in stage.ranks]
        dist.all_gather_object(everybody, mine, group=stage.process_group)
        return StagePeers(stage.process_group, stage.index, stage.size, everybody)

    # ---- steps ----

    def step(
        self,
        batches: Sequence[Batch],
        samples: int,
        lr: float,
        phase: Phases,
        stopping: Callable[[], bool] = never,
    ) -> StepResult:
        """One optimizer step (see `trainer.engines.base.Engine`)."""
        tally = Tally()
        micros = common.micros(batches, samples, self._positions, tally)
        loss = self._learn(micros, phase)
        with phase("optimizer"):
            norm = self._gradients(stopping())
            factor, skip = common.clipping(norm[0], self.config.optim.clip)
            self._optimizer.step(lr, factor, skip)
            numbers, world = (self._applied, skip), self.mesh.world
            load = common.balance(self._stages, self.config.model, tally, numbers, world)
            for parameter, shard in zip(self._parameters, self._shards, strict=True):
                # A shard's tensor may be another than the parameter: both would keep a gradient while the next one is made.
                parameter.grad = None
                shard.clear_gradient()
        return common.result(loss, tally, norm, skip, load)

    def _learn(self, micros: Sequence[MicroBatch], phase: Phases) -> Tensor:
        """Forward and backward; this rank's share of the loss. Gradients end up reduced, in the parameters' `grad`."""
        each = self.config.parallel.zero >= 2
        if self._pipeline is not None:
            each = each and self.config.parallel.schedule != "zbv"
            for stage in self._stages:
                _reduce_in_backward(stage, each, give_back=each)
            with phase("forward"):  # the schedule mixes both
                loss = self._pipeline.run(micros, self._dtype, learn=True)
            if not each:
                for stage in self._stages:
                    reduce_now(stage)
            return loss
        (stage,) = self._stages
        self._residents[0].begin(len(micros))
        losses = []
        for index, micro in enumerate(micros):
            last = index == len(micros) - 1
            _reduce_in_backward(stage, each or last, give_back=last or self.config.parallel.zero == 3)
            with phase("forward"):
                share = stage(inputs(micro), micro)
            with phase("backward"):
                share.backward()
            losses.append(share.detach())
        return torch.stack(losses).sum()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], samples: int) -> Tensor:
        """This rank's share of the mean cross-entropy over `samples`."""
        tally = Tally(muted=True)
        micros = common.micros(batches, samples, self._positions, tally)
        if self._pipeline is not None:
            return self._pipeline.run(micros, self._dtype, learn=False)
        (stage,) = self._stages
        shares = [stage(inputs(m), m).detach() for m in micros]
        return torch.stack(shares).sum()

    def _gradients(self, stopping: bool) -> tuple[Tensor, Tensor]:
        """Give the optimizer's shards their gradients; the global norm, and the wishes to stop."""
        taken = self._residents[0].take()
        for parameter, shard in zip(self._parameters, self._shards, strict=True):
            gradient = parameter.grad if shard.compute_weight is None else taken[shard.name]
            if gradient is None:
                gradient = torch.zeros_like(shard.tensor)
            shard.set_gradient(gradient.to_local() if isinstance(gradient, DTensor) else gradient)
        if self.mesh["tp"].size > 1:
            alike = [shard for shard, same in zip(self._shards, self._alike, strict=True) if same]
            mine = [shard.gradient for shard in alike if shard.gradient is not None]
            for shard, total in zip(alike, all_reduce_packed(mine, self.mesh["tp"]), strict=True):
                shard.set_gradient(total)
        self._sum_copies()
        counted = [
            shard.gradient
            for shard, second in zip(self._shards, self._second, strict=True)
            if shard.replica == 0 and not second and shard.tensor.numel() and shard.gradient is not None
        ]
        return common.global_norm(counted, self.mesh.world, self.mesh.device, stopping)

    def _sum_copies(self) -> None:
        """Add up the gradients of the embedding's copies on the first and the last stage."""
        copies = [shard for shard in self._shards if self._is_copied(shard.name)]
        gradients = [shard.tensor.grad for shard in copies if shard.tensor.grad is not None]
        if len(gradients) == 2:
            both = gradients[0] + gradients[1]
            for gradient in gradients:
                gradient.copy_(both)
        elif gradients and self._ends is not None:
            dist.all_reduce(gradients[0], group=self._ends)

    # ---- state ----

    def state(self) -> Iterator[Slice]:
        """Masters, the optimizer's moments and router biases, by name."""
        place = {id(shard): number for number, shard in enumerate(self._shards)}
        for number, shard in enumerate(self._shards):
            yield self._slice(shard.name, shard.tensor, number)
        for part, tensor, owner in self._optimizer.state():
            if owner is None:
                yield common.replicated(part, tensor, self.mesh.rank, self.mesh.world)
            else:
                yield self._slice(f"{owner.name}/{part}", tensor, place[id(owner)])
        stage = self.mesh["stage"]
        for module in self._stages:
            for name, buffer in module.named_buffers():
                yield common.replicated(name, buffer, stage.index, stage.size)

    def _slice(self, name: str, tensor: Tensor, number: int) -> Slice:
        shard, copied = self._shards[number], self._is_copied(self._shards[number].name)
        index, size = shard.replica, shard.replicas
        if copied and self.config.parallel.schedule != "zbv":
            index, size = index + size * self._second[number], 2 * size
        return Slice(name, tensor, shard.box, index, size, self._exact[number])

    def loaded(self) -> None:
        """Drop weights that were gathered or cast before the state was overwritten."""
        copy_masters_to_weights(self._shards)
        for stage in self._stages:
            for module in apply.sharded(stage):
                module.reshard()


def _reduce_in_backward(stage: DecoderStage, reduce: bool, give_back: bool) -> None:
    """Whether the backward passes that follow reduce gradients, and give gathered weights back."""
    for module in apply.sharded(stage):
        module.set_requires_gradient_sync(reduce, recurse=False)
        module.set_is_last_backward(reduce)
        module.set_reshard_after_backward(give_back, recurse=False)
