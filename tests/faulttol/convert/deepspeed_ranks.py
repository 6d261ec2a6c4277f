"""A small mixture of experts trained by plain DeepSpeed, whose checkpoints the import reads."""

from __future__ import annotations

import argparse
import contextlib
import io
import os
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

HIDDEN, WIDTH, EXPERTS = 6, 5, 4
TAG = "after"


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(HIDDEN, WIDTH)
        self.down = nn.Linear(WIDTH, HIDDEN, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(torch.relu(self.up(x)))


def train(
    rank: int, world: int, store: dist.Store, folder: str, stage: int, precision: str, dense: bool = False
) -> dict[str, np.ndarray]:
    """Three steps with `ep` 2, then a checkpoint. This rank's live masters and slots by name, gathered whole, each
    rank's stretch where DeepSpeed's own bookkeeping of the live model has it; experts by their place in the whole model."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    os.environ["LOCAL_RANK"] = str(rank)
    import deepspeed

    # Compiled at first use, for an inference collective that training never calls.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    from deepspeed.moe.layer import MoE
    from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer
    from deepspeed.utils import groups

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first = nn.Linear(HIDDEN, HIDDEN)
            self.moe = (
                None if dense else MoE(HIDDEN, Expert(), num_experts=EXPERTS, ep_size=2, k=1, use_rts=False)
            )
            self.last = nn.Linear(HIDDEN, 1)
            self.register_buffer("seen", torch.arange(3))

        def forward(self, x: Tensor) -> Tensor:
            hidden, aux = self.first(x), 0.0
            if self.moe is not None:
                hidden, aux, _ = self.moe(hidden)
            return self.last(hidden).square().mean() + 0.01 * aux

    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    try:
        deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
        torch.manual_seed(rank)  # experts differ
        model = Model()
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 4, "zero_optimization": {"stage": stage},
            "bf16": {"enabled": precision == "bf16"}, "gradient_clipping": 1.0,
        }  # fmt: skip
        parameters = split_params_into_different_moe_groups_for_optimizer(
            {"params": list(model.parameters()), "name": "all"}
        )
        optimizer = torch.optim.AdamW(parameters, lr=0.01)
        engine, *_ = deepspeed.initialize(
            model=model, optimizer=optimizer, config=settings, dist_init_required=False
        )
        dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        for step in range(3):
            torch.manual_seed(10 * step + rank)
            engine.backward(engine(torch.randn(4, HIDDEN, dtype=dtype)))
            engine.step()
        engine.save_checkpoint(folder, tag=TAG)
        zero: Any = engine.optimizer
        found: dict[str, np.ndarray] = {}
        local = EXPERTS // 2
        for name, parameter in engine.module.named_parameters():
            before, middle, after = name.partition("deepspeed_experts.")
            if middle:
                number, rest = after.split(".", 1)
                name = f"{before}{middle}{int(number) + rank % 2 * local}.{rest}"
            (group,) = (
                i for i, members in enumerate(zero.bit16_groups) if any(p is parameter for p in members)
            )
            flat = zero.single_partition_of_fp32_groups[group]
            for slot, values in {"": flat, **optimizer.state[flat]}.items():
                if slot != "step":
                    found[f"{name}/{slot}" if slot else name] = _whole(parameter, values.detach())
        engine.destroy()
        return found
    finally:
        dist.destroy_process_group()
        deepspeed.comm.comm.cdb = None
        # It keeps groups in its module's names, for good.
        for name in ("_EXPERT_PARALLEL_GROUP", "_EXPERT_PARALLEL_GROUP_RANKS", "_EXPERT_DATA_PARALLEL_GROUP",
                     "_EXPERT_DATA_PARALLEL_GROUP_RANKS", "_ALL_TO_ALL_GROUP"):  # fmt: skip
            getattr(groups, name).clear()
        groups._WORLD_GROUP = groups.mesh_device = None


def _whole(parameter: Any, flat: Tensor) -> np.ndarray:
    """A parameter's values from the flat shares of the ranks that share it."""
    values = torch.zeros(parameter.numel())
    mapping = parameter._hp_mapping
    if mapping is not None:
        here, there = mapping.lp_fragment_address, mapping.hp_fragment_address
        values[here.start : here.start + here.numel] = flat[there.start : there.start + there.numel]
    dist.all_reduce(values, group=parameter._dp_group)
    return values.view(parameter.shape).numpy()


def universal(rank: int, world: int, store: dist.Store, folder: str, out: str) -> None:
    """DeepSpeed's own conversion to a universal folder."""
    os.environ.setdefault("DS_ACCELERATOR", "cpu")
    from deepspeed.checkpoint.ds_to_universal import main

    with contextlib.redirect_stdout(io.StringIO()):
        main(
            argparse.Namespace(
                input_folder=f"{folder}/{TAG}", output_folder=out, num_extract_workers=1, num_merge_workers=1,
                keep_temp_folder=False, strict=True, inject_missing_state=True,
            )
        )  # fmt: skip
