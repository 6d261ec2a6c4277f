"""What matmuls take whose number of rows is another one each time, as that of a borrowed expert is.

python -m tests.trainer.gpu.shapes

Six matmuls of one expert of Qwen3's, there and back, for drawn numbers of rows: plain ones, for which cuBLAS looks for a
kernel at each new shape and loads those that weren't used yet, and grouped ones, which have one kernel. Printed: the
milliseconds of host and device by how many shapes came before, and plain ones once more over the same shapes.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Sequence

import torch
import torch.nn.functional as F

WIDTH, INNER, SHAPES = 2048, 768, 400
LEAST, MOST = 2000, 12000
STRETCHES = (0, 30, 100, SHAPES)


class _Expert:
    def __init__(self) -> None:
        def drawn(*size: int) -> torch.Tensor:
            return torch.randn(*size, device="cuda", dtype=torch.bfloat16)

        self.x_RD, self.both_RF, self.inner_RF = (drawn(MOST, n) for n in (WIDTH, 2 * INNER, INNER))
        self.into, self.down = drawn(1, 2 * INNER, WIDTH), drawn(1, WIDTH, INNER)

    def plain(self, rows: int, _ends: torch.Tensor) -> None:
        x, both, inner = self.x_RD[:rows], self.both_RF[:rows], self.inner_RF[:rows]
        into, down = self.into[0], self.down[0]
        pairs = (x, into.t()), (inner, down.t()), (both, into), (x, down), (both.t(), x), (x.t(), inner)
        for one, other in pairs:
            torch.mm(one, other)

    def grouped(self, rows: int, ends: torch.Tensor) -> None:
        x, both, inner = self.x_RD[:rows], self.both_RF[:rows], self.inner_RF[:rows]
        into, down = self.into.transpose(1, 2), self.down.transpose(1, 2)
        pairs = (x, into), (inner, down), (both, self.into), (x, self.down), (both.t(), x), (x.t(), inner)
        for one, other in pairs:
            F.grouped_mm(one, other, offs=ends)


def _row(title: str, host: Sequence[float], device: Sequence[float]) -> str:
    def of(values: Sequence[float]) -> str:
        return f"median {statistics.median(values):6.3f} most {max(values):6.2f} sum {sum(values):7.1f}"

    return f"{title:24} host {of(host)}   device {of(device)}"


def main() -> None:
    """Print the table."""
    expert, draw = _Expert(), random.Random(1)
    rows = [draw.randrange(LEAST, MOST) for _ in range(SHAPES)]
    ends = [torch.tensor([count], device="cuda", dtype=torch.int32) for count in rows]
    for name, call in (("grouped", expert.grouped), ("plain", expert.plain), ("plain again", expert.plain)):
        host, device = [], []
        for count, end in zip(rows, ends, strict=True):
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            began = time.perf_counter()
            call(count, end)
            host.append((time.perf_counter() - began) * 1e3)
            last.record()
            torch.cuda.synchronize()
            device.append(first.elapsed_time(last))
        for low, high in zip(STRETCHES, STRETCHES[1:], strict=False):
            print(_row(f"{name}, {low} to {high}", host[low:high], device[low:high]))


if __name__ == "__main__":
    main()
