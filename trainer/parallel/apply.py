"""A plain stage made parallel: seams, then parts of the parameters, recomputation, sharding over data-parallel ranks.

All but sharding happens on the meta device, so no rank ever holds more than its part.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Container, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.utils.checkpoint import checkpoint

from configs.schema import RunConfig
from trainer.model.attention import Attention
from trainer.model.block import DecoderBlock, Residual
from trainer.model.compressed import CompressedAttention
from trainer.model.decoder import DecoderStage
from trainer.model.initial import initial
from trainer.model.moe import Experts
from trainer.model.norm import RMSNorm
from trainer.model.router import MLPRouter
from trainer.model.seams import MicroBatch
from trainer.parallel import resident
from trainer.parallel.accumulate import defer_first_cast
from trainer.parallel.context import GatherContext, SharedSamples, UlyssesContext
from trainer.parallel.expert import ExpertParallel
from trainer.parallel.gathered import GatheredExperts, fewer_bytes
from trainer.parallel.lending import LendingTerms
from trainer.parallel.mesh import Axis, Mesh
from trainer.parallel.tensor import TensorParallel, VocabularyParallel
from trainer.state import Box

_UNIT = 1 << 23
"""Elements from which on a block is gathered and reduced by itself: 32 MiB in fp32."""


@dataclass(frozen=True)
class Partition:
    """What a rank holds of a parameter before data-parallel ranks shard it."""

    box: Box
    alike: bool
    """Whether all tp ranks have the same, and each sees a part of the tokens: their gradients are summed."""
    sparse: bool = False
    """Whether it belongs to experts, which edp ranks share, not dp * cp."""


def parallelize(stage: DecoderStage, mesh: Mesh, config: RunConfig) -> dict[str, Partition]:
    """Put a stage that is on the meta device into its place in the layout.

    Returns:
        By name, what this rank holds of each parameter.
    """
    whole = {name: tuple(parameter.shape) for name, parameter in stage.named_parameters()}
    _place_seams(stage, mesh, config)
    partitions = {name: Partition(Box.full(whole[name]), alike=True) for name in whole}
    for name, dim in stage.splits().items():
        if dim is not None:
            partitions[name] = Partition(_part(partitions[name].box, dim, mesh["tp"]), alike=False)
    for name, (expert_dim, width_dim) in stage.expert_splits().items():
        box = _part(partitions[name].box, expert_dim, mesh["ep"])
        partitions[name] = Partition(_part(box, width_dim, mesh["etp"]), alike=False, sparse=True)
    for name, partition in partitions.items():
        _shrink(stage, name, partition.box.shape)
    _recompute(stage, config.train.recompute)
    if config.parallel.schedule == "zbv":
        give_single_outputs(stage)
    return partitions


def give_single_outputs(stage: nn.Module) -> None:
    """Have each node of the graph that meets a weight give one result alone.

    Where torch's schedules split the backward pass, they work a weight's gradient out from the sum of the gradients of all
    results of the node that meets it (`torch.distributed.pipelining._backward.stage_backward_weight`).
    """
    for module in stage.modules():
        if isinstance(module, RMSNorm | Attention | CompressedAttention | MLPRouter | Residual):
            module.single_output = True


def every_block(stage: DecoderStage) -> list[DecoderBlock]:
    """Blocks of the stage, those of multi-token prediction last."""
    blocks = [*stage.blocks.values(), *(prediction.block for prediction in stage.mtp)]
    return [block for block in blocks if isinstance(block, DecoderBlock)]


def _place_seams(stage: DecoderStage, mesh: Mesh, config: RunConfig) -> None:
    """Parallel seams where an axis has more than one rank; the local ones stay elsewhere."""
    parallel = config.parallel
    tp, cp, method = mesh["tp"], mesh["cp"], parallel.context
    seams: dict[str, Any] = {}
    if tp.size > 1:
        seams["tensors"], seams["vocabulary"] = TensorParallel(tp), VocabularyParallel(tp)
    if cp.size > 1:
        seams["core"] = UlyssesContext(cp) if method == "ulysses" else GatherContext(cp)
    if mesh["sample"].size > 1:
        seams["samples"] = SharedSamples(mesh["sample"], method, cp.size, tp.size)
    if mesh["ep"].size * mesh["etp"].size > 1:
        seams["exchange"] = _exchange(mesh, config)
    for module in stage.modules():
        for name, seam in seams.items():
            if name in vars(module):
                setattr(module, name, seam)


def axes_in_use(mesh: Mesh, top_k: int) -> tuple[str, ...]:
    """Groups whose communicators the native engine's first step needs; a pipeline's sends have theirs by pairs of ranks."""
    wide = ("ep_wide",) if _gathers(mesh, top_k) else ()
    return ("stage", "dp_cp", "edp", "ep", *wide, "etp", "tp", "cp")


def _gathers(mesh: Mesh, top_k: int) -> bool:
    """Whether tokens are gathered for the experts, and not sent to them."""
    return mesh["etp"].size == 1 and fewer_bytes(top_k, mesh["ep"].size)


def _exchange(mesh: Mesh, config: RunConfig) -> ExpertParallel | GatheredExperts:
    if not _gathers(mesh, config.model.top_k):
        return ExpertParallel(mesh["ep"], mesh["etp"])
    least = config.parallel.lend_rows
    # Groups begin at multiples of their size, so that neighbours of a common divisor share a node. Torch's schedules that
    # split the backward pass come by weights' gradients in an order of their own, which may differ between ranks.
    node = math.gcd(mesh["ep"].size, mesh.node)
    lends = node > 1 and config.parallel.schedule != "zbv"
    terms = LendingTerms(node, least) if least is not None and lends else None
    return GatheredExperts(mesh["ep"], mesh["ep_wide"], terms)


def _part(box: Box, dim: int, axis: Axis) -> Box:
    size = box.shape[dim] // axis.size
    start = tuple(s + axis.index * size if d == dim else s for d, s in enumerate(box.start))
    shape = tuple(size if d == dim else n for d, n in enumerate(box.shape))
    return replace(box, start=start, shape=shape)


def _shrink(stage: DecoderStage, name: str, shape: tuple[int, ...]) -> None:
    owner_name, _, leaf = name.rpartition(".")
    owner = stage.get_submodule(owner_name)
    if tuple(getattr(owner, leaf).shape) != shape:
        setattr(owner, leaf, nn.Parameter(torch.empty(shape, device="meta")))


def _recompute(stage: DecoderStage, kind: str) -> None:
    """Have blocks, or their feed-forward parts, computed again in the backward pass. Names of parameters stay."""
    if kind == "none":
        return
    for block in every_block(stage):
        if kind == "full":
            block.forward = partial(_again, block.forward)  # type: ignore[method-assign]  # the names of parameters stay
        else:
            block.feed_forward = partial(_again, block.feed_forward)  # type: ignore[method-assign]  # likewise


def _again(forward: Callable[..., Any], *arguments: Any) -> Any:
    if not torch.is_grad_enabled():
        return forward(*arguments)
    micro = next(argument for argument in arguments if isinstance(argument, MicroBatch))

    def contexts() -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        return nullcontext(), micro.tally.again()

    return checkpoint(forward, *arguments, use_reentrant=False, context_fn=contexts)


# ---- sharding over data-parallel ranks ----


def shard(stage: DecoderStage, mesh: Mesh, config: RunConfig) -> set[str]:
    """Shard a stage's parameters over dp * cp, its experts' over edp.

    ZeRO 1 and 2 keep weights gathered from their first use in a step to the last; 3 gathers them for each use. A rank
    that shares its parameters with nobody, in fp32, needs none of it.

    Returns:
        Names of the parameters that are left whole, in bf16 (see `trainer.parallel.resident`).
    """
    bf16 = config.train.precision == "bf16"
    whole = resident.whole(stage, mesh, config)
    left = resident.reserve(stage, whole)
    if mesh["dp_cp"].size == mesh["edp"].size == 1 and (whole or not bf16):
        return whole
    policy = MixedPrecisionPolicy(
        param_dtype=torch.bfloat16 if bf16 else None, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    dense, sparse = _device_mesh(mesh, "dp_cp"), _device_mesh(mesh, "edp")
    gather_again = config.parallel.zero == 3
    place = partial(_expert_shard, ranks=mesh["edp"].size)
    for blocks in _units(stage, mesh["pp"].size > 1, left):
        experts: list[nn.Module] = [
            module
            for block in blocks
            for module in block.modules()
            if isinstance(module, Experts) and not left.issuperset(module.parameters())
        ]
        if experts:
            fully_shard(
                experts,
                mesh=sparse,
                reshard_after_forward=gather_again,
                mp_policy=policy,
                shard_placement_fn=place,
            )
        fully_shard(
            blocks, mesh=dense, reshard_after_forward=gather_again, mp_policy=policy, ignored_params=left
        )
    fully_shard(stage, mesh=dense, reshard_after_forward=False, mp_policy=policy, ignored_params=left)
    for module in sharded(stage):
        # Losses are weighted by the samples of the whole step, so gradients add up.
        module.set_gradient_divide_factor(1.0)
        if hasattr(module, "set_force_sum_reduction_for_comms"):
            module.set_force_sum_reduction_for_comms(True)
        defer_first_cast(module)
    return whole


def _units(stage: DecoderStage, alone: bool, left: Container[nn.Parameter]) -> list[list[nn.Module]]:
    """Blocks that are gathered and reduced together: neighbours, until they have enough elements to be worth a collective.

    Each unit costs the host two milliseconds forward on a slow one (8 layers of ZAYA1 on two H100, ep 2).

    Args:
        alone: whether each block stays alone, as pipeline schedules that split the backward pass need.
        left: parameters that FSDP leaves alone.
    """
    units: list[list[nn.Module]] = []
    filled = _UNIT
    for block in every_block(stage):
        if alone or filled >= _UNIT:
            units.append([])
            filled = 0
        units[-1].append(block)
        filled += sum(parameter.numel() for parameter in block.parameters() if parameter not in left)
    return units


def sharded(stage: nn.Module) -> Iterator[FSDPModule]:
    """The stage's FSDP modules."""
    return (module for module in stage.modules() if isinstance(module, FSDPModule))


def _device_mesh(mesh: Mesh, name: str) -> DeviceMesh:
    return DeviceMesh.from_group(mesh[name].process_group, mesh.device.type)


def _expert_shard(parameter: nn.Parameter, ranks: int) -> Shard | None:
    """Whole experts for each rank where they divide evenly, else an even partition of a width."""
    if parameter.shape[0] % ranks == 0:
        return None
    even = [dim for dim in range(parameter.ndim - 1, 0, -1) if parameter.shape[dim] % ranks == 0]
    return Shard(even[0]) if even else None


def materialize(
    stage: DecoderStage,
    partitions: dict[str, Partition],
    config: RunConfig,
    mesh: Mesh,
    whole: Container[str] = (),
) -> dict[str, Tensor]:
    """Allocate this rank's shards on the device and give them their initial values.

    Returns:
        The masters of the parameters that are left whole, by name.
    """
    stage.to_empty(device=mesh.device)
    masters = {}
    with torch.no_grad():
        for buffer in stage.buffers():
            buffer.zero_()
        for name, parameter in stage.named_parameters():
            if name in whole:
                masters[name] = initial(
                    name, partitions[name].box, config.model, config.train.seed, mesh.device
                )
                parameter.copy_(masters[name])
                continue
            local, box = local_part(parameter, partitions[name], mesh)
            local.copy_(initial(name, box, config.model, config.train.seed, mesh.device))
    mesh.communicators.wait(mesh["dp_cp"], mesh["edp"])
    for module in sharded(stage):
        # FSDP pads odd shards when it is first used; from then on the storage stays where it is.
        module.unshard()
        module.reshard()
    return masters


def local_part(parameter: Tensor, partition: Partition, mesh: Mesh) -> tuple[Tensor, Box]:
    """This rank's live values of a parameter, and their box."""
    box = partition.box
    if not isinstance(parameter, DTensor):
        return parameter.detach(), box
    (placement,) = parameter.placements
    assert isinstance(placement, Shard), placement
    dim, axis = placement.dim, mesh["edp" if partition.sparse else "dp_cp"]
    whole = box.shape[dim]
    size = -(-whole // axis.size)
    begin = min(axis.index * size, whole)
    local = parameter.to_local().detach()
    start = tuple(s + begin if d == dim else s for d, s in enumerate(box.start))
    return local, replace(box, start=start, shape=tuple(local.shape))
