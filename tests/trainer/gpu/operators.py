"""Times a model's parts on a GPU, one by one: what sizing is calibrated on besides matmuls."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.trainer.gpu.bench import GpuBench, smi
from tests.trainer.gpu.matmuls import matmul_calls
from tests.trainer.gpu.models import as_config

TINY = {
    "batch": 2, "sequence": 16, "hidden": 32, "heads": 2, "kv_heads": 1, "head_dim": 16, "experts": 4, "top_k": 2,
    "vocab": 64, "parameters": 1000,
}  # fmt: skip
"""A case for a CPU."""


class ModelParts:
    """A model's parts alone, each as a call and the leaves that it is differentiated by."""

    NAMES = ("attention", "norm", "rotary", "activation", "dispatch", "router", "loss", "residual")

    def __init__(self, bench: GpuBench, case: dict[str, int]) -> None:
        self.bench, self.case = bench, case
        self.tokens = case["batch"] * case["sequence"]
        self.leaves: list[Tensor] = []

    def normal(self, *shape: int) -> Tensor:
        self.leaves.append(self.bench.noise(*shape).requires_grad_())
        return self.leaves[-1]

    def attention(self) -> Callable[[], Tensor]:
        b, s, heads, kv, head = (self.case[k] for k in ("batch", "sequence", "heads", "kv_heads", "head_dim"))
        q, k, v = self.normal(b, heads, s, head), self.normal(b, kv, s, head), self.normal(b, kv, s, head)
        return lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=heads != kv)

    def norm(self) -> Callable[[], Tensor]:
        from trainer.model.norm import RMSNorm

        layer = RMSNorm(self.case["hidden"], 1e-5).to(self.bench.device, torch.bfloat16)
        x = self.normal(self.tokens, self.case["hidden"])
        self.leaves.extend(layer.parameters())
        return lambda: layer(x)

    def rotary(self) -> Callable[[], Tensor]:
        from trainer.model.rotary import Rotary

        b, s, heads, head = (self.case[k] for k in ("batch", "sequence", "heads", "head_dim"))
        model = as_config({"attention": "gqa", "head_dim": head, "rope_theta": 1e4, "router": {}})
        places = torch.arange(s, device=self.bench.device)
        turns, x = Rotary(model)(places, torch.float32), self.normal(b, heads, s, head)  # type: ignore[arg-type]
        return lambda: turns.rotate(x)

    def activation(self) -> Callable[[], Tensor]:
        both = self.normal(self.tokens, 2 * self.case["hidden"])

        def call() -> Tensor:
            gate, up = both.chunk(2, dim=-1)
            return F.silu(gate) * up

        return call

    def dispatch(self) -> Callable[[], Tensor]:
        from trainer.model.exchange import LocalExchange

        experts, top_k, device = self.case["experts"], self.case["top_k"], self.bench.device
        x = self.normal(self.tokens, self.case["hidden"])
        chosen = torch.rand(self.tokens, experts, device=device).topk(top_k, dim=-1).indices
        weights = torch.rand(self.tokens, top_k, device=device)

        return lambda: LocalExchange().run(x, chosen, weights, experts, lambda rows, *_: rows)[0]

    def router(self) -> Callable[[], Tensor]:
        from trainer.model.router import Router
        from trainer.model.seams import MicroBatch, SoloSeams, Tally

        settings = as_config(self.case | {"router": self.bench.cases["router"]})
        layer = Router(settings, 0).to(self.bench.device, torch.bfloat16)  # type: ignore[arg-type]
        x = self.normal(1, self.tokens, self.case["hidden"])
        nn.init.normal_(layer.linear.weight, 0.0, 0.02)
        self.leaves.append(layer.linear.weight)
        places = torch.arange(self.tokens, device=self.bench.device)
        micro = MicroBatch(torch.empty(1, self.tokens + 1), places, None, 1.0, Tally())
        return lambda: layer(x, None, micro, SoloSeams()).weights_BSK

    def loss(self) -> Callable[[], Tensor]:
        logits = self.normal(self.tokens, self.case["vocab"])
        target = torch.randint(self.case["vocab"], (self.tokens,), device=self.bench.device)
        return lambda: F.cross_entropy(logits.float(), target)

    def residual(self) -> Callable[[], Tensor]:
        x, y = (self.normal(self.tokens, self.case["hidden"]) for _ in range(2))
        return lambda: x + y


def operators(bench: GpuBench) -> None:
    """The model's parts, forward and with backward: what time is calibrated on besides matmuls."""
    bench.guarded("operators", "host", lambda: host(bench))
    bench.guarded("operators", "endurance", lambda: endurance(bench))
    for name, given in bench.cases["operators"].items():
        if bench.late():
            return
        case = given | TINY if bench.dry else given
        for part in ModelParts.NAMES:
            parts = ModelParts(bench, case)
            bench.guarded(
                "operators", f"{name}/{part}",
                lambda parts=parts, part=part: both_ways(bench, getattr(parts, part)(), parts.leaves),
            )  # fmt: skip
        size = case["parameters"]
        bench.guarded("operators", f"{name}/optimizer", lambda size=size: {"forward": update(bench, size)})
        bench.save()


def both_ways(bench: GpuBench, call: Callable[[], Tensor], leaves: list[Tensor]) -> dict[str, float]:
    """Seconds of the forward pass, and of forward and backward together."""
    given = torch.ones_like(call())

    def whole() -> None:
        torch.autograd.grad(call(), leaves, given)

    return {
        "forward": statistics.median(bench.timed([call])),
        "both": statistics.median(bench.timed([whole])),
    }


def endurance(bench: GpuBench) -> dict[str, Any]:
    """Rate of one large matmul over some seconds of nothing else, and of the same after a pause."""
    size = 256 if bench.dry else 8192
    calls = itertools.cycle(
        matmul_calls(bench, {"m": size, "n": size, "k": size, "experts": 1, "dtype": "bfloat16"})
    )
    rates, begun = [], time.monotonic()
    while time.monotonic() - begun < (0.1 if bench.dry else 3.0):
        begin = bench.clock.mark()
        for _ in range(20):
            next(calls)()
        end = bench.clock.mark()
        bench.clock.wait()
        rates.append(20 * 2.0 * size**3 / bench.clock.between(begin, end) / 1e12)
    return {"tflops": rates, "smi": "" if bench.dry else smi()}


def host(bench: GpuBench) -> dict[str, float]:
    """Seconds of host time for a kernel that takes none: called, and called under autograd with its backward."""
    x = torch.ones(8, device=bench.device)
    y = torch.ones(8, device=bench.device, requires_grad=True)

    def plain() -> None:
        for _ in range(500):
            x.mul_(1.0)

    def graded() -> None:
        z = y
        for _ in range(500):
            z = z * 1.0
        z.sum().backward()

    found = {}
    for name, work in (("plain", plain), ("graded", graded)):
        work()
        bench.clock.wait()
        begun = time.perf_counter()
        work()
        bench.clock.wait()
        found[name] = (time.perf_counter() - begun) / 500
    return found


def update(bench: GpuBench, size: int) -> float:
    """Seconds of fused AdamW on `size` fp32 parameters in 8 tensors."""
    tensors = [torch.randn(size // 8, device=bench.device) for _ in range(8)]
    for tensor in tensors:
        tensor.grad = torch.randn_like(tensor)
    optimizer = torch.optim.AdamW(tensors, fused=True)
    optimizer.step()
    return statistics.median(bench.timed([optimizer.step]))
