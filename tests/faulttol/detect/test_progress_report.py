"""Signs of real ranks over gloo: what they have entered, and what they stand in."""

from __future__ import annotations

import sys
import threading
import time
from multiprocessing.connection import Connection
from pathlib import Path

import pytest

from configs.rank import free_port
from faulttol import progress_report
from tests.forks import forks


def _rank(rank: int, port: int, folder: str, asked: Connection[object, object]) -> None:
    import torch
    import torch.distributed as dist

    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=3)
    pair = dist.new_group([0, 2], use_local_synchronization=True, group_desc="pair") if rank != 1 else None
    teller = progress_report.ProgressReporter(Path(folder) / f"{rank}", remote=rank == 1)
    box = torch.ones(1)
    while (word := asked.recv()) != "end":
        if word == "tell":
            teller.write()
        elif word == "start":
            teller.start()
        elif word == "world":
            dist.all_reduce(box)
        elif word == "pair":
            dist.all_reduce(box, group=pair)
        elif word == "receive":
            dist.recv(box, 0)
        asked.send("done")
    asked.send("done")


@pytest.mark.dist
@pytest.mark.timeout(120)
def test_ranks_tell_what_they_have_entered_and_what_they_wait_in(tmp_path: Path) -> None:
    port = free_port()
    ends, ranks = [], []
    for rank in range(3):
        ours, theirs = forks().Pipe()
        ends.append(ours)
        ranks.append(forks().Process(target=_rank, args=(rank, port, str(tmp_path), theirs), daemon=True))
        ranks[-1].start()

    def say(word: str, *who: int, wait: bool = True) -> None:
        for rank in who:
            ends[rank].send(word)
        for rank in who if wait else ():
            assert ends[rank].poll(60) and ends[rank].recv() == "done"

    def told(rank: int) -> progress_report.ProgressReport:
        found = progress_report.read(tmp_path / str(rank))
        assert found is not None
        return found

    say("world", 0, 1, 2)
    say("pair", 0, 2)
    say("tell", 0, 1, 2)
    counts = [
        {group.name.split()[0]: (list(group.ranks), group.entered, group.left) for group in told(r).groups}
        for r in range(3)
    ]
    assert counts[0] == counts[2] == {"group": ([0, 1, 2], 1, 1), "pair": ([0, 2], 1, 1)}
    assert counts[1] == {"group": ([0, 1, 2], 1, 1)}
    assert [told(r).remote for r in range(3)] == [False, True, False] and not told(0).waits
    assert {g.name for g in told(0).groups} == {g.name for g in told(2).groups}, (
        "members know a group by one name"
    )

    say("start", 0, 1, 2)
    say("world", 0, wait=False)
    say("receive", 1, wait=False)
    end = time.monotonic() + 60
    waits = ["all_reduce", "recv", ""]
    while [
        found.waits if (found := progress_report.read(tmp_path / str(r))) else None for r in range(3)
    ] != waits:
        assert time.monotonic() < end
        time.sleep(0.1)
    world = {rank: next(g for g in told(rank).groups if g.name.startswith("group")) for rank in range(3)}
    assert (world[0].entered, world[0].left) == (2, 1), "it is inside of its second"
    assert (world[2].entered, world[2].left) == (1, 1) and told(2).waits == ""
    for process in ranks:
        process.kill()
        process.join()


@pytest.mark.unit
@pytest.mark.timeout(30)
def test_without_torch_there_are_no_groups_and_no_fault(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "torch.distributed", raising=False)
    teller = progress_report.ProgressReporter(tmp_path / "00000.signs")
    teller.write()
    told = progress_report.read(tmp_path / "00000.signs")
    assert told is not None and told.groups == () and told.waits == ""
    assert [path.name for path in tmp_path.iterdir()] == ["00000.signs"]


@pytest.mark.unit
@pytest.mark.timeout(30)
def test_a_teller_goes_on_after_its_own_fault_and_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress_report, "INTERVAL", 0.01)
    tried = threading.Event()
    monkeypatch.setattr(progress_report, "_groups", lambda _: tried.set() or 1 / 0)
    teller = progress_report.ProgressReporter(tmp_path / "s")
    teller.start()
    assert tried.wait(20)
    monkeypatch.undo()
    monkeypatch.setattr(progress_report, "INTERVAL", 0.01)
    end = time.monotonic() + 20
    while progress_report.read(tmp_path / "s") is None:
        assert time.monotonic() < end
        time.sleep(0.01)
    teller.stop()
    assert not teller._thread.is_alive()


@pytest.mark.unit
@pytest.mark.timeout(30)
@pytest.mark.parametrize("content", [b"", b"{", b'{"time_ns": 1}', b"[]", b'{"groups": [[]]}'])
def test_what_is_no_sign_says_nothing(tmp_path: Path, content: bytes) -> None:
    assert progress_report.read(tmp_path / "none") is None
    (tmp_path / "s").write_bytes(content)
    assert progress_report.read(tmp_path / "s") is None


@pytest.mark.unit
@pytest.mark.timeout(30)
def test_evenly_spaced_ranks_take_little_room() -> None:
    assert progress_report._compact(range(0, 12288, 8)) == ["range", 0, 12281, 8]
    assert progress_report._compact([5]) == ["range", 5, 6, 1]
    assert progress_report._compact([0, 1, 4]) == ["list", 0, 1, 4]


@pytest.mark.unit
@pytest.mark.timeout(30)
def test_a_url_is_remote_and_a_path_is_not() -> None:
    assert progress_report.is_remote(None, "s3://bucket/x") and progress_report.is_remote("gs://x")
    assert not progress_report.is_remote(None, "/data/x", "file:///data/x", "")
