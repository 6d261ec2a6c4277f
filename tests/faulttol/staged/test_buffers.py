"""Host memory for copies: what can't be had takes nothing."""

from __future__ import annotations

import mmap
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest

from faulttol.checkpoint.manifest import Incomplete
from tests.conftest import descriptors

torch = pytest.importorskip("torch")
from faulttol.staged import buffers as buffer_module  # noqa: E402
from faulttol.staged.buffers import Buffer, Buffers  # noqa: E402

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


@pytest.mark.parametrize("named", [False, True])
def test_memory_that_cannot_be_locked_is_given_back(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool
) -> None:
    """As under `ulimit -l`: each save asks anew, and would else take the size of the state again."""

    def refuse(self: Buffer, device: torch.device) -> None:
        raise Incomplete("host memory can't be page-locked: error 2")

    monkeypatch.setattr(Buffer, "pin", refuse)
    buffers, before = Buffers(torch.device("cuda"), tmp_path if named else None, "w"), descriptors()
    for _ in range(3):
        with pytest.raises(Incomplete, match="page-locked"):
            buffers.acquire(1 << 16)
    assert descriptors() <= before and list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("named", [False, True])
@pytest.mark.parametrize("call", ["os.posix_fallocate", "mmap.mmap"])
def test_memory_that_is_not_there_leaves_no_file_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, named: bool, call: str
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(call, full)
    buffers, before = Buffers(torch.device("cpu"), tmp_path if named else None, "w"), descriptors()
    for _ in range(3):
        with pytest.raises(Incomplete, match=r"65536 bytes, can't be had: .*No space left"):
            buffers.acquire(1 << 16)
    assert descriptors() <= before and list(tmp_path.iterdir()) == []


def test_pages_are_there_before_the_driver_asks_for_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    size, resident = (17 << 20) + 8192, list[int]()  # two pieces and a bit

    def lock(address: int, *_: object) -> int:
        lines = iter(Path("/proc/self/smaps").read_text().splitlines())
        next(line for line in lines if line.startswith(f"{address:x}-"))
        resident.append(int(next(line for line in lines if line.startswith("Rss:")).split()[1]) << 10)
        return 0

    monkeypatch.setattr(
        torch.cuda, "cudart", lambda: SimpleNamespace(cudaHostRegister=lock, cudaHostUnregister=lambda _: 0)
    )
    monkeypatch.setattr(torch.cuda, "device", lambda _: nullcontext())
    buffer = Buffer(size, tmp_path / "buffer", mapped=True)
    buffer.pin(torch.device("cuda", 0))
    buffer.close()
    assert resident == [size]


def test_memory_that_the_kernel_cannot_map_is_an_error_and_no_signal(tmp_path: Path) -> None:
    """A write to it would end the process by SIGBUS."""
    with (tmp_path / "short").open("wb+") as file:
        file.truncate(4096)
        memory = mmap.mmap(file.fileno(), 4096)
        file.truncate(0)
        with pytest.raises(OSError, match="No space left"):
            buffer_module._populate(buffer_module._address(memory), 4096)


def test_a_kernel_that_maps_none_at_once_still_gives_the_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(buffer_module, "_MADV_POPULATE_WRITE", 9999)
    buffer = Buffer(1 << 20, tmp_path / "buffer", mapped=True)
    assert (tmp_path / "buffer").stat().st_blocks * 512 >= 1 << 20
    buffer.close()
