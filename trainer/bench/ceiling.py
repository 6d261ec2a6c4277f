"""What the device's matmuls reach on the shapes of a step, and so what a step can't be faster than."""

from __future__ import annotations

import statistics
from collections.abc import Callable

import torch
import torch.nn.functional as F

from configs.schema import RunConfig


def measure_rates(config: RunConfig) -> dict[str, float]:
    """TFLOP/s of a large dense matmul, and of the experts' grouped one (forward, into both widths), in bf16 on random
    values; and TB/s of a copy, read and written bytes both counted."""
    model = config.model
    tokens = config.train.micro_batch * config.data.sequence
    rows = tokens * model.top_k
    device = torch.device("cuda")

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(shape, device=device, dtype=torch.bfloat16)

    one, other = noise(8192, 8192), noise(8192, 8192)
    reached = {"dense": 2 * 8192**3 / _seconds(lambda: one @ other) / 1e12}
    x, weight = noise(rows, model.hidden), noise(model.experts, 2 * model.expert_width, model.hidden)
    ends = torch.arange(1, model.experts + 1, device=device, dtype=torch.int32) * (rows // model.experts)
    seconds = _seconds(lambda: F.grouped_mm(x, weight.transpose(1, 2), offs=ends))
    reached["grouped"] = 4 * rows * model.hidden * model.expert_width / seconds / 1e12
    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    to = torch.empty_like(source)
    reached["copy"] = 2 * source.numel() / _seconds(lambda: to.copy_(source)) / 1e12
    return reached


def _seconds(call: Callable[[], object]) -> float:
    for _ in range(3):
        call()
    taken = []
    for _ in range(10):
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        call()
        end.record()
        end.synchronize()
        taken.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(taken)
