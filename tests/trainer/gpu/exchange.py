"""What gathering tokens and summing them back takes on the GPUs of a node, alone and beside matmuls.

torchrun --nproc-per-node=4 -m tests.trainer.gpu.exchange

Printed: milliseconds and bus bandwidth of NCCL and of copies over symmetric memory, and what the matmuls beside them lose.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

TOKENS, WIDTH = 16384, 2048


def _timed(calls: list[Callable[[], object]], count: int = 8) -> list[float]:
    """Median milliseconds of each stretch of calls on the current stream."""
    taken: list[list[float]] = []
    for turn in range(count + 2):
        dist.barrier()
        torch.cuda.synchronize()
        torch.cuda._sleep(2_000_000)
        marks = []
        for call in calls:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            call()
            end.record()
            marks.append((begin, end))
        torch.cuda.synchronize()
        if turn > 1:
            taken.append([begin.elapsed_time(end) for begin, end in marks])
    return [statistics.median(column) for column in zip(*taken, strict=True)]


def main() -> None:
    """Print the table on rank 0."""
    rank = int(os.environ["LOCAL_RANK"])
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl")
    options = dist.ProcessGroupNCCL.Options()
    options.is_high_priority_stream = True
    group = dist.new_group(list(range(dist.get_world_size())), backend="nccl", pg_options=options)
    world = dist.get_world_size()
    x = torch.randn(TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16)
    wide = torch.randn(world * TOKENS, WIDTH, device="cuda", dtype=torch.bfloat16)
    out, narrow = torch.empty_like(wide), torch.empty_like(x)
    one = torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16)

    def pairs() -> Tensor:
        dist.all_to_all_single(out, wide, group=group)
        return out

    ways: dict[str, Callable[[], object]] = {
        "nccl all-gather": lambda: dist.all_gather_into_tensor(out, x, group=group),
        "nccl reduce-scatter": lambda: dist.reduce_scatter_tensor(narrow, wide, group=group),
        "nccl all-to-all": pairs,
    }
    try:
        import torch.distributed._symmetric_memory as symm

        own = symm.empty(TOKENS, WIDTH, dtype=torch.bfloat16, device=torch.device("cuda", rank))
        symm.rendezvous(own, group.group_name)
        big = symm.empty(world * TOKENS, WIDTH, dtype=torch.bfloat16, device=torch.device("cuda", rank))
        symm.rendezvous(big, group.group_name)
        ways["copies all-gather"] = lambda: torch.ops._c10d_functional.wait_tensor(
            torch.ops.symm_mem._low_contention_all_gather(own, group.group_name)
        )
        ways["copies reduce-scatter"] = lambda: torch.ops._c10d_functional.wait_tensor(
            torch.ops.symm_mem._low_contention_reduce_scatter(big, "sum", group.group_name)
        )
        for way in list(ways)[3:]:
            ways[way]()
    except Exception as error:
        if rank == 0:
            print(f"symmetric memory: {type(error).__name__}: {str(error)[:300]}", flush=True)
        ways = dict(list(ways.items())[:3])
    (alone,) = _timed([lambda: [one @ one for _ in range(3)]])
    side = torch.cuda.Stream()
    for name, call in ways.items():
        (taken,) = _timed([call])

        def both(call: Callable[[], object] = call) -> None:
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                call()
            for _ in range(3):
                one @ one  # noqa: B018

        (work,) = _timed([both])
        moved = (world - 1) * TOKENS * WIDTH * 2
        if rank == 0:
            print(
                f"{name:24} {taken:.3f} ms, {moved / taken / 1e6:.0f} GB/s; three matmuls {alone:.3f} ms, "
                f"beside it {work:.3f}",
                flush=True,
            )
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
