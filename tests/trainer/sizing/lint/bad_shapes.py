"""Badly sized models of a few layers, as found in the wild or made of one mistake each, that fit one 80 GB device.

`proposed` is what `size --suggest` promises for one; a GPU test measures both shapes and holds the promise to account.
Experts are multiples of 8 wide: torch's grouped matmul refuses others.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from configs.compose import compose
from trainer.sizing.ask.answer import job_of
from trainer.sizing.lint.suggest import Suggestion, suggest
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.time.cost_model import CostModel


@dataclass(frozen=True)
class BadShape:
    """One model and batch."""

    name: str
    mistake: str
    model: dict[str, int]
    sequence: int = 4096
    micro_batch: int = 2
    granularity: bool = False
    """Whether the mistake is the number of experts, which only a suggestion of another granularity mends."""

    def job(self, hardware: str) -> TrainingJob:
        """As `size` sees it."""
        typed = [f"model.{field}={value}" for field, value in self.model.items()]
        config = compose(
            ["model=olmoe_1b_7b", f"hardware={hardware}", *typed, "model.router.balance=none", "model.qk_norm=false",
             f"data.sequence={self.sequence}", f"train.micro_batch={self.micro_batch}"]
        )  # fmt: skip
        return replace(job_of(config)[0], imbalance=1.0)  # routing is near even before it is trained

    def proposed(self, costs: CostModel) -> Suggestion | None:
        """The best shape at the same parameters, of the granularity asked for; None where there is none."""
        suggestions = suggest(self.job(costs.hardware.name), costs)
        return next((one for one in suggestions if one.granularity == self.granularity), None)


def dense(
    layers: int, hidden: int, heads: int, head_dim: int, width: int, vocab: int = 50304
) -> dict[str, int]:
    """A dense model with as many key/value heads as query heads."""
    return {
        "layers": layers, "dense_layers": layers, "hidden": hidden, "heads": heads, "kv_heads": heads,
        "head_dim": head_dim, "dense_width": width, "expert_width": width, "experts": 1, "top_k": 1, "vocab": vocab,
    }  # fmt: skip


def moe(
    layers: int,
    hidden: int,
    heads: tuple[int, int, int],
    experts: int,
    top_k: int,
    width: int,
    vocab: int = 32000,
) -> dict[str, int]:
    """A mixture of experts; `heads` are query heads, key/value heads and their width."""
    return {
        "layers": layers, "hidden": hidden, "heads": heads[0], "kv_heads": heads[1], "head_dim": heads[2],
        "experts": experts, "top_k": top_k, "expert_width": width, "vocab": vocab,
    }  # fmt: skip


SHAPES = (
    BadShape("vocab_50257", "GPT-2's vocabulary, not padded", dense(4, 2048, 16, 128, 5632, 50257)),
    BadShape("head_80", "2560 wide with 32 heads, as GPT-3 2.7B", dense(4, 2560, 32, 80, 6912)),
    BadShape("head_72", "heads of 72", moe(4, 2304, (32, 32, 72), 16, 2, 1536)),
    BadShape("head_32", "64 heads of 32", dense(4, 2048, 64, 32, 5632)),
    BadShape("swiglu_10922", "8/3 of 4096, as it comes", dense(3, 4096, 32, 128, 10922, 32000)),
    BadShape("swiglu_2730", "8/3 of 1024, as it comes", dense(10, 1024, 8, 128, 2730, 32000), 4096, 8),
    BadShape("hidden_3000", "3000 wide, heads of 100", dense(4, 3000, 30, 100, 8000, 32000)),
    BadShape(
        "hidden_2000", "2000 wide, heads of 80, experts of 2720", moe(4, 2000, (25, 25, 80), 8, 2, 2720)
    ),
    BadShape(
        "expert_tiles",
        "2112 and 1088: a little more than whole tiles",
        moe(4, 2112, (16, 16, 128), 16, 4, 1088),
    ),
    BadShape("expert_1000", "1900 wide, experts of 1000", moe(6, 1900, (16, 4, 128), 16, 4, 1000)),
    BadShape("expert_rows", "256 experts of 384 for 4096 tokens", moe(4, 2048, (16, 4, 128), 256, 8, 384), 4096, 1, True),
    BadShape("llama_odd", "width, vocabulary and heads all odd", dense(4, 2500, 25, 100, 6666, 32003)),
    BadShape("tokens_odd", "samples of 1025 tokens, two of them", dense(4, 4096, 32, 128, 11008, 32000), 1025),
)  # fmt: skip
