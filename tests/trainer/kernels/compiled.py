"""Every kernel, as blocks of published models launch it, compiled for an H100 and an MI300X; no GPU is needed.

    python -m tests.trainer.kernels.compiled [--targets cuda:90,hip:gfx942] [--models olmoe_1b_7b,zaya1_base]

A launch compiles and computes nothing. Each kernel has a line: its variants, and the most shared memory that one takes. A
kernel that doesn't compile, takes more shared memory or threads than a device has, or is launched by nothing here, ends it
with exit code 1.
"""

from __future__ import annotations

import argparse
import importlib
import os
import pkgutil
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

os.environ.pop("TRITON_INTERPRET", None)  # read while Triton is imported

import torch  # noqa: E402
import triton  # noqa: E402
from torch import Tensor  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import JITFunction  # noqa: E402

import trainer.kernels  # noqa: E402
from configs.compose import compose  # noqa: E402
from tests.trainer.model.small_models import micro  # noqa: E402
from trainer.bench.kernels import part_of  # noqa: E402
from trainer.kernels import choice  # noqa: E402
from trainer.model.decoder import DecoderStage, inputs  # noqa: E402
from trainer.model.initial import build  # noqa: E402

BF16 = torch.bfloat16
TOKENS = 64
SHARED = {"cuda": 227 << 10, "hip": 64 << 10}
"""Bytes of shared memory that a program may have: H100's compute capability 9.0, and MI300X's local data share."""
WARP = {"cuda": 32, "hip": 64}
THREADS = 1024
"""Of a program, at most."""
NAMES = {
    torch.bfloat16: "bf16", torch.float32: "fp32", torch.float64: "fp64", torch.int32: "i32", torch.int64: "i64",
    torch.bool: "i1", torch.uint8: "u8",
}  # fmt: skip


@dataclass
class Launches:
    """Variants of kernels that were launched, each compiled once for each target."""

    targets: list[GPUTarget]
    shared: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    """Bytes of each variant and target, by kernel."""
    faults: list[str] = field(default_factory=list)
    _seen: set[Any] = field(default_factory=set)

    def run(self, kernel: Any, *arguments: Any, grid: Any, warmup: bool, **named: Any) -> None:  # noqa: ARG002
        """In place of `JITFunction.run`."""
        values = dict(zip(kernel.arg_names, arguments, strict=False))
        values |= {name: value for name, value in named.items() if name in kernel.arg_names}
        options = {name: value for name, value in named.items() if name not in values}
        fixed = {param.name: values[param.name] for param in kernel.params if param.is_constexpr}
        signature = {name: "constexpr" if name in fixed else _type(value) for name, value in values.items()}
        key = (kernel.__name__, kernel.__module__, *signature.items(), *fixed.items(), *options.items())
        if key in self._seen:
            return
        self._seen.add(key)
        places = {(kernel.arg_names.index(name),): value for name, value in fixed.items()}
        for target in self.targets:
            self._compile(kernel, ASTSource(kernel, signature, places), target, options)

    def _compile(self, kernel: Any, source: ASTSource, target: GPUTarget, options: dict[str, Any]) -> None:
        name = f"{kernel.__module__.rpartition('.')[2]}.{kernel.__name__}"
        try:
            found: Any = triton.compile(source, target=target, options=options)
        except Exception as error:
            self.faults.append(f"{name} for {target.backend}: {' '.join(str(error).split())[:300]}")
            return
        shared, threads = found.metadata.shared, found.metadata.num_warps * WARP[target.backend]
        self.shared[name].append(shared)
        if shared > SHARED[target.backend]:
            self.faults.append(f"{name} for {target.backend} takes {shared} bytes of shared memory")
        if threads > THREADS:
            self.faults.append(f"{name} for {target.backend} has {threads} threads; at most {THREADS}")


def _type(value: Any) -> str:
    if isinstance(value, Tensor):
        return "*" + NAMES[value.dtype]
    if isinstance(value, bool):
        return "i1"
    if isinstance(value, int):
        return "i32" if -(1 << 31) <= value < 1 << 31 else "i64"
    return "fp32"


@contextmanager
def compiling(launches: Launches) -> Iterator[None]:
    """Launches compile, kernels take over on the CPU, and memory that they leave unwritten is zero."""
    with (
        mock.patch.object(JITFunction, "run", lambda kernel, *a, **n: launches.run(kernel, *a, **n)),
        mock.patch.object(choice, "interpreted", lambda: True),
        mock.patch.object(Tensor, "new_empty", _zeroed(Tensor.new_empty)),
        mock.patch.multiple(torch, empty=_zeroed(torch.empty), empty_like=_zeroed(torch.empty_like)),
    ):
        choice.why_not.cache_clear()
        yield
    choice.why_not.cache_clear()


def _zeroed(made: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return lambda *arguments, **named: made(*arguments, **named).zero_()


# ---- what launches them ----


def model(name: str, *words: str) -> None:
    """A forward and backward pass of two blocks of a published model, with few and narrow experts."""
    config = compose(
        [f"model={name}", "hardware=cpu", "model.layers=2", "model.expert_width=64", *words]
    ).model
    built: DecoderStage = build(config, 1).to(BF16)
    for router in built.routers().values():
        router.bias.data = router.bias.float()
    batch = micro(torch.zeros(1, TOKENS + 1, dtype=torch.int64))
    built(inputs(batch), batch).backward()


def apart() -> None:
    """What only other layouts, optimizers and evaluation launch."""
    from trainer.kernels import accumulate, activation, adamw, lending, loss, rows, sorting
    from trainer.kernels.route import RoutingRule, route

    for gradient in (BF16, torch.float32):
        for moments in (BF16, torch.float32):
            four = [torch.zeros(4096, dtype=dtype) for dtype in (torch.float32, gradient, moments, moments)]
            for cast in (None, torch.zeros(4096, dtype=BF16)):
                adamw.update(
                    (four[0], four[1], four[2], four[3], cast), torch.zeros(4), (0.1, 0.1), (0.9, 0.95, 1e-8)
                )
        adamw.squares([torch.zeros(4096, dtype=gradient)])
        accumulate.add(torch.zeros(4096, dtype=gradient), torch.zeros(4096, dtype=BF16))
    logits, targets = torch.zeros(8, 32000, dtype=BF16), torch.zeros(8, dtype=torch.int64)
    loss.partial_logsumexp(logits, targets, 0)
    loss.logits_to_grads(logits, targets, 0, torch.zeros(8))
    with torch.no_grad():
        loss.linear_cross_entropy(torch.zeros(8, 64, dtype=BF16), torch.zeros(32000, 64, dtype=BF16), targets)
    for weighted in (True, False):
        both = torch.zeros(16, 2048, dtype=BF16, requires_grad=True)
        activation.swiglu_joint(
            both, torch.zeros(16, requires_grad=True) if weighted else None
        ).sum().backward()
    gate, up = torch.zeros(2, 16, 14336, dtype=BF16, requires_grad=True)
    activation.swiglu(gate, up).sum().backward()
    sorting.regroup_by_expert(torch.zeros(4, 16, dtype=torch.int64), 0)
    for experts, ranks in ((8, 2), (128, 4), (512, 64)):
        lending.plan(
            sorting.count_pairs(torch.zeros(8, 2, dtype=torch.int64), experts), ranks, 1, 2, 2048, 8, 104
        )
    back = torch.zeros(8, 2, dtype=torch.int32)
    for chosen in (back, back.long()):
        sorting.sort_pairs(chosen, torch.zeros(8, 2), 0, 40, torch.zeros(128, dtype=torch.int32))
    x = torch.zeros(8, 2048, dtype=BF16, requires_grad=True)
    rows.combine(back, *rows.dispatch_split(x, back, 8, 8)).sum().backward()
    weights = torch.zeros(8, 2, requires_grad=True)
    rows.combine_weighted(torch.zeros(16, 2048, dtype=BF16), weights, back, back.flatten()).sum().backward()
    for softmax in (True, False):
        for renormalize in (True, False):
            for sums in (True, False):
                rule = RoutingRule(8, softmax, renormalize, 1.0, sums)
                logit = torch.zeros(1, TOKENS, 128, requires_grad=True)
                found = route(logit, torch.zeros(128), rule)
                sum(one.sum() for one in found if one is not None and one.is_floating_point()).backward()


def kernels() -> set[str]:
    """Names of all kernels that are launched and not called by others."""
    names = set()
    for found in pkgutil.iter_modules(trainer.kernels.__path__):
        module = importlib.import_module(f"trainer.kernels.{found.name}")
        names |= {
            f"{found.name}.{name}"
            for name, value in vars(module).items()
            if isinstance(value, JITFunction) and value.__module__ == module.__name__
        }
    return names - CALLED


CALLED = {
    "compressed._halves", "compressed._normed_back", "compressed._whole", "loss._logsumexp", "loss._tile", "loss._to_grads",
    "mlp._split", "sorting._key",
}  # fmt: skip
"""Functions of other kernels."""


def misnamed(names: set[str]) -> list[str]:
    """Kernels of one name, which a timeline can't tell apart, and those that have no part in the bench's table."""
    bare = sorted(name.partition(".")[2] for name in names)
    twice = sorted({name for name in bare if bare.count(name) > 1})
    return [f"{name} stands in two modules" for name in twice] + [
        f"{name} has no part in trainer.bench.kernels" for name in bare if part_of(name) == "elementwise"
    ]


def main(arguments: list[str]) -> int:
    """Compile, and print a line for each kernel."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--targets", default="cuda:90,hip:gfx942")
    parser.add_argument("--models", default="olmoe_1b_7b,qwen3_30b_a3b,zaya1_base")
    options = parser.parse_args(arguments)
    targets = [
        GPUTarget(kind, int(arch) if kind == "cuda" else arch, WARP[kind])
        for kind, _, arch in (target.partition(":") for target in options.targets.split(","))
    ]
    launches = Launches(targets)
    with compiling(launches):
        for name in options.models.split(","):
            model(name)
        apart()
    for name, sizes in sorted(launches.shared.items()):
        print(
            f"{name:26} {len(sizes) // len(targets):3} variants, at most {max(sizes):6} bytes of shared memory"
        )
    faults = launches.faults + [
        f"{name} is launched by nothing" for name in sorted(kernels() - set(launches.shared))
    ]
    faults += misnamed(kernels())
    print("\n".join(faults))
    print(f"{len(launches.shared)} kernels for {options.targets}, {len(faults)} faults")
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
