"""DeepSpeed's checkpoints as a baseline: ZeRO 1 over plain data parallelism, and its universal format."""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import time
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from faulttol.bench.contestants import fsync_all
from faulttol.bench.gang import BenchRank

if TYPE_CHECKING:
    from torch import Tensor

_BUCKET = 1 << 24


class DeepSpeedSave:
    """`save_checkpoint` of an engine that holds the same parameters in bf16, and its part of fp32 masters and moments.

    DeepSpeed has the best case: no experts, whose files it would write one by one.
    """

    background = False

    def __init__(
        self, place: BenchRank, params: dict[str, tuple[int, ...]], root: Path, universal: bool = False
    ) -> None:
        self.engine = _engine(place, params, universal)
        self._place, self._root, self._step = place, root / "deepspeed", 0
        self.tensors = list(live(self.engine))
        self._durable: float | None = None

    def begin(self, step: int) -> None:
        """Save; see `Contestant`."""
        self._step, self._durable = step, None
        client = {"universal_checkpoint_info": {"universal_checkpoint_version": 0.2}}
        self.engine.save_checkpoint(str(self._root), tag=str(step), client_state=client)

    def settle(self) -> None:
        """It has written all of it."""

    def durable(self) -> float | None:
        """When fsync was done, which DeepSpeed leaves out; see `Contestant`."""
        if self._durable is None:
            if self._place.rank == 0:
                fsync_all(self.folder())
            self._durable = time.monotonic()
        return self._durable

    def folder(self) -> Path:
        """See `Contestant`."""
        return self._root / str(self._step)

    def close(self) -> None:
        """Nothing is held."""


def _engine(place: BenchRank, params: dict[str, tuple[int, ...]], universal: bool) -> Any:
    import torch
    from torch import nn

    # DeepSpeed reads these, though the process group is there already.
    wanted = {"RANK": place.rank, "LOCAL_RANK": place.rank, "WORLD_SIZE": place.world}
    os.environ.update({name: str(number) for name, number in wanted.items()}, DS_ACCELERATOR="cpu")
    with _quiet():
        import deepspeed

        module = nn.Module()
        for name, shape in params.items():
            # DeepSpeed's names have no dots of their own.
            module.register_parameter(
                name.replace(".", "_"), nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16))
            )
        settings = {
            "train_micro_batch_size_per_gpu": 1,
            "bf16": {"enabled": True},
            "data_types": {"grad_accum_dtype": "bf16"},  # or it would take another optimizer than for ZeRO 2
            "zero_optimization": {
                "stage": 1,
                "reduce_bucket_size": _BUCKET,
                "allgather_bucket_size": _BUCKET,
            },
            "zero_allow_untested_optimizer": True,
            "checkpoint": {"load_universal": universal},
        }
        # Compiled at first use, for an inference collective that isn't called here.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        optimizer = torch.optim.AdamW(module.parameters(), lr=1e-3)
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False)
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
    zero: Any = engine.optimizer
    for number, shard in enumerate(zero.single_partition_of_fp32_groups):
        shard.data.fill_(number + 1.0)
        state = zero.optimizer.state[shard]
        state["step"] = torch.ones(())
        for slot, moment in enumerate(("exp_avg", "exp_avg_sq")):
            state[moment] = torch.full_like(shard, slot + 2.0)
    return engine


def live(engine: Any) -> Iterator[Tensor]:
    """Masters and moments of this rank."""
    zero = engine.optimizer
    for shard in zero.single_partition_of_fp32_groups:
        yield shard.data
        yield from (zero.optimizer.state[shard][moment] for moment in ("exp_avg", "exp_avg_sq"))


def to_universal(source: Path, target: Path, workers: int) -> float:
    """Write a checkpoint anew in DeepSpeed's universal format; seconds that it took, its import not counted.

    Args:
        workers: processes that it starts to extract, and to merge.
    """
    from deepspeed.checkpoint.ds_to_universal import main as convert

    options = Namespace(
        input_folder=str(source), output_folder=str(target), num_extract_workers=workers, num_merge_workers=workers,
        keep_temp_folder=False, strict=True, inject_missing_state=False,
    )  # fmt: skip
    began = time.monotonic()
    convert(options)
    return time.monotonic() - began


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without its lines on standard output, which is for results."""
    logging.disable(logging.WARNING)
    with contextlib.redirect_stdout(sys.stderr):
        yield
