"""Stages of a pipeline: which layers and which stages a rank has, and when their gradients are reduced."""

from __future__ import annotations

from typing import Any

from torch.distributed.fsdp import FSDPModule, fully_shard

from configs.schema import ParallelConfig
from trainer.model.decoder import DecoderStage
from trainer.parallel.accumulate import groups
from trainer.parallel.apply import sharded
from trainer.sizing.search.runnable import chunks_of


def split_layers(layers: int, parts: int) -> list[tuple[int, int]]:
    """First and last layer (exclusive) of each of `parts` stages; the last ones, beside the head, are the shorter ones."""
    each, more = divmod(layers, parts)
    ends = [0]
    for part in range(parts):
        ends.append(ends[-1] + each + (part < more))
    return list(zip(ends, ends[1:], strict=False))


def stages_of(parallel: ParallelConfig, index: int) -> list[int]:
    """Stages that a pipeline rank has, ascending: round robin, or a V under `zbv`."""
    pp, chunks = parallel.size("pp"), chunks_of(parallel)
    if parallel.schedule == "zbv":
        return [index, 2 * pp - 1 - index]
    return [index + turn * pp for turn in range(chunks)]


def reduce_now(stage: DecoderStage) -> None:
    """Reduce the gradients that a sharded stage has gathered without reducing, as torch's own schedules do it."""
    if not isinstance(stage, FSDPModule):
        return
    for module in sharded(stage):
        module.set_is_last_backward(True)
        module.set_reshard_after_backward(True, recurse=False)
        module.set_requires_gradient_sync(True, recurse=False)
    shard: Any = fully_shard  # its type hides the attributes that it adds
    state = shard.state(stage)
    for part in state._state_ctx.all_states:
        for group in groups(part):
            group.post_backward()
    state._root_post_backward_final_callback()
