"""DeepSpeed ZeRO-1 as the engine: one training step, and the exact state that resumes it.

What DeepSpeed does here: fp32 master weights, the reduction of gradients (experts among the ranks that hold
the same ones), the sharded AdamW step, the gathering of updated weights. What it doesn't: the gradient norm.
Its own averages expert norms over ranks, so clipping would depend on the layout; here the norm is the true
one, of all shards together.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from configs.schema import RunConfig
from faulttol.checkpoint.pieces import Piece
from trainer.model.decoder import Decoder
from trainer.optim import parameter_groups
from trainer.parallel.mesh import Mesh

_MOMENTS = ("exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class StepResult:
    """What a step gives, summed over this rank's micro-batches; tensors stay on the device."""

    loss: Tensor
    """Mean cross-entropy of this rank's samples."""
    aux_loss: Tensor
    grad_norm: Tensor
    """Global norm before clipping."""
    load: Tensor
    """Tokens per MoE layer and expert over all ranks, [layers, experts]."""


class Engine:
    """Trains one rank's share of a model."""

    def __init__(self, config: RunConfig, mesh: Mesh, steps_of_accumulation: int) -> None:
        import deepspeed  # late, as in `mesh.join`
        from deepspeed.moe.layer import MoE

        class Marker(MoE):
            """Tells DeepSpeed's engine, which looks for this type, that the model has experts."""

            def __init__(self, num_experts: int) -> None:
                torch.nn.Module.__init__(self)
                self.num_experts = num_experts

            def set_deepspeed_parallelism(self, use_data_before_expert_parallel_: bool = False) -> None:
                """Nothing to make: the mesh has made the groups."""

        logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
        self.config, self.mesh = config, mesh
        self.model = Decoder(
            config.model, config.data.sequence, mesh.ep_group, mesh.ep_rank, config.train.seed
        )
        self.model.add_module("deepspeed_marker", Marker(config.model.experts))
        self._accumulation = steps_of_accumulation
        self._engine, optimizer, _, _ = deepspeed.initialize(
            model=self.model,
            optimizer=self._adamw(),
            config=self._deepspeed_config(),
            dist_init_required=False,
        )
        self._zero: Any = optimizer

    def _adamw(self) -> torch.optim.Optimizer:
        from deepspeed.moe.utils import split_params_into_different_moe_groups_for_optimizer

        optim = self.config.optim
        groups = parameter_groups(self.model, optim.weight_decay)
        groups = split_params_into_different_moe_groups_for_optimizer(groups)
        return torch.optim.AdamW(
            [group for group in groups if group["params"]],
            lr=optim.lr, betas=(optim.beta1, optim.beta2), eps=optim.eps,
            fused=self.mesh.device.type == "cuda", foreach=False,
        )  # fmt: skip

    def _deepspeed_config(self) -> dict[str, Any]:
        train = self.config.train
        return {
            "train_micro_batch_size_per_gpu": train.micro_batch,
            "gradient_accumulation_steps": self._accumulation,
            "zero_optimization": {"stage": 1, "reduce_scatter": True, "overlap_comm": False},
            "zero_allow_untested_optimizer": True,
            "bf16": {"enabled": train.precision == "bf16"},
            "gradient_clipping": 0.0,
            "steps_per_print": 1 << 60,
        }

    def step(self, batches: Sequence[Tensor], lr: float, phase: Callable[[str], Any]) -> StepResult:
        """One optimizer step.

        Args:
            batches: token tensors [micro_batch, sequence + 1], one per accumulation step.
            lr: learning rate of this step.
            phase: gives a context manager that records a phase by its name.
        """
        losses, extras = [], []
        for index, tokens_BS in enumerate(batches):
            with phase("forward"):
                loss, auxiliary = self._engine(tokens_BS)
            with phase("backward"):
                self._engine.set_gradient_accumulation_boundary(index == len(batches) - 1)
                self._engine.backward(loss + auxiliary)
            losses.append(loss.detach())
            extras.append(auxiliary.detach())
        with phase("optimizer"):
            norm = self._clip()
            for group in self._zero.param_groups:
                group["lr"] = lr
            self._engine.step()
            load = self._balance()
        return StepResult(torch.stack(losses).mean(), torch.stack(extras).mean(), norm, load)

    def _clip(self) -> Tensor:
        """Scale the reduced gradients to the norm limit; the norm before.

        After the last backward pass each rank holds the reduced gradients of its own shards and of nothing
        else, so the squared norms of all ranks add up to the model's.
        """
        shards = [gradient for group in self._zero.averaged_gradients.values() for gradient in group]
        square = torch.stack([g.float().pow(2).sum() for g in shards if g is not None]).sum()
        dist.all_reduce(square)
        norm = square.sqrt()
        if self.config.optim.clip > 0:
            factor = (self.config.optim.clip / (norm + 1e-6)).clamp(max=1.0)
            for gradient in shards:
                if gradient is not None:
                    gradient.mul_(factor.to(gradient.dtype))
        return norm

    def _balance(self) -> Tensor:
        """Sum the step's expert loads over all ranks and move the router biases by them."""
        routers = self.model.routers()
        if not routers:
            return torch.zeros(0, self.config.model.experts, dtype=torch.int64)
        load = torch.stack([router.load_E for router in routers])
        dist.all_reduce(load)
        for router, load_E in zip(routers, load, strict=True):
            router.update_bias(load_E)
            router.load_E.zero_()
        return load

    # ---- state ----

    def pieces(self) -> Iterator[Piece]:
        """This rank's whole state: master weights and moments of its shards, router biases.

        Sixteen-bit weights follow from the master weights, the sample order and learning rate from the step.
        """
        for name, tensor, size, start in self._shards():
            yield Piece.from_tensor(name, tensor, (size,), (start,))
        for index, router in enumerate(self.model.routers()):
            yield Piece.from_tensor(f"router/{index}/bias", router.bias_E)

    def load(self, pieces: dict[str, Piece], step: int) -> None:
        """Take up a state that `pieces` gave at `step` under the same layout."""
        for index, shard in enumerate(self._zero.single_partition_of_fp32_groups):
            state = self._zero.optimizer.state[shard]
            state["step"] = torch.tensor(float(step), device=shard.device)
            for moment in _MOMENTS:
                state[moment] = torch.zeros_like(shard)
            for part, target in (("master", shard), *((m, state[m]) for m in _MOMENTS)):
                target.data.copy_(pieces[self._name(index, part)].tensor())
        self._zero.update_lp_params()
        for index, router in enumerate(self.model.routers()):
            router.bias_E.copy_(pieces[f"router/{index}/bias"].tensor())

    def _shards(self) -> Iterator[tuple[str, Tensor, int, int]]:
        for index, shard in enumerate(self._zero.single_partition_of_fp32_groups):
            group = self._zero.real_dp_process_group[index]
            start, size = dist.get_rank(group) * shard.numel(), dist.get_world_size(group) * shard.numel()
            state = self._zero.optimizer.state[shard]
            for part, tensor in (("master", shard), *((m, state[m]) for m in _MOMENTS)):
                yield self._name(index, part), tensor.detach(), size, start

    def _name(self, index: int, part: str) -> str:
        """Name of a flat optimizer group; an expert group belongs to the ranks that hold its experts."""
        moe = self._zero.param_groups[index].get("moe", False)
        owner = f"experts{self.mesh.ep_rank}" if moe else "dense"
        return f"zero/{owner}/{index}/{part}"
