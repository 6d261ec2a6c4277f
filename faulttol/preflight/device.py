"""A node's arithmetic, on every device that torch sees: as fast as its neighbours', and exact to the bit."""

from __future__ import annotations

import time
from functools import partial
from statistics import median

import torch

from faulttol.preflight.host import run_check
from faulttol.preflight.result import Check, CheckOutcome

_SLOW = 0.8
"""Share of the node's median rate below which a device is slow; of two nobody could say which one."""
_LEAST_DEVICES = 3
_SIZES = {"cpu": 512, "cuda": 4096}
_REPEATS = 10


def devices() -> list[torch.device]:
    """All that this process may use; the processor where there is no other."""
    count = torch.cuda.device_count()  # AMD's too
    return [torch.device("cuda", index) for index in range(count)] or [torch.device("cpu")]


def checks() -> list[Check]:
    """Memory, exactness and rate of each device."""
    looks: list[Check] = []
    rates: dict[str, float] = {}
    for device in devices():
        size = _SIZES[device.type]
        looks.append(run_check(f"{device} memory", partial(memory, device)))
        looks.append(run_check(f"{device} exactness", partial(exactness, device, size)))

        def look(device: torch.device = device, size: int = size) -> tuple[CheckOutcome, str]:
            rates[str(device)] = rate(device, size)
            return CheckOutcome.GOOD, f"{rates[str(device)] / 1e12:.2f} TFLOP/s, bf16, {size} x {size}"

        looks.append(run_check(f"{device} matmul", look))
    return [*looks, run_check("matmul rates", lambda: slow_devices(rates))]


def memory(device: torch.device) -> tuple[CheckOutcome, str]:
    """Whether most of the device's memory is free before anything runs."""
    if device.type == "cpu":
        return CheckOutcome.GOOD, "is the host's"
    free, total = torch.cuda.mem_get_info(device)
    text = f"{free / 2**30:.1f} of {total / 2**30:.1f} GiB free"
    return (CheckOutcome.GOOD if free > 0.8 * total else CheckOutcome.BAD), text


def exactness(device: torch.device, size: int) -> tuple[CheckOutcome, str]:
    """The same product twice gives the same bits, and one of whole numbers is right in every element."""
    generator = torch.Generator().manual_seed(size)
    left, right = (torch.randn(size, size, generator=generator).to(device, torch.bfloat16) for _ in range(2))
    if not torch.equal(left @ right, left @ right):
        return CheckOutcome.BAD, "the same matmul twice gives different results"
    return whole_numbers(device, size, generator)


def whole_numbers(device: torch.device, size: int, generator: torch.Generator) -> tuple[CheckOutcome, str]:
    """A product whose elements are small whole numbers, which bf16 holds exactly, weighted and summed.

    Every row has a weight other than zero, so one wrong element is always seen; sums are of whole numbers in float64.
    """
    share = min(1.0, (64 / size) ** 0.5)  # so that sums stay far below 256
    left, right = (_sparse_signs(size, share, generator).to(device) for _ in range(2))
    weights = torch.randint(1, 8, (1, size), generator=generator).to(device, torch.float64)
    product = (left.to(torch.bfloat16) @ right.to(torch.bfloat16)).to(torch.float64)
    expected = (weights @ left.to(torch.float64)) @ right.to(torch.float64)
    wrong = int(((weights @ product) != expected).sum())
    if wrong:
        return CheckOutcome.BAD, f"an exact matmul of whole numbers is wrong in {wrong} of {size} columns"
    return CheckOutcome.GOOD, f"exact to the bit, {size} x {size}"


def _sparse_signs(size: int, share: float, generator: torch.Generator) -> torch.Tensor:
    """Minus one, zero and one; other than zero with probability `share`."""
    signs = torch.randint(0, 2, (size, size), generator=generator) * 2 - 1
    return signs * (torch.rand(size, size, generator=generator) < share)


def rate(device: torch.device, size: int) -> float:
    """Operations a second of a square bf16 product; the best of several, since others may use the device."""
    one = torch.ones(size, size, dtype=torch.bfloat16, device=device)
    best = float("inf")
    for _ in range(_REPEATS):
        began = time.perf_counter()
        one @ one
        if device.type != "cpu":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    return 2 * size**3 / best


def slow_devices(rates: dict[str, float]) -> tuple[CheckOutcome, str]:
    """Devices that are much slower than their neighbours on the node."""
    if len(rates) < _LEAST_DEVICES:
        return CheckOutcome.GOOD, "too few devices to compare"
    middle = median(rates.values())
    slow = [f"{name} {value / middle:.2f}" for name, value in rates.items() if value < _SLOW * middle]
    if slow:
        return (
            CheckOutcome.BAD,
            f"below {_SLOW} of the median of {middle / 1e12:.1f} TFLOP/s: {', '.join(slow)}",
        )
    return CheckOutcome.GOOD, f"all within {_SLOW} of {middle / 1e12:.1f} TFLOP/s"
