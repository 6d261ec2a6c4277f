"""Times matmuls on a GPU as `collectives.device.profile` does: in rounds of random order, operands out of the caches."""

from __future__ import annotations

import math
import random
import statistics
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F

from tests.trainer.gpu.bench import GpuBench

_ROUNDS = 5
_SPREAD = 512 << 20
"""Bytes that operands rotate through."""
_DTYPES = {"bfloat16": torch.bfloat16, "half": torch.float16, "float": torch.float32}


def matmul_calls(bench: GpuBench, case: dict[str, Any]) -> list[Callable[[], Any]]:
    """The case, in a forward pass's layout, on as many sets of operands as outgrow the caches."""
    m, n, k, experts, dtype = case["m"], case["n"], case["k"], case["experts"], _DTYPES[case["dtype"]]
    weight = (experts, n, k) if experts > 1 else (n, k)
    size = (m * k + math.prod(weight)) * dtype.itemsize
    sets = 1 if bench.dry else math.ceil(_SPREAD / size)
    ends = None
    if experts > 1:
        ends = torch.tensor(case["rows"], device=bench.device).cumsum(0).to(torch.int32)
    found: list[Callable[[], Any]] = []
    for _ in range(sets):
        a, b = bench.noise(m, k, dtype=dtype), bench.noise(*weight, dtype=dtype).mT
        if ends is None:
            found.append(lambda a=a, b=b: torch.mm(a, b))
        else:
            found.append(lambda a=a, b=b: F.grouped_mm(a, b, offs=ends))
    return found


def cut(case: dict[str, Any]) -> dict[str, Any]:
    """A matmul small enough for a CPU."""
    case = case | {key: max(16, 16 * (min(case[key], 512) // 64)) for key in ("m", "n", "k")}
    if case["experts"] > 1:
        case["experts"] = 4
        case["rows"] = [case["m"] // 4] * 4
    return case


def matmuls(bench: GpuBench) -> None:
    """All shapes in several rounds, each in another order; results are medians over the rounds' medians."""
    cases = [(str(i), cut(case) if bench.dry else case) for i, case in enumerate(bench.cases["matmuls"])]
    times: dict[str, list[float]] = {}
    failed: set[str] = set()
    for number in range(1 if bench.dry else _ROUNDS):
        random.Random(number).shuffle(cases)
        for name, case in cases:
            if bench.late():
                break
            if name in failed:
                continue

            def work(name: str = name, case: dict[str, Any] = case) -> None:
                found = bench.timed(matmul_calls(bench, case))
                times.setdefault(name, []).append(statistics.median(found))

            try:
                work()
            except Exception as error:
                failed.add(name)
                bench.results["errors"][f"matmuls/{name}"] = f"{type(error).__name__}: {str(error)[:300]}"
                bench.free()
        bench.results["matmuls"] = {
            name: {"seconds": statistics.median(found), "rounds": len(found)} for name, found in times.items()
        }
        bench.save()
        print(
            f"matmuls: round {number + 1}, {len(times)} of {len(cases)} shapes, {bench.results['seconds']} s",
            flush=True,
        )
