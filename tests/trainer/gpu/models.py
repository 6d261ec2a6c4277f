"""Times steps of the trainer's own models on a GPU, and their memory.

A step is forward, backward, gradients to fp32, global norm and clipping, fused AdamW on fp32 master weights, and the
new weights back in bf16: what the trainer's engine does on one rank. Token ids are uniform.
"""

from __future__ import annotations

import itertools
import statistics
import sys
import time
import types
from pathlib import Path
from typing import Any

import torch

from tests.trainer.gpu.bench import GpuBench

ROOT = Path(__file__).resolve().parents[3]
_WARM_STEPS, _STEPS = 3, 8
_TURNS = 4
"""Visits to each model of a pair, in turn."""
_TURN_STEPS = 3


def stand_in() -> None:
    """Let the trainer's model modules import without pydantic: they read attributes of a configuration, no more."""
    sys.path.insert(0, str(ROOT))
    configs = types.ModuleType("configs.model")
    for name in ("ModelConfig", "RouterConfig", "YarnConfig"):
        setattr(configs, name, types.SimpleNamespace)
    sys.modules["configs.model"] = configs


class CaseModel(types.SimpleNamespace):
    """A model's configuration by attribute, of which leading layers alone may be dense: no case has `moe_every`."""

    layers: int
    dense_layers: int
    mtp_layers: int

    def is_moe(self, layer: int) -> bool:
        """Whether a layer has experts."""
        return layer >= self.dense_layers

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers with experts."""
        return tuple(range(self.dense_layers, self.layers))

    @property
    def router_layers(self) -> tuple[int, ...]:
        """The same and those of multi-token prediction."""
        return tuple(range(self.dense_layers, self.layers + self.mtp_layers))


#: Fields that cases of earlier versions don't have, nor those of single parts.
_MODEL: dict[str, Any] = {
    "layers": 1, "dense_layers": 0, "qk_norm": "none", "window": 0, "parallel_block": False, "residual_scaling": False,
    "rope_fraction": 1.0, "mtp_layers": 0,
    "yarn": {"factor": 1.0},
}  # fmt: skip
_ROUTER: dict[str, Any] = {
    "kind": "linear", "groups": 1, "z_coefficient": 0.0, "losses_over_layers": "sum", "capacity_factor": None,
    "bias_rule": "sign",
}  # fmt: skip


def as_config(tree: dict[str, Any]) -> CaseModel:
    """A model's configuration by attribute."""
    tree = _MODEL | tree
    norm = {True: "head", False: "none"}.get(tree["qk_norm"], tree["qk_norm"])
    parts = {
        "router": types.SimpleNamespace(**(_ROUTER | tree["router"])),
        "yarn": types.SimpleNamespace(**tree["yarn"]),
    }
    return CaseModel(**(tree | parts | {"qk_norm": norm}))


def small(case: dict[str, Any]) -> dict[str, Any]:
    """A model small enough for a CPU."""
    tree = dict(case["model"])
    dense = tree["dense_layers"] == tree["layers"]
    experts = min(tree["experts"], 4)
    kv = 1 if tree["kv_heads"] < tree["heads"] else 2
    tree |= {
        "hidden": 64, "heads": 2, "kv_heads": kv, "head_dim": 32, "vocab": 128, "experts": experts,
        "top_k": min(tree["top_k"], experts), "expert_width": 32, "dense_width": 64 if tree["dense_layers"] else 0,
        "shared_width": 32 if tree["shared_width"] else 0, "layers": min(tree["layers"], 2),
        "dense_layers": min(tree["layers"], 2) if dense else min(tree["dense_layers"], 1),
    }  # fmt: skip
    return case | {"model": tree, "sequence": 32, "micro_batch": 2}


class Model:
    """One model with its optimizer, and how a step of it is done."""

    def __init__(self, bench: GpuBench, case: dict[str, Any]) -> None:
        from trainer.model.initial import build
        from trainer.model.seams import Tally

        self.bench, self.case = bench, case
        self.model = build(as_config(case["model"]), 1, bench.device).to(torch.bfloat16)  # type: ignore[arg-type]
        self.tally = Tally()
        self.parameters = list(self.model.parameters())
        self.masters = [p.detach().float() for p in self.parameters]
        self.gradients = [torch.zeros_like(master) for master in self.masters]
        for master, gradient in zip(self.masters, self.gradients, strict=True):
            master.grad = gradient
        self.optimizer = torch.optim.AdamW(self.masters, lr=1e-4, betas=(0.9, 0.95), fused=True)
        shape = (case["micro_batch"], case["sequence"] + 1)
        vocab = case["model"]["vocab"]
        self.batches = [torch.randint(vocab, shape, device=bench.device) for _ in range(4)]
        self.index = 0

    def step(self) -> list[Any]:
        """One step; marks before, after forward, after backward, after the optimizer."""
        from trainer.model.decoder import inputs
        from trainer.model.seams import MicroBatch

        clock = self.bench.clock
        marks = [clock.mark()]
        tokens = self.batches[self.index % len(self.batches)]
        self.index += 1
        places = torch.arange(tokens.shape[1] - 1, device=tokens.device)
        micro = MicroBatch(tokens, places, None, 1.0 / tokens.shape[0], self.tally)
        loss = self.model(inputs(micro), micro)
        marks.append(clock.mark())
        loss.backward()
        marks.append(clock.mark())
        with torch.no_grad():
            torch._foreach_copy_(self.gradients, [p.grad for p in self.parameters])
            norm = torch.stack(torch._foreach_norm(self.gradients)).norm()
            torch._foreach_mul_(self.gradients, (1.0 / (norm + 1e-6)).clamp(max=1.0))
            self.optimizer.step()
            torch._foreach_copy_(self.parameters, self.masters)
            for parameter in self.parameters:
                parameter.grad = None
        marks.append(clock.mark())
        return marks

    def imbalance(self) -> list[float]:
        """The fullest expert's rows over the mean, by layer."""
        loads = [load.float() for load in self.tally.counts.values()]
        return [float(load.max() / load.mean()) for load in loads]


def phases(bench: GpuBench, steps: list[list[Any]]) -> dict[str, float]:
    """Median seconds of a step and of its phases."""
    bench.clock.wait()
    split = [[bench.clock.between(a, b) for a, b in itertools.pairwise(marks)] for marks in steps]
    names = ("forward", "backward", "optimizer")
    found = {name: statistics.median(row[i] for row in split) for i, name in enumerate(names)}
    return found | {
        "step": statistics.median(sum(row) for row in split),
        "least": min(sum(row) for row in split),
    }


def measure_model(bench: GpuBench, case: dict[str, Any]) -> dict[str, Any]:
    """Step time, and memory: after building, at the peak of the first step, at the peak of later ones."""
    memory = {}
    if not bench.dry:
        torch.cuda.reset_peak_memory_stats()
        memory["before"] = torch.cuda.memory_allocated()
    model = Model(bench, case)
    if not bench.dry:
        memory["built"] = torch.cuda.memory_allocated()
    for _ in range(_WARM_STEPS):
        model.step()
    bench.clock.wait()
    if not bench.dry:
        memory["states"] = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
    begun = time.monotonic()
    steps = []
    while len(steps) < (2 if bench.dry else _STEPS) and time.monotonic() - begun < 4.0:
        steps.append(model.step())
        if len(steps) == 2:
            bench.clock.wait()  # so that slow models are noticed
    found = phases(bench, steps) | {"steps": len(steps), "imbalance": model.imbalance()}
    if not bench.dry:
        memory["peak"] = torch.cuda.max_memory_allocated()
        memory["reserved"] = torch.cuda.max_memory_reserved()
    return found | {"memory": memory, "parameters": sum(p.numel() for p in model.parameters)}


def measure_pair(bench: GpuBench, pair: dict[str, Any]) -> dict[str, Any]:
    """Both models of a pair in turn; medians over all turns, and the ratio of each turn's medians."""
    cases = {side: small(pair[side]) if bench.dry else pair[side] for side in ("bad", "good")}
    models = {side: Model(bench, case) for side, case in cases.items()}
    for model in models.values():
        for _ in range(_WARM_STEPS):
            model.step()
    bench.clock.wait()
    steps: dict[str, list[list[Any]]] = {"bad": [], "good": []}
    ratios = []
    for turn in range(1 if bench.dry else _TURNS):
        medians = {}
        for side in ("bad", "good") if turn % 2 == 0 else ("good", "bad"):
            found = [models[side].step() for _ in range(_TURN_STEPS)]
            steps[side] += found
            medians[side] = phases(bench, found)["step"]
        ratios.append(medians["bad"] / medians["good"])
    return {side: phases(bench, found) for side, found in steps.items()} | {"ratios": ratios}
