"""What the measurements of checkpoints measure, and what they say of it."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from faulttol.bench import reshard, save
from faulttol.bench.__main__ import main
from faulttol.bench.gang import BenchRank, RankFailed, run_ranks
from faulttol.bench.reshard import Load, ReshardResult
from faulttol.bench.save import SaveMedians, SaveSample
from faulttol.bench.state import boxes, elements, shapes
from faulttol.checkpoint.boxes import Box, coverage_error

# ---- pure ----


@pytest.mark.unit
@pytest.mark.parametrize("size", [1 << 22, 1 << 28, 4 << 30])
def test_the_state_has_about_the_size_that_was_asked_for(size: int) -> None:
    assert elements(shapes(size)) * 12 == pytest.approx(size, rel=0.12)


@pytest.mark.unit
@pytest.mark.parametrize("dim", [0, -1])
@pytest.mark.parametrize("world", [1, 2, 4, 8])
def test_ranks_have_each_element_once(world: int, dim: int) -> None:
    params = shapes(1 << 22)
    parts: dict[str, list[Box]] = {}
    for rank in range(world):
        for name, box in boxes(params, rank, world, dim):
            parts.setdefault(name, []).append(box)
    assert all(coverage_error(Box.full(params[name]), found) is None for name, found in parts.items())
    for name, found in parts.items():
        (shape,) = {box.shape for box in found}  # even
        assert shape[dim] == params[name][dim] // world


def _row(name: str, held: float, ratio: float = 1.0) -> SaveMedians:
    return SaveMedians(name, held, 1.0, ratio, 1.0, ratio, 1 << 30)


_ROWS = [
    _row("ours", 0.3, 1.1), _row("ours waiting", 3.0, 1.25), _row("DeepSpeed", 4.0), _row("DCP save", 5.0),
    _row("DCP async thread", 0.5), _row("DCP async process", 0.4),
]  # fmt: skip


@pytest.mark.unit
def test_ours_is_held_against_the_best_of_the_others() -> None:
    found = {bar.what: (round(bar.ratio, 3), bar.kept) for bar in save.bars(_ROWS)}
    assert found == {
        "held, of DeepSpeed's": (0.075, True),
        "held, of DCP async process's": (0.75, False),
        "durable, of plain writing, beside training": (1.1, True),
        "durable, of plain writing, training waits": (1.25, False),
    }
    assert save.bars(_ROWS[2:]) == [], "ours wasn't measured"


@pytest.mark.unit
def test_a_row_is_of_medians_and_of_ratios_save_by_save() -> None:
    samples = [
        SaveSample(1.0, 1.0, 2.0, 1.0, 10),
        SaveSample(3.0, 1.2, 8.0, 8.0, 11),
        SaveSample(2.0, 1.1, 9.0, 3.0, 12),
    ]
    assert save._row("ours", samples) == SaveMedians("ours", 2.0, 1.1, 8.0, 3.0, 2.0, 12)


@pytest.mark.unit
def test_a_report_names_what_was_missed() -> None:
    spec = save.SaveSpec(4 << 30, 4, 3, 2.0, Path("."))
    lines = save.report(spec, _ROWS).splitlines()
    assert lines[0].startswith("4.00 GiB of fp32 masters and moments, 4 ranks, 3 saves each")
    assert [line.split()[0] for line in lines if " most " in line] == ["ok", "MISSED", "ok", "MISSED"]
    told = json.loads(json.dumps(save.plain_data(spec, _ROWS)))
    assert [bar["kept"] for bar in told["bars"]] == [True, False, True, False]
    assert told["rows"][0]["held"] == 0.3


_FOUND = ReshardResult(
    [Load("experts whole", 2.0, 100, 100, 10 << 20), Load("columns of each", 5.0, 106, 100, 300 << 20)], 1e9, 100, 9.0, 2.0
)  # fmt: skip


@pytest.mark.unit
def test_a_load_is_held_against_speed_bytes_and_memory() -> None:
    assert [(round(bar.value, 2), bar.kept) for bar in reshard.bars(_FOUND)] == [
        (5.5, True), (1.0, True), (10.0, True), (2.2, False), (1.06, False), (300.0, False),
    ]  # fmt: skip
    spec = reshard.ReshardSpec(1 << 30, 4, 2, Path("."))
    lines = reshard.report(spec, _FOUND).splitlines()
    assert [line.split()[0] for line in lines[-6:]] == ["ok"] * 3 + ["MISSED"] * 3
    assert "1.00 GB/s: the ceiling" in "\n".join(lines)
    assert json.loads(json.dumps(reshard.plain_data(spec, _FOUND)))["loads"][1]["read"] == 106


@pytest.mark.unit
@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["save", "--path", "{here}/none"], "--path={here}/none isn't a folder: make it, or name another"),
        (["reshard", "--gib", "0"], "--gib=0 must be above 0: type more than 0"),
        (["save", "--path", "{here}", "--only", "theirs"], "--only=theirs is not a contestant: type of 'ours', "),
        (["save", "--path", "{here}", "--gib", "1e6"], "MiB are needed: name another folder, or type a smaller --gib"),
        (["reshard", "--path", "{here}", "--gib", "1e6"], "MiB are needed: name another folder, or type a smaller"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], words: list[str], why: str
) -> None:
    assert main([word.format(here=tmp_path) for word in words]) == 2
    told = capsys.readouterr().err
    assert why.format(here=tmp_path) in told and told.count("\n") == 1


class _Stub:
    """A place of one rank, a loop, a contestant and a plain writer that tell what they are told to."""

    rank, background, seconds, tensors = 0, True, 2.0, ()

    def __init__(self, root: Path) -> None:
        self._root = root

    def all(self, item: Any) -> list[Any]:
        return [item]

    def broadcast(self, item: Any) -> Any:
        return item

    def begin(self, step: int = 0) -> None: ...

    def remove(self) -> None: ...

    def durable(self) -> float:
        return time.monotonic() + 100.0

    def folder(self) -> Path:
        return self._root

    def step(self) -> tuple[float, float]:
        return 2.0, 0.0

    def until(self, over: Any) -> tuple[list[float], float]:
        return [2.0, 4.0], 50.0


@pytest.mark.unit
def test_a_wait_before_the_state_may_change_is_time_held(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(bytes(10))
    stub: Any = _Stub(tmp_path)
    sample = save._sample(stub, stub, stub, stub, 1)
    assert 50.0 <= sample.held < 100.0 <= sample.durable
    assert (sample.slow, sample.plain, sample.bytes) == (1.5, 2.0, 10)
    stub.background = False
    sample = save._sample(stub, stub, stub, stub, 1)
    assert sample.held < 50.0 and sample.slow == 1.0


# ---- on ranks ----


def _all_of_ours(place: BenchRank, root: Path) -> Any:
    """What ranks do in both measurements of ours, in one process."""
    samples = {}
    for kind in ("ours", "ours waiting", "DCP save"):
        (root / kind).mkdir()
        samples[kind] = save._measure(place, kind, save.SaveSpec(1 << 22, place.world, 1, 0.01, root / kind))
    again = reshard.ReshardSpec(1 << 22, place.world, place.world, root)
    reshard._save_ours(place, replace(again, root=root / "again"))
    loads = [reshard._load_ours(place, replace(again, root=root / "again"), dim) for dim in (0, -1)]
    return samples, loads, reshard._read_plainly(place, replace(again, root=root / "again"))


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_ours_is_measured(tmp_path: Path) -> None:
    (tmp_path / "again").mkdir()
    ((samples, loads, (count, seconds)),) = run_ranks(1, _all_of_ours, tmp_path)
    size = elements(shapes(1 << 22)) * 12
    for found in samples.values():
        (sample,) = found  # the first isn't counted
        assert size < sample.bytes < size * 1.2
        assert min(sample.held, sample.plain, sample.durable) > 0
    assert samples["ours waiting"][0].slow == 1.0 != samples["ours"][0].slow
    waiting, dcp = samples["ours waiting"][0], samples["DCP save"][0]
    assert waiting.held >= 0.9 * waiting.durable and dcp.held >= 0.9 * dcp.durable
    assert all(load.needed == size <= load.read < size * 1.2 for load in loads)
    assert all(0 <= load.extra < 256 << 20 for load in loads)
    assert size < count < size * 1.2 and seconds > 0


def _wrong_values(place: BenchRank, root: Path) -> None:
    spec = reshard.ReshardSpec(1 << 22, 1, 1, root)
    reshard._save_ours(place, spec)
    right = reshard.share

    def other(*arguments: Any) -> Any:
        shares = right(*arguments)
        shares[3].tensor.view(-1)[0] = 5.0
        return shares

    reshard.share = other  # type: ignore[assignment]
    reshard._load_ours(place, spec, 0)


@pytest.mark.dist
@pytest.mark.timeout(300)
def test_a_wrong_load_is_no_measurement(tmp_path: Path) -> None:
    with pytest.raises(RankFailed, match=r"blocks.0.experts.down\[.*\] was loaded wrong"):
        run_ranks(1, _wrong_values, tmp_path)
