"""What moves data and reduces nothing, by NCCL's (RCCL's) own calls on a communicator that torch has made.

Torch adds to what NCCL has as a group of sends and receives: `batch_isend_irecv` runs on another stream, `gather` and
`scatter` copy the root's own part in a kernel of its own, and an uneven all-to-all sends messages of no length. On two H200
that costs 1 to 7 us of a small message and 3 to 25 % of 8 MiB to 128 MiB (torch 2.11), for which the links aren't to blame.
And torch broadcasts in place only.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

_MAPS = Path("/proc/self/maps")
_BYTES = 1
"""`ncclUint8`, the same in RCCL. Source: `ncclDataType_t` in nccl.h."""
_IN_PROGRESS = 7
"""What a call on a nonblocking communicator gives until the library has queued it. Source: `ncclResult_t` in nccl.h."""
_HANDLE = "_comm_ptr"
Message = tuple[int, Tensor]
"""Place of the other rank in the group, and a contiguous part of a buffer."""


@dataclass(frozen=True)
class Communicator:
    """A group's communicator, and the library that it belongs to."""

    calls: ctypes.CDLL
    handle: int

    def exchange(self, sends: Sequence[Message], receives: Sequence[Message]) -> Callable[[], object]:
        """A call that queues all messages as one group on the current stream; empty ones are left out.

        Raises:
            RuntimeError: by the call, where the library refuses it.
        """
        steps = [
            (function, (_at(part), _length(part), _BYTES, peer))
            for function, messages in ((self.calls.ncclSend, sends), (self.calls.ncclRecv, receives))
            for peer, part in messages
            if part.numel()
        ]
        return partial(self._queue, steps, (self.calls.ncclGroupStart, self.calls.ncclGroupEnd))

    def broadcast(self, send: Tensor, receive: Tensor, root: int) -> Callable[[], object]:
        """A call that has `receive` of all ranks be what the root has in `send`.

        Raises:
            RuntimeError: by the call, where the library refuses it.
        """
        return partial(
            self._queue,
            [(self.calls.ncclBroadcast, (_at(send), _at(receive), _length(receive), _BYTES, root))],
        )

    def _queue(self, steps: list[tuple[Any, tuple[Any, ...]]], group: tuple[Any, Any] | None = None) -> None:
        """Queue the steps on the current stream, as a group where it has a beginning and an end."""
        comm, stream = ctypes.c_void_p(self.handle), ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
        results = [group[0]()] if group else []
        results += [function(*arguments, comm, stream) for function, arguments in steps]
        results += [group[1]()] if group else []
        state = ctypes.c_int(_IN_PROGRESS if _IN_PROGRESS in results else 0)
        while state.value == _IN_PROGRESS:
            self.calls.ncclCommGetAsyncError(comm, ctypes.byref(state))
        results = [state.value, *(result for result in results if result != _IN_PROGRESS)]
        if any(results):
            reason = self.calls.ncclGetErrorString(max(results)).decode()
            raise RuntimeError(f"NCCL refused what a benchmark queued: {reason}")


def _at(part: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(part.data_ptr())


def _length(part: Tensor) -> ctypes.c_size_t:
    return ctypes.c_size_t(part.nbytes)


@cache
def loaded() -> ctypes.CDLL | None:
    """The library that torch has loaded; None where it isn't a file of its own, or torch keeps its communicators."""
    if not (
        torch.cuda.is_available() and dist.is_nccl_available() and hasattr(dist.ProcessGroupNCCL, _HANDLE)
    ):
        return None
    torch.cuda.nccl.version()  # loads it where that was put off
    for line in _MAPS.read_text().splitlines() if _MAPS.exists() else ():
        path = line.split(maxsplit=5)[-1]
        if Path(path).name.startswith(("libnccl.so", "librccl.so")):
            library = ctypes.CDLL(path)
            library.ncclGetErrorString.restype = ctypes.c_char_p
            return library
    return None


def communicator(group: dist.ProcessGroup, device: torch.device) -> Communicator | None:
    """A group's; None where everything goes through torch: on CPUs, by another backend, or where no library is `loaded`.

    Every rank of the group calls it at the same point: a communicator that doesn't exist yet is made by a collective.
    """
    library = loaded() if device.type == "cuda" and dist.get_backend(group) == "nccl" else None
    if library is None:
        return None
    handle_of = getattr(group._get_backend(device), _HANDLE)
    if not handle_of():
        dist.all_reduce(torch.zeros(1, device=device), group=group)
    return Communicator(library, handle_of())
