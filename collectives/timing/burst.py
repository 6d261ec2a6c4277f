"""What nccl-tests times: many calls launched in a row, from when the ranks begin to when the last call has ended.

Its `BenchTime` has its threads meet, launches `-n` calls, waits until the stream has run dry, and divides by the number
of calls. Launched from C that costs a few microseconds a call, which the calls before hide. Launched from Python it costs
tens, which small messages can't hide; so these are captured as a graph, once, and replayed, as `nccl-tests -G` does.
"""

from __future__ import annotations

import torch

from collectives.timing.clock import Call

_PAUSE = 4_000_000
"""Cycles of the device: 2 to 2.6 ms."""


class Burst:
    """`size` calls in a row on a GPU, launched one by one or as one graph.

    Args:
        device: a GPU (CUDA or ROCm).
        call: queues one call on the current stream.
        size: calls in a burst, nccl-tests' `-n`.
    """

    def __init__(self, device: torch.device, call: Call, size: int) -> None:
        self.size = size
        self._device, self._call = device, call
        self._graph: torch.cuda.CUDAGraph | None = None
        # As nccl-tests has it. On the default stream a replay waits at each kernel for all other streams: 6 us a call of 8
        # bytes and 24 us of 32 MiB on two H200 (torch 2.11).
        self._stream = torch.cuda.Stream(device)

    def capture(self) -> None:
        """Capture the burst, so that `run` replays it.

        Raises:
            RuntimeError: where the call can't be captured: it waits on the host, or allocates.
        """
        torch.cuda.synchronize(self._device)
        graph = torch.cuda.CUDAGraph()
        # The library's own threads ask for the state of events meanwhile, which the strict mode takes for an error.
        with torch.cuda.graph(graph, capture_error_mode="thread_local"):
            for _ in range(self.size):
                self._call()
        self._graph = graph
        with torch.cuda.stream(self._stream):
            graph.replay()  # the first replay uploads the graph
        torch.cuda.synchronize(self._device)

    def launch_singly(self) -> None:
        """Launch the calls one by one, since another rank couldn't capture them."""
        self._graph = None

    def run(self, align: Call) -> tuple[float, bool]:
        """Microseconds of a call, one burst between two readings of the device's clock over its calls; and whether this
        rank's host was late, so that its device waited for the first call, and others for it.

        Args:
            align: queues something on the current stream that ends on all ranks at once, such as a small all-reduce.
                What one rank waits for another within the burst is in the time.
        """
        torch.cuda.synchronize(self._device)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        with torch.cuda.stream(self._stream):
            # Ranks' hosts reach this point a tenth of a millisecond apart, and more where others use them too: 2 to 60 %
            # of a hundred small calls. Devices pause until each host has queued what follows, and meet after that, since
            # the same number of cycles takes them times that differ by as much as their clocks.
            torch.cuda._sleep(_PAUSE)
            align()
            begin.record()
            if self._graph is not None:
                self._graph.replay()
                late = begin.query()
            else:
                call = self._call
                call()
                late = begin.query()
                for _ in range(self.size - 1):
                    call()
            end.record()
        torch.cuda.synchronize(self._device)
        return begin.elapsed_time(end) * 1e3 / self.size, late
