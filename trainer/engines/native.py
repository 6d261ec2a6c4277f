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
from trainer.engines.base import Batch, DataParallelRank, PhaseRecorder, StepResult, never_stop
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
        self.data_parallel = DataParallelRank(mesh["dp"].index, mesh["dp"].size)
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
        self._tp_replicated: list[bool] = []
        """By shard: whether tp ranks have copies of it that see different tokens, so that their gradients are summed."""
        self._tied_copy: list[bool] = []
        """By shard: whether it is the last stage's copy of the embedding."""
        self._exact: list[int] = []
        """By shard: `Slice.exact`."""
        self._parameters, self._shards = self._make_shards()
        self._embedding_group = self._make_embedding_group()
        precision = config.train.precision or "fp32"
        self._optimizer = build(config.optim, model.hidden, self._shards, self._peers(), precision)
        self._applied_steps = next(t for name, t, _ in self._optimizer.state() if name == "optimizer/step")
        self._positions = token_positions(
            config.data.sequence, parallel.context, mesh["cp"].size, mesh["cp"].index, mesh.device
        )

    # ---- shards for the optimizer ----

    def _make_shards(self) -> tuple[list[nn.Parameter], list[ParameterShard]]:
        """Parameters of all stages on this rank, and their shards for the optimizer.

        Where this rank has the embedding and its copy beside the head, they are replicas of each other.
        """
        parameters, shards = [], []
        tp, data, both_ends = self.mesh["tp"], self.mesh["dp_cp"], self.config.parallel.schedule == "zbv"
        for stage, partitions, resident in zip(self._stages, self._partitions, self._residents, strict=True):
            for name, parameter in stage.named_parameters():
                local, box = apply.local_part(parameter, partitions[name], self.mesh)
                weight, exact = None, 0
                replica, replicas = (tp.index, tp.size) if partitions[name].alike else (0, 1)
                if name in resident.masters:
                    local, weight = resident.masters[name], ComputeWeight(resident.weight(name))
                    if not partitions[name].sparse:
                        # Each tp group reduces by itself: sums of three numbers or more may differ in a last bit.
                        exact = replicas if replicas > 2 else 0
                        replica, replicas = replica + replicas * data.index, replicas * data.size
                if both_ends and self._is_embedding_copy(name):
                    replica, replicas = replica + replicas * (stage.first != 0), 2 * replicas
                shards.append(ParameterShard(name, local, box, kind(name), replica, replicas, weight))
                parameters.append(parameter)
                self._exact.append(exact)
                self._tp_replicated.append(partitions[name].alike)
                self._tied_copy.append(self._is_embedding_copy(name) and stage.first != 0)
        return parameters, shards

    def _is_embedding_copy(self, name: str) -> bool:
        model = self.config.model
        return (
            name == "embedding.weight"
            and self.mesh["pp"].size > 1
            and bool(model.tie_embeddings or model.mtp_layers)
        )

    def _make_embedding_group(self) -> dist.ProcessGroup | None:
        """Communicator of the two ranks that hold the embedding's copies; None where one rank holds both or none does."""
        pp = self.mesh["pp"]
        first, last = pp.ranks[0], pp.ranks[-1]
        if not self._is_embedding_copy("embedding.weight") or self.config.parallel.schedule == "zbv":
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
        by_rank: list[list[tuple[str, Box, int, int]]] = [[] for _ in stage.ranks]
        dist.all_gather_object(by_rank, mine, group=stage.process_group)
        return StagePeers(stage.process_group, stage.index, stage.size, by_rank)

    # ---- steps ----

    def step(
        self,
        batches: Sequence[Batch],
        samples: int,
        lr: float,
        phase: PhaseRecorder,
        stop_requested: Callable[[], bool] = never_stop,
    ) -> StepResult:
        """One optimizer step (see `trainer.engines.base.Engine`)."""
        tally = Tally()
        micros = common.micro_batches(batches, samples, self._positions, tally)
        loss = self._forward_backward(micros, phase)
        with phase("optimizer"):
            norm = self._collect_gradients(stop_requested())
            factor, skip = common.clip_factor_and_skip(norm[0], self.config.optim.clip)
            self._optimizer.step(lr, factor, skip)
            counts, world = (self._applied_steps, skip), self.mesh.world
            load = common.balance_experts(self._stages, self.config.model, tally, counts, world)
            for parameter, shard in zip(self._parameters, self._shards, strict=True):
                # A shard's tensor may be another than the parameter: both would keep a gradient while the next one is made.
                parameter.grad = None
                shard.clear_gradient()
        return common.step_result(loss, tally, norm, skip, load)

    def _forward_backward(self, micros: Sequence[MicroBatch], phase: PhaseRecorder) -> Tensor:
        """Forward and backward passes; this rank's share of the loss. The parameters' `grad` are reduced afterwards."""
        reduce_each = self.config.parallel.zero >= 2
        if self._pipeline is not None:
            reduce_each = reduce_each and self.config.parallel.schedule != "zbv"
            for stage in self._stages:
                _set_backward_sync(stage, reduce_each, reshard=reduce_each)
            with phase("forward"):  # the schedule mixes both
                loss = self._pipeline.run(micros, self._dtype, learn=True)
            if not reduce_each:
                for stage in self._stages:
                    reduce_now(stage)
            return loss
        (stage,) = self._stages
        self._residents[0].begin(len(micros))
        losses = []
        for index, micro in enumerate(micros):
            last = index == len(micros) - 1
            _set_backward_sync(stage, reduce_each or last, reshard=last or self.config.parallel.zero == 3)
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
        micros = common.micro_batches(batches, samples, self._positions, tally)
        if self._pipeline is not None:
            return self._pipeline.run(micros, self._dtype, learn=False)
        (stage,) = self._stages
        shares = [stage(inputs(m), m).detach() for m in micros]
        return torch.stack(shares).sum()

    def _collect_gradients(self, stop_requested: bool) -> tuple[Tensor, Tensor]:
        """Set the reduced gradients of the optimizer's shards; the global norm, and how many ranks were asked to stop."""
        accumulated = self._residents[0].take()
        for parameter, shard in zip(self._parameters, self._shards, strict=True):
            gradient = parameter.grad if shard.compute_weight is None else accumulated[shard.name]
            if gradient is None:
                gradient = torch.zeros_like(shard.tensor)
            shard.set_gradient(gradient.to_local() if isinstance(gradient, DTensor) else gradient)
        if self.mesh["tp"].size > 1:
            alike = [shard for shard, same in zip(self._shards, self._tp_replicated, strict=True) if same]
            mine = [shard.gradient for shard in alike if shard.gradient is not None]
            for shard, total in zip(alike, all_reduce_packed(mine, self.mesh["tp"]), strict=True):
                shard.set_gradient(total)
        self._all_reduce_embedding_gradients()
        counted = [
            shard.gradient
            for shard, copy in zip(self._shards, self._tied_copy, strict=True)
            if shard.replica == 0 and not copy and shard.tensor.numel() and shard.gradient is not None
        ]
        return common.global_norm(counted, self.mesh.world, self.mesh.device, stop_requested)

    def _all_reduce_embedding_gradients(self) -> None:
        """Add up the gradients of the embedding's copies on the first and the last stage."""
        copies = [shard for shard in self._shards if self._is_embedding_copy(shard.name)]
        gradients = [shard.tensor.grad for shard in copies if shard.tensor.grad is not None]
        if len(gradients) == 2:
            total = gradients[0] + gradients[1]
            for gradient in gradients:
                gradient.copy_(total)
        elif gradients and self._embedding_group is not None:
            dist.all_reduce(gradients[0], group=self._embedding_group)

    # ---- state ----

    def state(self) -> Iterator[Slice]:
        """Masters, the optimizer's moments and router biases, by name."""
        place = {id(shard): number for number, shard in enumerate(self._shards)}
        for number, shard in enumerate(self._shards):
            yield self._slice(shard.name, shard.tensor, number)
        for part, tensor, owner in self._optimizer.state():
            if owner is None:
                yield common.replicated_slice(part, tensor, self.mesh.rank, self.mesh.world)
            else:
                yield self._slice(f"{owner.name}/{part}", tensor, place[id(owner)])
        stage = self.mesh["stage"]
        for module in self._stages:
            for name, buffer in module.named_buffers():
                yield common.replicated_slice(name, buffer, stage.index, stage.size)

    def _slice(self, name: str, tensor: Tensor, number: int) -> Slice:
        shard, copied = self._shards[number], self._is_embedding_copy(self._shards[number].name)
        index, size = shard.replica, shard.replicas
        if copied and self.config.parallel.schedule != "zbv":
            index, size = index + size * self._tied_copy[number], 2 * size
        return Slice(name, tensor, shard.box, index, size, self._exact[number])

    def after_load(self) -> None:
        """Refresh the bf16 weights and drop gathered ones, which the loaded state has made stale."""
        copy_masters_to_weights(self._shards)
        for stage in self._stages:
            for module in apply.sharded(stage):
                module.reshard()


def _set_backward_sync(stage: DecoderStage, reduce: bool, reshard: bool) -> None:
    """Set whether the next backward passes reduce gradients and reshard gathered weights."""
    for module in apply.sharded(stage):
        module.set_requires_gradient_sync(reduce, recurse=False)
        module.set_is_last_backward(reduce)
        module.set_reshard_after_backward(reshard, recurse=False)
