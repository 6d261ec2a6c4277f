"""One rank's optimizer step against torch.optim.AdamW(fused=True) on the same tensors, in turn in one run.

python -m tests.trainer.bench_optim [--device cuda] [--layers 4] [--experts 64] [--rounds 7]

The parameters are those of OLMoE's layers, the embedding left out. Torch's step is taken without clipping, and with the
pass over the gradients that clipping needs there; ours always clips. Each line gives the median over the rounds, the
ratio to torch's without clipping, and the traffic that a fused AdamW would need (28 bytes per parameter) over the time.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections.abc import Callable

import torch
from torch import Tensor

from configs.training import OptimConfig
from trainer.optim.build import build
from trainer.optim.shards import ParameterShard, StagePeers
from trainer.state import Box


def shapes(layers: int, experts: int, width: int, inner: int) -> list[tuple[str, tuple[int, ...], str]]:
    """Name, shape and kind of the parameters."""
    found: list[tuple[str, tuple[int, ...], str]] = []
    for layer in range(layers):
        found += [
            (f"{layer}.{part}", (width, width), "matrix") for part in ("query", "key", "value", "output")
        ]
        found += [(f"{layer}.norm{i}", (width,), "vector") for i in range(4)]
        found += [
            (f"{layer}.router", (experts, width), "matrix"),
            (f"{layer}.gate_up", (experts, 2, inner, width), "matrix"),
            (f"{layer}.down", (experts, width, inner), "matrix"),
        ]
    return found


def ours(tensors: list[ParameterShard], optim: OptimConfig, precision: str) -> Callable[[], None]:
    """A step of ours."""
    listed = [(one.name, one.box, one.replica, one.replicas) for one in tensors]
    optimizer = build(optim, tensors[0].box.whole[-1], tensors, StagePeers(None, 0, 1, [listed]), precision)  # type: ignore[arg-type]
    device = tensors[0].tensor.device
    factor, skip = torch.tensor(0.999, device=device), torch.tensor(0.0, device=device)
    return lambda: optimizer.step(1e-4, factor, skip)


def torchs(parameters: list[Tensor], clip: bool) -> Callable[[], None]:
    """A step of torch.optim.AdamW, with a pass over the gradients before it or none."""
    groups = [
        {"params": [p for p in parameters if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.ndim == 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)
    factor = torch.tensor(0.999, device=parameters[0].device)

    def step() -> None:
        if clip:
            torch._foreach_mul_([p.grad for p in parameters], factor)
        optimizer.step()

    return step


def measured(steps: dict[str, Callable[[], None]], rounds: int, device: str) -> dict[str, float]:
    """Median seconds of each, one after the other in every round; the first round isn't counted.

    On a CPU they are those of the process, so that what else runs there counts less.
    """
    clock = time.perf_counter if device == "cuda" else time.process_time
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(rounds + 1):
        for name, step in steps.items():
            if device == "cuda":
                torch.cuda.synchronize()
            start = clock()
            step()
            if device == "cuda":
                torch.cuda.synchronize()
            times[name].append(clock() - start)
    return {name: statistics.median(found[1:]) for name, found in times.items()}


def main(arguments: list[str]) -> None:
    """Print a line for each optimizer."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--experts", type=int, default=8)
    parser.add_argument("--width", type=int, default=512)
    parser.add_argument("--inner", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args(arguments)
    torch.manual_seed(0)
    shards, parameters = [], []
    for name, shape, kind in shapes(asked.layers, asked.experts, asked.width, asked.inner):
        tensor = torch.randn(shape, device=asked.device) * 0.02
        tensor.grad = torch.randn_like(tensor) * 1e-3
        shards.append(ParameterShard(name, tensor, Box.full(shape), kind, 0, 1))
        # Torch's own values, on the same gradients.
        parameters.append(torch.nn.Parameter(tensor.clone()))
        parameters[-1].grad = tensor.grad
    steps = {
        "torch AdamW fused, no clipping": torchs(parameters, False),
        "torch AdamW fused, clipping": torchs(parameters, True),
        "adamw": ours(shards, OptimConfig(), "bf16"),
        "adamw, bf16 moments": ours(shards, OptimConfig(moments="bf16"), "bf16"),
        "lamb": ours(shards, OptimConfig(kind="lamb"), "bf16"),
        "muon": ours(shards, OptimConfig(kind="muon"), "bf16"),
    }
    found = measured(steps, asked.rounds, asked.device)
    count = sum(shard.tensor.numel() for shard in shards)
    base = found["torch AdamW fused, no clipping"]
    print(f"{count / 1e6:.1f} M parameters on {asked.device}, torch {torch.__version__}")
    for name, seconds in found.items():
        print(
            f"{name:34}{seconds * 1e3:10.2f} ms{seconds / base:8.2f}x{28 * count / seconds / 1e9:10.0f} GB/s"
        )


if __name__ == "__main__":
    main(sys.argv[1:])
