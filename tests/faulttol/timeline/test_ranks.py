"""Real gloo ranks that trace themselves: what they wait for is told, and training is as without."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist

from configs.paths import RunPaths
from configs.rank import RankFiles
from configs.schema import ParallelConfig
from faulttol.timeline import command, trace
from faulttol.timeline.heat import coordinates
from faulttol.timeline.hooks import Tracing
from faulttol.timeline.reader import AttemptSteps
from faulttol.timeline.store import StepStore
from faulttol.timeline.trace import Op, WaitLane
from tests.faulttol.timeline.trace_events import problems
from tests.faulttol.timeline.traced_ranks import config_of, train
from trainer.parallel.mesh import dense_groups

pytestmark = [pytest.mark.dist, pytest.mark.timeout(240)]


def test_coordinates_are_those_of_the_trainers_mesh() -> None:
    for sizes in (
        {"pp": 2, "dp": 4, "cp": 1, "tp": 2, "ep": 4, "etp": 1},
        {"pp": 3, "dp": 2, "cp": 2, "tp": 2, "ep": 2, "etp": 2},
    ):
        world = sizes["pp"] * sizes["dp"] * sizes["cp"] * sizes["tp"]
        found = coordinates(sizes, np.arange(world))
        for rank in range(world):
            groups = dense_groups(ParallelConfig(**sizes), rank)
            for axis, places in found.items():
                assert groups[axis].index(rank) == places[rank], (sizes, rank, axis)


@pytest.fixture
def alone() -> None:
    """A process group of one."""
    yield
    if dist.is_initialized():
        dist.destroy_process_group()


def test_a_node_without_memory_for_names_trains_on(
    tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    tracing = Tracing.start(RankFiles(tmp_path, 0))
    try:
        monkeypatch.setattr("faulttol.timeline.hooks.write_groups", full)
        dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
        dist.all_reduce(torch.ones(3))
        monkeypatch.undo()
        dist.all_reduce(torch.ones(3), group=dist.new_group([0]))
    finally:
        tracing.stop()
    files = RankFiles(tmp_path, 0)
    assert len(trace.read(trace.trace_of(files)).records) >= 2
    assert len(trace.read_groups(trace.table_of(files))) == 2, "the next group names both"


def test_calls_are_traced_and_torch_is_left_as_it_was(tmp_path: Path, alone: None) -> None:
    from torch._C._distributed_c10d import ProcessGroup, Work

    before = {name: getattr(ProcessGroup, name) for name in dir(ProcessGroup) if not name.startswith("__")}
    waits = Work.wait
    files = RankFiles(tmp_path, 0)
    tracing = Tracing.start(files)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    x = torch.ones(1000)
    dist.all_reduce(x)
    work = dist.all_gather_into_tensor(torch.empty(1000), x, async_op=True)
    work.wait()
    work.wait()  # nothing more to wait for
    dist.all_reduce(x, async_op=True)  # nobody waits
    dist.barrier()
    tracing.stop()
    dist.all_reduce(x)
    found = trace.read(trace.trace_of(files)).records
    assert [(Op(row["op"]), row["bytes"], row["count"]) for row in found] == [
        (Op.ALL_REDUCE, 4000, 0), (Op.ALL_GATHER, 4000, 1), (Op.BARRIER, 0, 3),
    ]  # fmt: skip
    assert (found["issued"] <= found["began"]).all() and (found["began"] <= found["ended"]).all()
    assert trace.read_groups(trace.table_of(files))[int(found["group"][0])].ranks == range(1)
    after = {name: getattr(ProcessGroup, name) for name in dir(ProcessGroup) if not name.startswith("__")}
    assert after == before and Work.wait is waits


def test_waits_of_other_threads_hold_no_step_up(tmp_path: Path, alone: None) -> None:
    import threading

    files = RankFiles(tmp_path, 0)
    tracing = Tracing.start(files)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    other = threading.Thread(target=lambda: dist.all_reduce(torch.ones(3)))
    other.start()
    other.join()
    dist.all_reduce(torch.ones(3))
    tracing.stop()
    found = trace.read(trace.trace_of(files)).records
    assert (
        found["lane"].tolist() == [WaitLane.BESIDE, WaitLane.MAIN]
        and found["total"][0] == 0 < found["total"][1]
    )


def test_an_error_in_a_wait_goes_through(
    tmp_path: Path, alone: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._C._distributed_c10d import Work

    def lost(self: Work, *_: object) -> None:
        raise RuntimeError("Connection closed by peer")

    monkeypatch.setattr(Work, "wait", lost)
    files = RankFiles(tmp_path, 0)
    tracing = Tracing.start(files)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    with pytest.raises(RuntimeError, match="closed by peer"):
        dist.all_reduce(torch.ones(3))
    told = trace.read(trace.trace_of(files))
    tracing.stop()
    assert len(told.records) == 1 and told.waiting is None


def _train(folder: Path, steps: int, *words: str, **how: object) -> tuple[RunPaths, list[float]]:
    run = RunPaths(folder / "run")
    store = StepStore(run.attempt(1).root, "here", [0, 1], folder / "rings")
    codes = train(folder, config_of(folder, steps, *words), 2, store.append, **how)  # type: ignore[arg-type]
    store.close()
    assert codes == [0, 0]
    lines = [json.loads(line) for line in run.attempt(1).metrics.read_text().splitlines()]
    return run, [line["loss"] for line in lines if line["kind"] == "step"]


def test_a_slow_rank_computes_longer_and_the_other_waits_for_it(tmp_path: Path) -> None:
    """Both take as long; only what they do in it separates them."""
    late = 0.15
    run, losses = _train(tmp_path, 18, "parallel.dp=2", "checkpoint.every=9", slow=(1, 6, late))
    steps = AttemptSteps(run.attempt(1).root)
    assert steps.span == (1, 19)
    values = {
        name: steps.window(name, 8, 19, 18).mean for name in ("step", "compute", "wait", "data", "save")
    }
    middle = {name: np.median(part[:, -11:], axis=1) for name, part in values.items()}
    assert middle["compute"][1] - middle["compute"][0] > 0.6 * late
    assert middle["wait"][0] - middle["wait"][1] > 0.6 * late
    assert middle["step"][0] == pytest.approx(middle["step"][1], rel=0.1)
    parts = sum(values[name] for name in ("compute", "wait", "data", "save"))
    assert parts == pytest.approx(values["step"], rel=2e-3, abs=1e-5)
    assert (steps.window("save", 9, 10, 1).mean > 0).all()


def test_messages_between_stages_are_joined(tmp_path: Path) -> None:
    run, _ = _train(tmp_path, 6, "parallel.pp=2", "parallel.dp=1")
    out = tmp_path / "t.json"
    command.run(argparse.Namespace(run=str(run.root), attempt=None, steps="2:5", ranks=None, out=out))
    tree = json.loads(out.read_text())
    assert problems(tree) == []
    events = tree["traceEvents"]
    sends = [e for e in events if e.get("cat") == "send"]
    # 8 micro-batches there and back.
    assert len(sends) == 2 * 3 * 8 == len([e for e in events if e["ph"] == "f"])
    ends = {e["id"]: e for e in events if e["ph"] == "f"}
    for start in (e for e in events if e["ph"] == "s"):
        assert ends[start["id"]]["pid"] != start["pid"]
        assert ends[start["id"]]["ts"] >= start["ts"] - 1, "a message arrives after it was sent"
