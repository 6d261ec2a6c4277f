"""Numbers of answers worked out by hand: batches, rates, deadlines, and what the tables show of a device."""

from __future__ import annotations

import math
from dataclasses import replace
from datetime import datetime

import pytest

from configs.compose import compose
from configs.errors import UserError
from configs.hardware import HardwareConfig
from trainer.sizing.ask import catalogue, questions, screen
from trainer.sizing.ask.answer import CATALOGUE, answer, job_of
from trainer.sizing.ask.fit import fit
from trainer.sizing.memory import estimate as memory
from trainer.sizing.model import frameworks
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.model.layout import Layout
from trainer.sizing.search import auto, legal
from trainer.sizing.search.layouts import search
from trainer.sizing.search.legal import Task
from trainer.sizing.time import estimate as time

pytestmark = pytest.mark.unit

OLMOE = ["model=olmoe_1b_7b", "hardware=h100", "data.sequence=4096", "train.micro_batch=4"]
DAY = 86400.0


def device(name: str) -> HardwareConfig:
    return catalogue.device(name)


def mixtral(layout: Layout, **changes: object) -> TrainingJob:
    model = compose(["model=mixtral_8x7b"]).model
    made = TrainingJob(model, layout, 4096, 2, 1024, "bf16", zero=1, software=frameworks.megaray())
    return replace(made, **changes)  # type: ignore[arg-type]  # names and types are those of TrainingJob


def task(**changes: object) -> Task:
    model = compose(["model=mixtral_8x7b"]).model
    made = Task(model, 64, 4096, 1024, software=frameworks.megaray(), zero=(1,), micro_batch=1)
    return replace(made, **changes)  # type: ignore[arg-type]  # names and types are those of Task


# ---- one model on one device ----


def test_devices_of_a_node_that_is_not_full_are_used() -> None:
    made, _ = job_of(compose([*OLMOE, "parallel=auto"]), 12)
    assert (made.layout.ranks, made.node, made.global_batch) == (12, 8, 48)


def test_a_pipeline_gets_four_micro_batches_for_each_stage() -> None:
    made, _ = job_of(compose([*OLMOE, "parallel.pp=2"]), 4)
    assert (made.layout.dp, made.global_batch, made.micro_batches) == (2, 4 * 2 * 8, 8)


def test_experts_are_spread_over_context_ranks_too() -> None:
    made, _ = job_of(compose([*OLMOE, "parallel.ep=4", "parallel.cp=2"]), 4)
    assert (made.layout.dp, made.layout.cp, made.layout.ep) == (2, 2, 4)


def test_speed_is_model_flops_over_time() -> None:
    """Six FLOPs a weight, and attention's, for 16384 tokens; bf16 peaks at 989 TFLOP/s."""
    sized = answer(OLMOE, rates=CATALOGUE)
    assert sized.basis.startswith("catalogue")
    figures = sized.figures()
    token = figures["flops.token"].value
    assert 6e9 * 1.0 < token < 6e9 * 1.6  # 1.28 G weights for a token
    rate = token * 16384 / figures["time.micro_batch"].value
    assert figures["speed.rate"].value == pytest.approx(rate / 1e12)
    assert figures["speed.mfu"].value == pytest.approx(100 * rate / 989e12)
    hardware = {
        n.partition(".")[2]: (f.value, f.unit) for n, f in figures.items() if n.startswith("hardware.m")
    }
    assert hardware == {"memory_gib": (80.0, "GiB"), "memory_gbps": (3350.0, "GB/s")}
    network = figures["hardware.inter_node_gbps"]
    assert (network.value, network.unit) == (50.0, "GB/s")


def test_a_tensor_parallel_rank_does_its_share_of_a_micro_batch() -> None:
    figures = answer([*OLMOE, "parallel.tp=2"], rates=CATALOGUE).figures()
    work = figures["flops.token"].value * 16384 / 2
    assert figures["flops.micro_batch"].value == work
    assert figures["speed.rate"].value == pytest.approx(work / figures["time.micro_batch"].value / 1e12)


def test_fewer_gpus_than_a_layout_takes_are_refused_with_as_many_as_it_takes() -> None:
    with pytest.raises(UserError, match=r"--gpus 3 is not a multiple of tp\*pp\*cp=8; type --gpus 8"):
        job_of(compose([*OLMOE, "parallel.tp=8"]), 3)


# ---- what must change to fit ----


def test_what_changes_cost_and_save() -> None:
    made = mixtral(Layout(1, 64, 1, 8, 1, 1))
    changes, rates = fit(made, device("h100")).changes, auto.rates_of(device("h100"))
    before = time.parts(made, rates).step
    assert changes
    for change in changes:
        assert change.cost == pytest.approx(time.parts(change.job, rates).step / before - 1)
        assert change.job.layout.ranks == 64 and change.job.global_batch == 1024
    ep = [one.job.layout for one in fit(mixtral(Layout(1, 64, 1, 2, 1, 1)), device("h100")).changes]
    assert {(one.dp, one.ep) for one in ep if one.tp == one.pp == one.cp == 1} & {(64, 4), (64, 8)}


def test_of_what_is_not_enough_the_most_comes_first() -> None:
    saves = [change.saves for change in fit(mixtral(Layout(1, 8, 1, 8, 1, 1)), device("h100")).changes]
    assert len(saves) > 1 and saves == sorted(saves, reverse=True)


def test_a_pipelines_gradients_stay_whole() -> None:
    names = {name for c in fit(mixtral(Layout(2, 8, 1, 8, 1, 1)), device("h100")).changes for name in c.names}
    assert names and not names & {"parallel.zero=2", "parallel.zero=3"}


def test_the_fewest_doublings_of_ranks_are_told() -> None:
    made, h100 = mixtral(Layout(1, 8, 1, 8, 1, 1)), device("h100")
    other, rates = fit(made, h100).other, auto.rates_of(h100)
    assert other
    for ranks in (8, 16, 32):
        one = Task(made.model, ranks, 4096, 1024, "bf16", made.node, made.software)
        if (best := search(one, h100, rates, keep=1).best) is not None:
            assert other == best.job
            return
    raise AssertionError("nothing fits")


# ---- how many devices, and another device ----


def test_other_numbers_of_devices_have_other_layouts() -> None:
    """What is typed of the layout is the job's; the question is how the same batch runs best elsewhere."""
    sized = answer([*OLMOE, "parallel.ep=8"], gpus=16, rates=CATALOGUE)
    open_ = questions.task(sized)
    assert (open_.fixed, open_.ranks, open_.global_batch) == ({}, 16, 4 * 16)


def test_a_begun_step_is_a_whole_one() -> None:
    """A step is 1024 x 4096 tokens; ten of them and a token take eleven."""
    made = questions.fewest_devices(task(), device("h100"), 10 * 1024 * 4096 + 1, DAY)
    assert made.duration and made.expected and made.duration.derivation.startswith("11 steps")
    assert made.duration.value == pytest.approx(11 * made.expected.seconds)


def test_the_fewest_devices_are_those_of_trying_each_number() -> None:
    """A third or a half more at a time, in nodes of eight: 8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384."""
    made, h100 = task(global_batch=384, fixed={"tp": 1, "cp": 1, "etp": 1, "pp": 1}), device("h100")
    rates = auto.rates_of(h100)
    steps = math.ceil(1e11 / (384 * 4096))
    seconds: dict[int, float] = {}
    for ranks in (8, 16, 24, 32, 48, 64, 96, 128, 192, 256, 384):
        if best := search(replace(made, ranks=ranks), h100, rates, keep=1).best:
            seconds[ranks] = steps * best.seconds
    for limit in (seconds[96] * 1.01, seconds[64] * 1.01, seconds[192] * 1.01):
        wanted = min(ranks for ranks, took in seconds.items() if took <= limit)
        assert questions.fewest_devices(made, h100, 1e11, limit).ranks == wanted
    none = questions.fewest_devices(made, h100, 1e15, DAY)
    assert none.most == 384 and "not on up to 384 devices" in none.text()[0]


def test_more_devices_than_samples_share_one() -> None:
    """Eight samples go through eight replicas, or stages, at once; eight tensor- and two context-parallel ranks, of 2048 of
    4096 tokens, share each."""
    assert questions.fewest_devices(task(global_batch=8), device("h100"), 1e15, DAY).most == 8 * 8 * 2


def test_the_interval_of_the_number_is_that_of_the_time() -> None:
    """Just in time by the expected time is too late by the slow end, which more devices make up for."""
    before = questions.fewest_devices(task(), device("h100"), 2e11, 15 * DAY)
    assert before.duration
    made = questions.fewest_devices(task(), device("h100"), 2e11, 1.001 * before.duration.value)
    assert made.ranks and made.optimistic and made.conservative and made.duration
    assert made.optimistic <= made.ranks == before.ranks < made.conservative
    days = [f"{value / DAY:.1f}" for value in (made.duration.value, made.duration.low, made.duration.high)]
    assert f"{days[0]} days ({days[1]} to {days[2]})" in made.text()[0]


def test_a_day_lasts_until_its_end() -> None:
    now = datetime(2026, 11, 25, 18, 0)  # a Wednesday
    assert questions.parse_deadline("2026-11-30", now) == datetime(2026, 11, 30, 23, 59, 59)
    assert questions.parse_deadline("wednesday", now) == datetime(2026, 11, 25, 23, 59, 59)
    assert questions.parse_deadline("tuesday", now) == datetime(2026, 12, 1, 23, 59, 59)
    assert questions.parse_deadline("2026-11-30T12:00", now) == datetime(2026, 11, 30, 12, 0)


def test_the_other_device_has_its_own_nodes_and_the_expected_load() -> None:
    """Experts get 1.15 times the mean at most, whatever the job says."""
    made, h100 = mixtral(Layout(1, 64, 1, 8, 1, 1)), device("h100")
    link = device("h200").link.model_copy(update={"reach": 4})
    small = device("h200").model_copy(update={"devices_per_node": 4, "link": link})
    both = questions.compare_devices(made, task(), h100, small)
    assert both.here.best and both.there.best
    assert (both.here.best.job.node, both.there.best.job.node) == (8, 4)
    for side, node, one in ((both.here, 8, h100), (both.there, 4, small)):
        moved = replace(made, node=node, imbalance=legal.IMBALANCE)
        assert side.step == auto.predicted(moved, one)
        assert side.needed == memory.worst(moved, "cuda")[1].needed
    times = both.here.best.seconds / both.there.best.seconds
    assert f"h200 at its best is {times:.2f} times as fast as h100" in both.text()[-1]


def test_a_job_fits_there_with_the_expected_load() -> None:
    """There is room for even routing, and not for 1.15 times the mean."""
    made = mixtral(Layout(1, 64, 1, 8, 1, 1))
    even, full = (memory.worst(replace(made, imbalance=i), "cuda")[1].needed for i in (1.0, 1.15))
    small = device("h200").model_copy(update={"memory_gib": (even + full) / 2 / 2**30})
    assert (
        memory.fits(made, small)
        and not questions.compare_devices(made, task(), device("h100"), small).there.fits
    )


# ---- tables ----


def test_what_is_on_record_of_a_device_is_shown() -> None:
    rows = {label: value for label, value, _ in catalogue.rows(device("h100"))}
    assert rows["best matmul bf16"] == "794.5 TFLOP/s (80.3%) at 2048 x 2048 x 13312"  # 794.5 / 989
    assert rows["links"] == "nvlink switch, 18 links of 25 GB/s between 8 devices"
    assert rows["a device's rate in a group of"] == "2: 450, 4: 450, 8: 450 GB/s"
    assert rows["adapters of a node"] == "8 ConnectX-7 400G of 50 GB/s"
    mesh = {label: value for label, value, _ in catalogue.rows(device("mi300x"))}
    assert mesh["a device's rate in a group of"] == "2: 64, 4: 192, 8: 448 GB/s"
    low, high = device("mi300x").link.achieved_gbps or (0.0, 0.0)
    assert mesh["one link reached"] == (f"{low:g} to {high:g} GB/s" if low < high else f"{high:g} GB/s")


def test_the_overview_has_each_number_under_its_head() -> None:
    head, _ = catalogue.SUMMARY
    h100 = dict(zip(head, catalogue.summary(device("h100")), strict=True))
    assert h100 == {
        "device": "h100", "units": "132", "bf16": "989", "fp8": "1979", "best bf16": "794.5", "memory": "80",
        "HBM": "3350", "links": "450 switch", "net": "50",
    }  # fmt: skip
    assert catalogue.summary(device("mi300x"))[1] == "304/8"


@pytest.mark.parametrize(
    ("value", "unit", "said"),
    [
        (6.919e9, "1", "6.919 B"), (5e6, "1", "5 M"), (64, "1", "64"), (3 * 2**30, "bytes", "3 GiB"),
        (0.0123, "s", "12.3 ms"), (2e-7, "s", "0.2 us"), (1.5, "s", "1.5 s"), (4.2e13, "FLOP", "42 TFLOP"),
        (42.34, "%", "42.3 %"),
    ],
)  # fmt: skip
def test_values_have_units_that_people_read(value: float, unit: str, said: str) -> None:
    assert screen.in_unit(value, unit) == said


def test_the_largest_share_of_a_time_comes_first() -> None:
    sized = answer([*OLMOE, "parallel.ep=8"], gpus=8, rates=CATALOGUE)
    shares = [float(line.split()[-1][:-1]) for line in screen._shares(sized.speed["time"])]
    assert (
        len(shares) > 5
        and shares == sorted(shares, reverse=True)
        and sum(shares) == pytest.approx(100, abs=1)
    )


def test_each_device_has_its_own_column_and_the_costliest_rule_is_first() -> None:
    words = ["model=olmoe_1b_7b", "model.vocab=50257", "model.expert_width=1000"]
    both = [answer([*words, f"hardware={name}"], rates=CATALOGUE) for name in ("h100", "mi300x")]
    lines = list(screen.compared(both))
    table = lines[next(i for i, line in enumerate(lines) if line.split()[:2] == ["rule", "value"]) + 1 :]
    assert table[0].split()[0] == "vocabulary"
    for at, one in enumerate(both):
        for finding in one.findings:
            value = f"{finding.field.removeprefix('model.')} {finding.value}"
            row = next(line for line in table if line.split()[0] == finding.rule.name and value in line)
            cost = "?" if finding.cost is None else f"{finding.cost:.1f}"
            cells = row.replace(" %", "").split()[-2:]
            assert cells[at] == cost
