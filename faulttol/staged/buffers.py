"""Host memory that a rank's file is laid out in: live tensors are copied there at once and written from there later.

The copy is the only part of a save that training waits for, and it has until the optimizer of the next step: nothing
that is saved changes before. On a GPU it runs on a stream of its own into page-locked memory (CUDA's guide, "Page-Locked
Host Memory"; HIP's is the same call); on a CPU in a thread beside the forward pass.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from faulttol.checkpoint.manifest import Incomplete
from faulttol.checkpoint.pieces import TensorPiece
from faulttol.checkpoint.shards import ShardLayout

if TYPE_CHECKING:
    import torch


_MADV_HUGEPAGE, _MADV_POPULATE_WRITE = 14, 23
_PIECE = 8 << 20
"""Bytes of pages that are asked for at once."""
_THREADS = 4
"""That ask for pages."""
_PORTABLE = 1
"""`cudaHostRegisterPortable`, and HIP's flag of that name: the pages are locked for every device."""


class Buffer:
    """Memory that this process fills and its writer process reads.

    Args:
        size: bytes.
        path: file on a memory file system, which outlives this process; None: memory without a name, which doesn't.
        mapped: all pages are mapped at once, as a driver that locks them wants it.

    Raises:
        Incomplete: where the host has no room for it.
    """

    def __init__(self, size: int, path: Path | None = None, mapped: bool = False) -> None:
        self._named, self._fd = path, -1
        try:
            if path is None:
                self._fd = os.memfd_create("megaray-checkpoint")
            else:
                path.parent.mkdir(parents=True, exist_ok=True)
                path.unlink(missing_ok=True)  # its memory may be a snapshot's by now, under another name
                self._fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
            os.ftruncate(self._fd, size)
            self._map = mmap.mmap(self._fd, size)
            # Or the first copy would end the process by SIGBUS where memory is short.
            if not mapped or not _populate(_address(self._map), size):
                os.posix_fallocate(self._fd, 0, size)
        except OSError as error:
            self._forget()
            raise Incomplete(
                f"host memory for a copy of this rank's state, {size} bytes, can't be had: {error}"
            ) from None
        self.size = size
        self._pinned = False

    @property
    def path(self) -> str:
        """Where another process of this user opens it."""
        return str(self._named) if self._named is not None else f"/proc/{os.getpid()}/fd/{self._fd}"

    def tensor(self, offset: int, piece: TensorPiece) -> torch.Tensor:
        """The place of a piece, as a tensor of its dtype and shape."""
        import torch

        count = piece.box.elements
        dtype = getattr(torch, piece.dtype)
        if not count:
            return torch.empty(piece.box.shape, dtype=dtype)
        return torch.frombuffer(self._map, dtype=dtype, count=count, offset=offset).view(piece.box.shape)

    def write(self, offset: int, data: memoryview) -> None:
        """Put bytes at an offset."""
        self._map[offset : offset + len(data)] = data

    def pin(self, device: torch.device) -> None:
        """Lock the pages, so that a GPU copies into them by itself.

        Args:
            device: of this rank; a thread begins on the first one, where it would leave a context of its own.

        Raises:
            Incomplete: where the driver refuses, as under a limit of locked memory (`ulimit -l`).
        """
        import torch

        address = _address(self._map)
        with torch.cuda.device(device):
            code = torch.cuda.cudart().cudaHostRegister(address, self.size, _PORTABLE)
        if int(code):
            raise Incomplete(f"{self.size} bytes of host memory can't be page-locked: error {int(code)}")
        self._pinned = True

    def close(self) -> None:
        """Give the memory back, but for what has another name too."""
        import torch

        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(_address(self._map))
        with suppress(BufferError):  # a view that somebody still holds; the pages go with it
            self._map.close()
        self._forget()

    def _forget(self) -> None:
        """Close the file and take its name away."""
        if self._fd >= 0:
            os.close(self._fd)
            if self._named is not None:
                self._named.unlink(missing_ok=True)


def _address(memory: mmap.mmap) -> int:
    import torch

    return torch.frombuffer(memory, dtype=torch.uint8).data_ptr()


def _populate(address: int, size: int) -> bool:
    """Have the kernel map all pages now. The driver would ask for them one by one, and no kernel starts meanwhile.

    In pieces: within one call no other thread of the process can map or unmap memory, which reads, communicators and new
    threads do, and 6 GB take two seconds. Large pages are asked for, which are given, locked and taken back several times
    faster; whether there are any is the node's setting (`deploy/README.md`).

    Returns:
        False where the kernel doesn't know the advice (before Linux 5.14).

    Raises:
        OSError: where it hasn't the memory.
    """
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), _MADV_HUGEPAGE)  # refused where it knows none

    def ask(at: int) -> int:
        count = min(_PIECE, size - at)
        failed = madvise(ctypes.c_void_p(address + at), ctypes.c_size_t(count), _MADV_POPULATE_WRITE)
        return ctypes.get_errno() if failed else 0

    with ThreadPoolExecutor(_THREADS) as pool:
        errors = set(pool.map(ask, range(0, size, _PIECE))) - {0}
    if errors - {errno.EINVAL}:
        # The kernel says EFAULT where a write would have ended the process.
        code = errno.ENOSPC if errno.EFAULT in errors else max(errors)
        raise OSError(code, os.strerror(code))
    return not errors


class StagedCopy:
    """Live tensors on their way into a buffer.

    Args:
        buffer: at least `layout.size` bytes.
        layout: of the file.
        pieces: in the layout's order. They mustn't change before `settle` returns.
        device: where they live.
    """

    def __init__(
        self, buffer: Buffer, layout: ShardLayout, pieces: Sequence[TensorPiece], device: torch.device
    ) -> None:
        self._buffer, self._layout, self._pieces = buffer, layout, pieces
        self._done = threading.Event()
        self._failed: Exception | None = None
        self._cuda: torch.cuda.Event | None = self._enqueue(device) if device.type == "cuda" else None

    def _enqueue(self, device: torch.device) -> torch.cuda.Event:
        import torch

        stream = torch.cuda.Stream(device)
        stream.wait_stream(torch.cuda.current_stream(device))
        event = torch.cuda.Event()
        with torch.cuda.stream(stream), torch.no_grad():
            self._copy()
            event.record(stream)
        return event

    def _copy(self) -> None:
        for offset, piece in zip(self._layout.offsets, self._pieces, strict=False):
            if isinstance(piece.source, memoryview):
                self._buffer.write(offset, piece.source)
            else:
                self._buffer.tensor(offset, piece).copy_(piece.source.detach(), non_blocking=True)

    def run(self) -> None:
        """Copy, or wait until the device has; called once, by the thread that continues with the buffer."""
        try:
            if self._cuda is not None:
                self._cuda.synchronize()
            else:
                self._copy()
        except Exception as error:
            self._failed = error
            raise
        finally:
            self._done.set()

    def settle(self) -> None:
        """Have what comes next on this thread's stream wait until nothing live is read any more.

        A GPU's host doesn't wait: its stream does.
        """
        import torch

        if self._cuda is not None:
            torch.cuda.current_stream().wait_event(self._cuda)
        else:
            self._done.wait()


class Buffers:
    """The buffers of one rank: one, or two in turn where the last snapshot stays whole while the next is made.

    Args:
        device: where what is copied lives.
        folder: on a memory file system, where snapshots outlive the rank; None: memory without a name.
        word: tells this rank's files of this attempt apart in the folder.
    """

    def __init__(self, device: torch.device, folder: Path | None, word: str) -> None:
        self._device, self._folder, self._word = device, folder, word
        self._made: list[Buffer | None] = [None] if folder is None else [None, None]
        self._newest: Buffer | None = None

    def acquire(self, size: int) -> Buffer:
        """A buffer of so many bytes, or more where it has no name, which isn't the one of the newest snapshot.

        Raises:
            Incomplete: where the host has no room for it.
        """
        at = next(n for n, buffer in enumerate(self._made) if buffer is None or buffer is not self._newest)
        buffer = self._made[at]
        if buffer is None or buffer.size < size or (self._folder is not None and buffer.size != size):
            if buffer is not None:
                buffer.close()
                self._made[at] = None
            path = None if self._folder is None else self._folder / f".{self._word}.{at}"
            buffer = Buffer(size, path, mapped=self._device.type == "cuda")
            if self._device.type == "cuda":
                try:
                    buffer.pin(self._device)
                except BaseException:
                    buffer.close()  # or each save would take as much memory again
                    raise
            self._made[at] = buffer
        return buffer

    def prepare(self, size: int) -> None:
        """Get the memory before it is needed."""
        self.acquire(size)
        if self._folder is not None and self._made[1] is None:
            kept, self._newest = self._newest, self._made[0]
            self.acquire(size)
            self._newest = kept

    def retain(self, buffer: Buffer) -> None:
        """It holds the newest snapshot from now on."""
        self._newest = buffer

    def close(self) -> None:
        """Give the memory back, but for what a snapshot holds."""
        for buffer in self._made:
            if buffer is not None:
                buffer.close()
