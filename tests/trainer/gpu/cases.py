"""Writes what `gpu_checks` is to measure: models, pairs of models, fresh matmuls, operators.

python -m tests.trainer.gpu.cases CASES.json [--profile NAME]

Pure: no torch. The matmuls are drawn by a seed and are none of the profile's, so that they test what the profile gives.
Predictions and promises are computed by `bench_device_forecast` from the same cases, but for those of the pairs, which
are written down before anything is measured.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.compose import compose
from configs.profile import DeviceProfile, load
from configs.schema import ModelConfig, RouterConfig
from tests.trainer.sizing.lint.bad_shapes import SHAPES
from trainer.sizing.model import parameters
from trainer.sizing.time.cost_model import CostModel

SEED = 20251125
DENSE, GROUPED = 200, 50
_LARGEST_FLOPS, _SMALLEST_FLOPS = 6e12, 2e8
_LARGEST_BYTES = 6 << 30


@dataclass(frozen=True)
class ModelCase:
    """A model and its batch."""

    name: str
    model: ModelConfig
    sequence: int
    micro_batch: int

    def to_json(self) -> dict[str, Any]:
        return {
            "name": self.name, "model": self.model.model_dump(mode="json"), "sequence": self.sequence,
            "micro_batch": self.micro_batch,
        }  # fmt: skip


def case(
    name: str, shape: tuple[int, int, tuple[int, int, int], int], moe: tuple[int, int, int], batch: tuple[int, int],
    **more: Any,
) -> ModelCase:  # fmt: skip
    """`shape`: layers, hidden, (query heads, key/value heads, their width), vocabulary; `moe`: experts, top-k, width."""
    layers, hidden, (heads, kv, head), vocab = shape
    experts, top_k, width = moe
    model = ModelConfig(
        name=name, layers=layers, hidden=hidden, heads=heads, kv_heads=kv, head_dim=head, vocab=vocab, experts=experts,
        top_k=top_k, expert_width=width, router=RouterConfig(balance=more.pop("balance", "bias")), **more,
    )  # fmt: skip
    return ModelCase(name, model, *batch)


MODELS = (
    case("e8_k2_small", (4, 1024, (16, 4, 64), 32768), (8, 2, 2048), (1024, 16)),
    case("e16_k1_wide", (3, 2048, (16, 8, 128), 32768), (16, 1, 4096), (2048, 4)),
    case("e64_k8_olmoe", (2, 2048, (16, 16, 128), 50304), (64, 8, 1024), (4096, 2), qk_norm=True, balance="aux"),
    case("e32_k4_shared", (4, 1536, (12, 12, 128), 32000), (32, 4, 768), (2048, 8), shared_width=1536),
    case("e64_k6_fine", (3, 2048, (16, 16, 128), 50304), (64, 6, 512), (4096, 4), shared_width=1024,
         dense_layers=1, dense_width=8192),
    case("e8_k2_mixtral", (2, 4096, (32, 8, 128), 32000), (8, 2, 4096), (4096, 2)),
    case("e16_k2_deep", (8, 1024, (16, 16, 64), 32768), (16, 2, 1024), (1024, 32)),
    case("e32_k8_long", (2, 2048, (16, 4, 128), 50304), (32, 8, 768), (2048, 16)),
    case("e64_k1_switch", (6, 1024, (8, 8, 128), 32768), (64, 1, 512), (2048, 8), balance="aux"),
    case("e8_k1_few_tokens", (4, 3072, (24, 8, 128), 32000), (8, 1, 2048), (1024, 4)),
    case("e16_k4_dense_first", (3, 2560, (20, 4, 128), 40960), (16, 4, 1280), (4096, 1), dense_layers=1,
         dense_width=10240, qk_norm=True),
    case("e32_k2_tied", (6, 1280, (20, 20, 64), 50304), (32, 2, 1792), (4096, 4), tie_embeddings=True),
)  # fmt: skip
"""Twelve mixtures of experts: 8 to 64 experts, top 1 to 8, 512 to 4096 wide, hidden 1024 to 4096, 4k to 32k tokens."""

OPERATORS: dict[str, dict[str, int]] = {
    "d1024": {"batch": 16, "sequence": 1024, "hidden": 1024, "heads": 16, "kv_heads": 4, "head_dim": 64, "experts": 16,
              "top_k": 2, "vocab": 32768, "parameters": 100_000_000},
    "d2048": {"batch": 4, "sequence": 4096, "hidden": 2048, "heads": 16, "kv_heads": 16, "head_dim": 128, "experts": 64,
              "top_k": 6, "vocab": 50304, "parameters": 400_000_000},
    "d4096": {"batch": 1, "sequence": 4096, "hidden": 4096, "heads": 32, "kv_heads": 8, "head_dim": 128, "experts": 8,
              "top_k": 2, "vocab": 32000, "parameters": 20_000_000},
}  # fmt: skip


def matmuls(profile: DeviceProfile, seed: int = SEED) -> list[dict[str, Any]]:
    """Dense and grouped shapes, log-uniform, none of the profile's.

    Rows are any number. Columns and inner widths are multiples of 64 for three in five, of 8 for three in ten, and
    any number for one in ten.
    """
    rng = random.Random(seed)
    known = {(r.m, r.n, r.k, r.experts) for r in profile.matmuls}
    found: list[dict[str, Any]] = []

    def size(low: int, high: int, aligned: bool = False) -> int:
        drawn = math.exp(rng.uniform(math.log(low), math.log(high)))
        luck = rng.random()
        unit = 64 if luck < 0.6 else 8 if luck < 0.9 or aligned else 1
        return max(unit, unit * round(drawn / unit))

    while len(found) < DENSE:
        m = round(math.exp(rng.uniform(math.log(128), math.log(32768))))
        n, k = size(256, 32768), size(256, 32768)
        moved = 2 * (m * k + k * n + m * n)
        if (
            _SMALLEST_FLOPS < 2 * m * n * k < _LARGEST_FLOPS
            and moved < _LARGEST_BYTES
            and (m, n, k, 1) not in known
        ):
            found.append({"m": m, "n": n, "k": k, "experts": 1, "imbalance": 1.0, "dtype": "bfloat16"})
    while len(found) < DENSE + GROUPED:
        experts = rng.choice((4, 8, 12, 16, 24, 32, 48, 64, 96, 128))
        m = round(math.exp(rng.uniform(math.log(2048), math.log(65536))))
        n, k = size(512, 8192, aligned=True), size(512, 8192, aligned=True)
        moved = 2 * (m * k + experts * k * n + m * n)
        if 2 * m * n * k > _LARGEST_FLOPS or moved > _LARGEST_BYTES:
            continue
        rows = _rows(m, experts, rng.uniform(0.0, 0.8), rng)
        imbalance = round(max(rows) * experts / m, 3)
        found.append(
            {
                "m": m,
                "n": n,
                "k": k,
                "experts": experts,
                "imbalance": imbalance,
                "dtype": "bfloat16",
                "rows": rows,
            }
        )
    return found


def _rows(total: int, experts: int, skew: float, rng: random.Random) -> list[int]:
    """Rows of each expert: a power law with noise, shuffled."""
    weights = [(i + 1) ** -skew * rng.lognormvariate(0.0, 0.1) for i in range(experts)]
    edges = [round(total * sum(weights[:i]) / sum(weights)) for i in range(experts + 1)]
    rows = [after - before for before, after in zip(edges, edges[1:], strict=False)]
    rng.shuffle(rows)
    return rows


def pairs(prices: CostModel) -> list[dict[str, Any]]:
    """Badly sized models with the shape that is suggested for each and the saving that is promised."""
    found = []
    for shape in SHAPES:
        job, better = shape.job(prices.hardware.name), shape.proposed(prices)
        if better is None:
            continue
        sides = {"bad": job, "good": better.job}
        found.append(
            {
                "name": shape.name, "mistake": shape.mistake, "promised": better.saves, "changes": list(better.changes),
                **{
                    side: {"model": j.model.model_dump(mode="json"), "sequence": j.sequence, "micro_batch": j.micro_batch}
                    for side, j in sides.items()
                },
            }
        )  # fmt: skip
    return found


def main(arguments: list[str]) -> int:
    """Write the cases and say what they are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--profile", default="h100")
    options = parser.parse_args(arguments)
    profile = load(DeviceProfile, options.profile)
    hardware = compose([f"hardware={profile.hardware}"]).hardware
    tree = {
        "profile": profile.name, "seed": SEED, "models": [one.to_json() for one in MODELS],
        "pairs": pairs(CostModel(hardware, profile)), "matmuls": matmuls(profile),
        "operators": OPERATORS, "router": RouterConfig().model_dump(mode="json"),
    }  # fmt: skip
    options.out.write_text(json.dumps(tree))
    for one in MODELS:
        count = parameters.count(one.model)
        tokens = one.sequence * one.micro_batch
        flops = 6 * count.matmul * tokens
        print(
            f"{one.name}: {count.total / 1e9:.2f} B parameters, {tokens} tokens, {flops / 1e12:.1f} TFLOP a step"
        )
    print(f"{len(tree['pairs'])} pairs, {len(tree['matmuls'])} matmuls")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
