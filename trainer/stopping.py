"""SIGTERM: all ranks finish the same step, save it and leave.

The request is part of a reduction that every step makes anyway. On a GPU the result is read one step later, so that no step
waits for it.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import torch
from torch import Tensor


class StopRequest:
    """Whether this rank was asked to stop, and whether all ranks know.

    Args:
        device: of the engine's results.
    """

    def __init__(self, device: torch.device) -> None:
        self._cuda = device.type == "cuda"
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None
        self.signalled = False
        """This rank has got SIGTERM."""

    @contextmanager
    def handle_sigterm(self) -> Iterator[None]:
        """Treat SIGTERM as a request to stop while inside; a second one ends the process at once."""
        if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
            yield
            return
        before = signal.signal(signal.SIGTERM, self._on_sigterm)
        try:
            yield
        finally:
            signal.signal(signal.SIGTERM, before)

    def _on_sigterm(self, _number: int, _frame: FrameType | None) -> None:
        if self.signalled:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGTERM)
        self.signalled = True

    def agreed_by_all(self, stop_requests: Tensor) -> bool:
        """Whether all ranks stop after this step; the same answer on all of them.

        Args:
            stop_requests: of a step, how many ranks were asked when it ended; equal on all ranks.
        """
        if not self._cuda:
            return bool(stop_requests > 0)
        before, event = self._pending, torch.cuda.Event()
        host = torch.empty(stop_requests.shape, dtype=stop_requests.dtype, pin_memory=True)
        host.copy_(stop_requests, non_blocking=True)
        event.record()
        self._pending = host, event
        if before is None:
            return False
        before[1].synchronize()
        return bool(before[0] > 0)
