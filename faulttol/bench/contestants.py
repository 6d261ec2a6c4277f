"""Ways to save the same state: ours, and those of torch's distributed checkpoint."""

from __future__ import annotations

import os
import shutil
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from faulttol.bench.gang import BenchRank
from faulttol.bench.state import Share
from faulttol.checkpoint.manifest import Identity, Incomplete
from faulttol.checkpoint.pieces import owned
from faulttol.checkpoint.retention import Retention
from faulttol.staged.saver import SavePolicy, Saver

if TYPE_CHECKING:
    from torch import Tensor

_CHUNK = 16 << 20


class Contestant(Protocol):
    """One way to save, on one rank."""

    background: bool
    """Whether training continues while it writes."""

    @property
    def tensors(self) -> Sequence[Tensor]:
        """The live state, all of which each step changes."""

    def begin(self, step: int) -> None:
        """Save; training continues when it returns."""

    def settle(self) -> None:
        """Training changes the state when it returns."""

    def durable(self) -> float | None:
        """When the save that was begun last was whole on storage, as `time.monotonic` counts; None: not yet."""

    def folder(self) -> Path:
        """Where that save lies."""

    def close(self) -> None:
        """Give back what it holds."""


class Ours:
    """This project's `Saver`: with a writer process beside training, or waited for."""

    def __init__(self, place: BenchRank, shares: Sequence[Share], root: Path, background: bool) -> None:
        import torch

        self.background = background
        self.tensors = [share.tensor for share in shares]
        self._shares, self._root = shares, root / "ours"
        identity = Identity("bench", 1, {"dp": place.world}, place.rank, place.world)
        policy = SavePolicy(str(self._root), Retention(1), background=background)
        self._saver = Saver(policy, identity, place, place.store, torch.device("cpu"))
        self._saver.prepare(owned(shares))
        self._began = 0.0
        self._durable: float | None = None

    def begin(self, step: int) -> None:
        """Save; see `Contestant`."""
        self._durable, self._began = None, time.monotonic()
        self._saver.stage(step, owned(self._shares), {})

    def settle(self) -> None:
        """Wait for the copy; see `Contestant`."""
        self._saver.settle()

    def durable(self) -> float | None:
        """When it was committed; see `Contestant`.

        Raises:
            Incomplete: where it failed.
        """
        for outcome in self._saver.poll():
            if outcome.error is not None:
                raise Incomplete(str(outcome.error))
            self._durable = self._began + outcome.seconds
        return self._durable

    def folder(self) -> Path:
        """See `Contestant`."""
        return self._root

    def close(self) -> None:
        """End the writer."""
        self._saver.close()


class Dcp:
    """torch's `dcp.save`, and `async_save` whose stager copies in a thread: pinned memory and streams need a GPU.

    Args:
        kind: `save`, `thread` or `process`: who writes.
    """

    def __init__(self, place: BenchRank, shares: Sequence[Share], root: Path, kind: str) -> None:
        import torch.distributed as dist
        from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor import DTensor, Shard

        self.background = kind != "save"
        self.tensors = [share.tensor for share in shares]
        self._place, self._root, self._kind = place, root / "dcp", kind
        mesh = init_device_mesh("cpu", (place.world,))
        self._state = {
            s.name: DTensor.from_local(s.tensor, mesh, [Shard(_cut_dim(s))], run_check=False) for s in shares
        }
        self._group = dist.new_group(backend="gloo")  # its collectives in a thread mustn't meet training's
        options = StagingOptions(
            use_pinned_memory=False,
            use_shared_memory=True,
            use_async_staging=True,
            use_non_blocking_copy=False,
        )
        self._stager: Any = DefaultStager(options) if self.background else None
        self._response: Any = None
        self._step = 0
        self._durable: float | None = None

    def begin(self, step: int) -> None:
        """Save; see `Contestant`."""
        import torch.distributed.checkpoint as dcp
        from torch.distributed.checkpoint.state_dict_saver import AsyncCheckpointerType

        if self._place.rank == 0:
            shutil.rmtree(self._root, ignore_errors=True)
        self._step, self._durable = step, None
        if not self.background:
            dcp.save(self._state, checkpoint_id=str(self.folder()), process_group=self._group)
            self._durable = time.monotonic()
            return
        types = {"thread": AsyncCheckpointerType.THREAD, "process": AsyncCheckpointerType.PROCESS}
        self._response = dcp.async_save(
            self._state,
            checkpoint_id=str(self.folder()),
            process_group=self._group,
            async_checkpointer_type=types[self._kind],
            async_stager=self._stager,
        )
        self._response.upload_completion.add_done_callback(lambda _: self._done())

    def _done(self) -> None:
        self._durable = time.monotonic()

    def settle(self) -> None:
        """Wait for the copy; see `Contestant`."""
        if self._response is not None:
            self._response.staging_completion.result()

    def durable(self) -> float | None:
        """When it was written and fsynced, which its writer does by itself; see `Contestant`."""
        if self._durable is not None and self._response is not None:
            self._response.upload_completion.result()
        return self._durable

    def folder(self) -> Path:
        """See `Contestant`."""
        return self._root / str(self._step)

    def close(self) -> None:
        """End its threads."""
        if self._stager is not None:
            self._stager.close()


def _cut_dim(share: Share) -> int:
    """The dim that ranks share a tensor along."""
    return next((d for d, n in enumerate(share.box.shape) if n != share.box.whole[d]), 0)


class PlainFile:
    """The live bytes written to one file a rank and fsynced: what storage takes, without what a checkpoint needs."""

    def __init__(self, tensors: Sequence[Tensor], path: Path, background: bool) -> None:
        self._tensors, self._path, self._background = tensors, path, background
        self._thread: threading.Thread | None = None
        self.seconds: float | None = None
        """Until it was durable; None before."""

    def begin(self) -> None:
        """Write, in a thread where it is to be in the background."""
        self.seconds = None
        if not self._background:
            self._write()
            return
        self._thread = threading.Thread(target=self._write, daemon=True)
        self._thread.start()

    def _write(self) -> None:
        import torch

        began = time.monotonic()
        with self._path.open("wb", buffering=0) as file:
            for tensor in self._tensors:
                data = tensor.detach().view(-1).view(torch.uint8).numpy().data
                for at in range(0, len(data), _CHUNK):
                    file.write(data[at : at + _CHUNK])
            os.fsync(file.fileno())
        self.seconds = time.monotonic() - began

    def remove(self) -> None:
        """Give the room back."""
        if self._thread is not None:
            self._thread.join()
        self._path.unlink()


def fsync_all(folder: Path) -> None:
    """Make durable what somebody wrote without fsync."""
    for path in [*folder.rglob("*"), folder]:
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
        finally:
            os.close(fd)


def size_of(folder: Path) -> int:
    """Bytes of all files in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
