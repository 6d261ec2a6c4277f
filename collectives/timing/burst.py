"""What nccl-tests times: many calls launched in a row, from the host's first launch to the device's end of the last.

Its `BenchTime` reads the host's clock before the first of `-n` launches and after the stream has run dry, and divides by
the number of calls. Launched from C that costs a few microseconds a call, which the calls before hide. Launched from
Python it costs tens, which small messages can't hide; so these are captured as a graph, once, and replayed, as
`nccl-tests -G` does.
"""

from __future__ import annotations

import time

import torch

from collectives.timing.clock import Call


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

    def forget(self) -> None:
        """Launch the calls one by one, since another rank couldn't capture them."""
        self._graph = None

    def run(self, align: Call) -> float:
        """Microseconds of a call: one burst between two readings of the host's clock, over its calls.

        `align` brings the ranks together just before: what one waits for another is in the time.
        """
        torch.cuda.synchronize(self._device)
        align()
        begun = time.perf_counter_ns()
        with torch.cuda.stream(self._stream):
            if self._graph is not None:
                self._graph.replay()
            else:
                call = self._call
                for _ in range(self.size):
                    call()
        torch.cuda.synchronize(self._device)
        return (time.perf_counter_ns() - begun) / self.size / 1e3
