"""Which library's calls move data: the one that torch has loaded, on a group's own communicator, or torch's own."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist

from collectives.ops import nccl
from collectives.ops.groups import GroupPartition
from collectives.store import metadata
from collectives.timing import team
from collectives.timing.team import Team
from configs.compose import compose
from configs.library_environment import Applied

pytestmark = [pytest.mark.dist, pytest.mark.timeout(60)]

GPU = torch.device("cuda", 1)
ROW = "7f10-7f20 r-xp 00000000 08:01 4711       {}\n"
"""A line of /proc/self/maps."""
OTHERS = "7f00-7f10 rw-p 00000000 00:00 0\n" + ROW.format("/usr/lib/libnccl-net.so")
"""Memory of no file, and NCCL's plug-in for networks, which has none of its calls."""


class OpenedLibrary:
    """What `ctypes` gives for a path."""

    def __init__(self, path: str) -> None:
        self.path, self.ncclGetErrorString = path, SimpleNamespace(restype=ctypes.c_int)


@pytest.fixture
def maps(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, bool], OpenedLibrary | None]:
    """What is found of a library that is loaded when torch is first asked for its version, where torch keeps its
    communicators or doesn't."""
    path = tmp_path / "maps"

    def found(name: str, keeps: bool) -> OpenedLibrary | None:
        path.write_text(OTHERS)

        def load() -> None:
            path.write_text(OTHERS + ROW.format(name) * bool(name))

        monkeypatch.setattr(nccl, "_MAPS", path)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda.nccl, "version", load)
        monkeypatch.setattr(dist, "is_nccl_available", lambda: True)
        kept = SimpleNamespace(**{nccl._HANDLE: 1} if keeps else {})
        monkeypatch.setattr(dist, "ProcessGroupNCCL", kept, raising=False)
        monkeypatch.setattr(ctypes, "CDLL", OpenedLibrary)
        return cast(Any, nccl.loaded).__wrapped__()

    return found


@pytest.mark.parametrize("name", ["/a venv/nvidia/nccl/lib/libnccl.so.2", "/opt/rocm/lib/librccl.so.1.0"])
def test_the_library_that_torch_has_loaded_is_the_one_that_is_called(
    name: str, maps: Callable[[str, bool], OpenedLibrary | None]
) -> None:
    opened = maps(name, True)
    assert opened is not None and opened.path == name
    assert opened.ncclGetErrorString.restype is ctypes.c_char_p
    assert maps(name, False) is None, "of a torch that keeps its communicators"
    assert maps("", True) is None, "of a torch that has it built in"
    assert maps("/usr/lib/libnccl-tuner.so", True) is None


def test_no_list_of_what_is_loaded_means_no_library(
    maps: Callable[[str, bool], OpenedLibrary | None], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    maps("/usr/lib/libnccl.so.2", True)
    monkeypatch.setattr(nccl, "_MAPS", tmp_path / "nowhere")
    assert cast(Any, nccl.loaded).__wrapped__() is None


class LazyGroup:
    """A process group whose communicator is made by its first collective."""

    def __init__(self, backend: str) -> None:
        self.backend, self.handle, self.reduced = backend, 0, list[torch.device]()

    def _get_backend(self, device: torch.device) -> Any:
        assert device == GPU
        return SimpleNamespace(**{nccl._HANDLE: lambda: self.handle})

    def reduce(self, one: torch.Tensor) -> None:
        self.handle = 4711
        self.reduced.append(one.device)


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> OpenedLibrary:
    """A library that was found."""
    one = OpenedLibrary("libnccl.so.2")
    monkeypatch.setattr(nccl, "loaded", lambda: one)
    monkeypatch.setattr(dist, "get_backend", lambda group: group.backend)
    monkeypatch.setattr(dist, "all_reduce", lambda one, group: group.reduce(one))
    monkeypatch.setattr(torch, "zeros", lambda *_, device: SimpleNamespace(device=device))
    return one


def test_a_communicator_that_does_not_exist_yet_is_made_once(opened: OpenedLibrary) -> None:
    group = LazyGroup("nccl")
    for _ in range(2):
        assert nccl.communicator(cast(Any, group), GPU) == nccl.Communicator(cast(Any, opened), 4711)
    assert group.reduced == [GPU]


@pytest.mark.usefixtures("opened")
def test_groups_of_other_backends_and_devices_go_through_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert nccl.communicator(cast(Any, LazyGroup("gloo")), GPU) is None
    assert nccl.communicator(cast(Any, LazyGroup("nccl")), torch.device("cpu")) is None
    monkeypatch.setattr(nccl, "loaded", lambda: None)
    assert nccl.communicator(cast(Any, LazyGroup("nccl")), GPU) is None


def test_a_member_has_its_groups_communicator_and_an_idle_rank_asks_for_none(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked_of: list[tuple[Any, torch.device]] = []
    monkeypatch.setattr(
        team, "communicator", lambda group, device: asked_of.append((group, device)) or "a communicator"
    )
    partition = GroupPartition("pairs1", ((0, 3), (1, 2)))
    members = []
    for group in ("the second pair's", None):
        one = object.__new__(Team)
        one.rank, one.device = cast(Any, SimpleNamespace(rank=2, world=5)), GPU
        one._groups = {partition.groups: cast(Any, group)}
        members.append(one.membership(partition))
    first, idle = members
    assert first is not None and (first.ranks, first.index) == ((1, 2), 1)
    assert first.communicator == "a communicator" and idle is None
    assert asked_of == [("the second pair's", GPU)]


@pytest.mark.usefixtures("opened")
def test_a_record_says_whose_calls_moved_data(monkeypatch: pytest.MonkeyPatch) -> None:
    def calls(backend: str) -> str:
        met: Any = SimpleNamespace(
            backend=backend, nodes=[0, 0], members=members, rank=SimpleNamespace(world=2), network=Applied()
        )
        made = metadata.collect(
            compose(["workload=collectives"]), met, cast(Any, SimpleNamespace(name="drawn")),
            GroupPartition("world", ((0, 1),)), {}, [],
        )  # fmt: skip
        return str(made.method["calls"])

    names = (
        "hostname", "address", "machine", "kernel", "cores", "host_memory_bytes", "device_info", "pid", "device",
        "device_hex",
    )  # fmt: skip
    members = [dict.fromkeys(names, "x") | {"rank": rank} for rank in range(2)]
    monkeypatch.setattr(metadata, "_nccl_version", lambda: (2, 28, 9))
    of_torch = "torch.distributed's"
    own = f"{of_torch}, but for all_to_allv, gather, scatter, sendrecv, broadcast the library's own"
    assert (calls("nccl"), calls("gloo")) == (own, of_torch)
    monkeypatch.setattr(nccl, "loaded", lambda: None)
    assert calls("nccl") == of_torch
