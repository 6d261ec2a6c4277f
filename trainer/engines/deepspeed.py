"""DeepSpeed's ZeRO 1 and 2 as an engine, for dp and ep. Computes what the native engine computes.

DeepSpeed reduces gradients (experts' among the ranks that hold the same ones), keeps fp32 masters and moments in flat
partitions, and gathers the updated weights. Gradients are summed, not averaged, since losses are weighted by the samples of
the whole step. Clipping, the skip and the norm are done here: DeepSpeed's norm averages those of experts over ranks, so
clipping would depend on the layout.

Precision is that of the native engine. Under bf16, weights, activations and a micro-batch's gradients are bf16; what is
accumulated and reduced of them is fp32, as are masters and moments. ZeRO 1 reduces once a step, ZeRO 2 in each micro-batch.

What DeepSpeed lacks beside the native engine: no other axes, AdamW alone, no ZeRO 3 with experts; fp32 weights are kept
twice, as weights and as masters; gradients are reduced by all-reduce, of which each rank keeps its part, and never while
the backward pass still computes. Its private names are used below, so `pyproject.toml` holds its version.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.schema import RunConfig
from trainer.engines import common
from trainer.engines.base import Batch, DataParallelRank, PhaseRecorder, StepResult, never_stop
from trainer.model.decoder import DecoderStage, inputs
from trainer.model.initial import initial, kind
from trainer.model.seams import Tally
from trainer.optim.common import hyperparameters
from trainer.parallel import apply
from trainer.parallel.context import token_positions
from trainer.parallel.mesh import Mesh, collective_timeout
from trainer.state import Box, Slice

_MOMENTS = ("exp_avg", "exp_avg_sq")
_BUCKET = 1 << 27
"""Most elements that are reduced at once: 512 MiB in fp32. DeepSpeed takes memory for all of it in every backward pass."""
_NEVER = 1 << 60


@dataclass(frozen=True)
class _PartitionBox:
    """A box of a parameter that is a contiguous range of this rank's partition of a flat group."""

    name: str
    box: Box
    group: int
    start: int
    """Of the range, within the partition."""


class DeepSpeedEngine:
    """Trains one rank's share of a model under dp and ep."""

    def __init__(self, config: RunConfig, mesh: Mesh) -> None:
        self.config, self.mesh = config, mesh
        self.data_parallel = DataParallelRank(mesh["dp"].index, mesh["dp"].size)
        self._stage, partitions = _make_stage(config, mesh)
        self._adamw = _make_adamw(self._stage, config)
        self._engine = _make_deepspeed_engine(self._stage, self._adamw, config, mesh)
        self._zero: Any = self._engine.optimizer
        self._boxes = list(self._partition_boxes({name: one.box for name, one in partitions.items()}))
        self._initialize()
        self._positions_S = token_positions(config.data.sequence, "gather", 1, 0, mesh.device)

    def _partition_boxes(self, boxes: dict[str, Box]) -> Iterator[_PartitionBox]:
        """What this rank's flat partitions hold, in order. `boxes`: what the rank has of each parameter before ZeRO."""
        names = {id(parameter): name for name, parameter in self._stage.named_parameters()}
        zero = self._zero
        for group, parameters in enumerate(zero.round_robin_bit16_groups):
            size = int(zero.partition_size[group])
            begin = size * dist.get_rank(zero.real_dp_process_group[group])
            for parameter, offset in zip(parameters, zero.round_robin_bit16_offsets[group], strict=True):
                name = names[id(parameter)]
                first = max(offset, begin)
                last = min(offset + boxes[name].elements, begin + size)
                start = first - begin
                for box in boxes[name].flat(first - offset, last - offset):
                    yield _PartitionBox(name, box, group, start)
                    start += box.elements

    def _initialize(self) -> None:
        """Set moments to zero and masters to the initial values, which DeepSpeed's copies have rounded to bf16."""
        for shard in self._zero.single_partition_of_fp32_groups:
            self._adamw.state[shard] = {
                "step": torch.zeros((), device=shard.device),
                **{moment: torch.zeros_like(shard) for moment in _MOMENTS},
            }
        for part, values in self._box_views(self._zero.single_partition_of_fp32_groups):
            model, seed = self.config.model, self.config.train.seed
            values.copy_(initial(part.name, part.box, model, seed, self.mesh.device))
        self._zero.update_lp_params()

    def _box_views(self, flats: Sequence[Tensor]) -> Iterator[tuple[_PartitionBox, Tensor]]:
        """Each box with a view of its values in `flats`, tensors of the partitions' sizes."""
        for part in self._boxes:
            flat = flats[part.group].detach().narrow(0, part.start, part.box.elements)
            yield part, flat.view(part.box.shape)

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
        tally, shares = Tally(), []
        micros = common.micro_batches(batches, samples, self._positions_S, tally)
        for index, micro in enumerate(micros):
            self._engine.set_gradient_accumulation_boundary(index == len(micros) - 1)
            with phase("forward"):
                share = self._engine(inputs(micro), micro)
            with phase("backward"):
                self._engine.backward(share, scale_wrt_gas=False)
            shares.append(share.detach())
        with phase("optimizer"):
            norm = self._global_norm(stop_requested())
            factor, skip = common.clip_factor_and_skip(norm[0], self.config.optim.clip)
            self._update(lr, factor, skip)
            counts, world = (self._applied_steps, skip), self.mesh.world
            load = common.balance_experts([self._stage], self.config.model, tally, counts, world)
        return common.step_result(torch.stack(shares).sum(), tally, norm, skip, load)

    def _global_norm(self, stop_requested: bool) -> tuple[Tensor, Tensor]:
        """Global norm: after the last backward pass each rank holds the reduced gradients of its own partitions alone. And
        how many ranks were asked to stop."""
        groups = self._zero.averaged_gradients.values()
        gradients = [gradient for group in groups for gradient in group if gradient.numel()]
        return common.global_norm(gradients, self.mesh.world, self.mesh.device, stop_requested)

    def _update(self, lr: float, factor: Tensor, skip: Tensor) -> None:
        """Update the masters and gather the weights. torch's fused kernel clips, and changes nothing where `skip` is 1."""
        adamw: Any = self._adamw  # torch's fused AdamW reads these two, and its stub lacks them
        adamw.grad_scale, adamw.found_inf = factor.reciprocal(), skip
        for group in self._adamw.param_groups:
            group["lr"] = lr * group["scale"]
        self._engine.step()

    @torch.no_grad()
    def evaluate(self, batches: Sequence[Batch], samples: int) -> Tensor:
        """This rank's share of the mean cross-entropy over `samples`."""
        micros = common.micro_batches(batches, samples, self._positions_S, Tally(muted=True))
        # `forward`, not a call: DeepSpeed's hooks and timers are those of training.
        return torch.stack([self._stage.forward(inputs(micro), micro) for micro in micros]).sum()

    # ---- state ----

    @property
    def _applied_steps(self) -> Tensor:
        """Applied steps, as the first group counts them; the other groups' counts are equal."""
        return self._step_counts()[0]

    def _step_counts(self) -> list[Tensor]:
        return [self._adamw.state[shard]["step"] for shard in self._zero.single_partition_of_fp32_groups]

    def state(self) -> Iterator[Slice]:
        """Masters, moments and router biases, by name: views of the flat partitions, nothing is gathered or copied."""
        shards = self._zero.single_partition_of_fp32_groups
        for part, values in self._box_views(shards):
            yield Slice(part.name, values, part.box)
        for moment in _MOMENTS:
            for part, values in self._box_views([self._adamw.state[shard][moment] for shard in shards]):
                yield Slice(f"{part.name}/{moment}", values, part.box)
        rank, world = self.mesh.rank, self.mesh.world
        yield common.replicated_slice("optimizer/step", self._applied_steps, rank, world)
        for name, buffer in self._stage.named_buffers():
            yield common.replicated_slice(name, buffer, rank, world)

    def after_load(self) -> None:
        """Copy the masters to the weights and the first group's count of steps to all groups."""
        for count in self._step_counts():
            count.copy_(self._applied_steps)
        self._zero.update_lp_params()


# ---- DeepSpeed's inputs ----


def _make_stage(config: RunConfig, mesh: Mesh) -> tuple[DecoderStage, dict[str, apply.Partition]]:
    """The model on the device, values not set yet, experts marked for DeepSpeed; and each parameter's partition."""
    with torch.device("meta"):
        stage = DecoderStage(config.model, 0, config.model.layers)
    partitions = apply.parallelize(stage, mesh, config)
    for parameter in stage.parameters():
        parameter.data = parameter.data.to(common.DTYPES[str(config.train.precision)])
    stage.to_empty(device=mesh.device)
    with torch.no_grad():
        for buffer in stage.buffers():
            buffer.zero_()
    experts = stage.expert_splits()
    for name, parameter in stage.named_parameters():
        if name in experts:
            vars(parameter).update(allreduce=False, group_name=_group_name(mesh))
    return stage, partitions


def _group_name(mesh: Mesh) -> str:
    """Name under which DeepSpeed finds the groups of the experts."""
    return f"ep_size_{mesh['ep'].size}"


def _make_adamw(stage: DecoderStage, config: RunConfig) -> torch.optim.AdamW:
    """AdamW over groups of equal rate and equal ranks."""
    optim = config.optim
    experts = stage.expert_splits()
    groups: dict[tuple[float, float, bool], list[nn.Parameter]] = {}
    for name, parameter in stage.named_parameters():
        hyper = hyperparameters(kind(name), optim, config.model.hidden)
        groups.setdefault((hyper.lr_scale, hyper.weight_decay, name in experts), []).append(parameter)
    return torch.optim.AdamW(
        [_param_group(rate, decay, sparse, parameters) for (rate, decay, sparse), parameters in groups.items()],
        lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps, fused=True,
    )  # fmt: skip


def _param_group(scale: float, decay: float, sparse: bool, parameters: list[nn.Parameter]) -> dict[str, Any]:
    group: dict[str, Any] = {"params": parameters, "weight_decay": decay, "scale": scale}
    return group | {"moe": True, "name": vars(parameters[0])["group_name"]} if sparse else group


def _make_deepspeed_engine(
    stage: DecoderStage, adamw: torch.optim.AdamW, config: RunConfig, mesh: Mesh
) -> Any:
    """DeepSpeed's engine around a stage and its optimizer."""
    # Late: DeepSpeed looks for its accelerator when it is imported.
    if mesh.device.type == "cpu":
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.runtime.config import DeepSpeedConfig
    from deepspeed.runtime.engine import DeepSpeedEngine as Base
    from deepspeed.runtime.zero.config import ZERO_OPTIMIZATION
    from deepspeed.utils import groups

    class Engine(Base):
        """DeepSpeed's engine, given two things that it would work out otherwise."""

        def _configure_distributed_model(self, model: nn.Module) -> None:
            super()._configure_distributed_model(model)
            # It looks for experts of its own kind.
            self.has_moe_layers = bool(stage.expert_splits())

        def _do_optimizer_sanity_check(self, basic_optimizer: torch.optim.Optimizer) -> str:  # noqa: ARG002
            # For ZeRO 1 in bf16 it would choose another optimizer, with other flat tensors. The usual one accumulates
            # bf16 gradients in fp32 too, as it does for fp16.
            return ZERO_OPTIMIZATION

        def _broadcast_model(self) -> None:
            """Broadcast nothing: every rank initializes its own values."""

    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Compiled at first use, for an inference collective that training never calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    backend = "gloo" if mesh.device.type == "cpu" else "cpu:gloo,cuda:nccl"
    deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
    # Of neighbouring ranks, like the mesh's: DeepSpeed reduces over these, tokens travel over the mesh's.
    groups._create_expert_and_data_parallel(mesh["ep"].size)
    settings = _deepspeed_config(config, sum(parameter.numel() for parameter in stage.parameters()))
    engine = Engine(
        args=None, model=stage, optimizer=adamw, dist_init_required=False, config=settings,
        config_class=DeepSpeedConfig(settings),
    )  # fmt: skip
    # Its groups have the default timeout.
    for group in tuple(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(collective_timeout(config), group)
    return engine


def _deepspeed_config(config: RunConfig, elements: int) -> dict[str, Any]:
    """DeepSpeed's own configuration. `elements`: parameters of this rank."""
    train = config.train
    zero = {
        "stage": config.parallel.zero, "reduce_scatter": True, "overlap_comm": False, "contiguous_gradients": True,
        "reduce_bucket_size": min(elements, _BUCKET), "compute_grad_norm": False,
    }  # fmt: skip
    return {
        "train_micro_batch_size_per_gpu": train.micro_batch,
        "gradient_accumulation_steps": 1,  # the boundary is set by hand: a batch may grow
        "gradient_allreduce_op": "sum",
        "gradient_clipping": 0.0,
        "communication_data_type": "fp32",
        "data_types": {"grad_accum_dtype": "fp32"},
        "bf16": {"enabled": train.precision == "bf16", "check_grad_overflow": False},
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": _NEVER,
    }
