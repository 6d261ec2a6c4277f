"""One shape under several layouts: what was measured beside what was forecast, also for the rows of the fullest rank."""

from __future__ import annotations

import math
import re
from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from configs.errors import UserError
from configs.schema import RunConfig
from tests.trainer.test_bench import CPU, options
from trainer.batch_loader import BatchLoader
from trainer.bench import command, routing, variants
from trainer.bench.cases import config_of
from trainer.bench.measure import Times
from trainer.cli import main

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]


def test_the_fullest_rank_is_that_of_each_layer() -> None:
    """Two layers of four experts on two ranks: 6 of 8 rows on the first, 5 of 9 on the second."""
    load = torch.tensor([[4, 2, 1, 1], [2, 2, 0, 5]])
    assert routing.max_over_mean_rows(load, 2) == pytest.approx((6 / 4 + 5 / 4.5) / 2)
    assert routing.max_over_mean_rows(load, 4) == pytest.approx((4 / 2 + 5 / 2.25) / 2)
    assert routing.max_over_mean_rows(load, 1) == 1.0


def on_two_ranks(*words: str) -> RunConfig:
    """Of experts that two devices with known rates have."""
    given = options("hardware=h200", "train.precision=bf16", *words, model="qwen3_30b_a3b")
    return config_of(given, 2, on_gpu=True)


def test_a_forecast_is_for_the_rows_of_the_fullest_rank() -> None:
    expected, even, uneven = (
        variants.forecast(on_two_ranks("parallel.ep=2"), 2, one) for one in (None, 1.0, 1.87)
    )
    assert even[0] is not None and expected[0] is not None and uneven[0] is not None
    assert even[0] < expected[0] < uneven[0] and even[1] < expected[1] < uneven[1]


def test_a_row_has_a_forecast_for_the_rows_that_were_measured_too() -> None:
    config = on_two_ranks("parallel.ep=2")
    milliseconds = {
        imbalance: f"{1e3 * (variants.forecast(config, 2, imbalance)[0] or 0):.1f}"
        for imbalance in (None, 1.0, 1.87)
    }
    (line,) = variants.report_lines("a", config, 2, variants.Outcome(Times([2.5]), None, 1.87))
    assert "; load imbalance 1.87, forecast " in line and line.endswith(" at that")
    assert re.findall(r"forecast ([0-9.]+) ms", line) == [milliseconds[None], milliseconds[1.87]]
    (lent,) = variants.report_lines(
        "a",
        on_two_ranks("parallel.ep=2", "parallel.lend_rows=9"),
        2,
        variants.Outcome(Times([2.5]), None, 1.87),
    )
    assert lent.endswith("; load imbalance 1.87 before lending")
    (even,) = variants.report_lines("a", config, 2, variants.Outcome(Times([2.5]), None, 1.0), "balanced")
    assert "imbalance" not in even
    assert re.findall(r"forecast ([0-9.]+) ms", even) == [milliseconds[1.0]]
    assert len({*milliseconds.values()}) == 3


@pytest.mark.parametrize(("ep", "fullest"), [(2, 1.5), (1, None)])
def test_the_rows_of_the_fullest_rank_are_those_of_a_step(
    ep: int, fullest: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    class AxisSizes(dict[str, Any]):
        device = CPU

    class CountedEngine:
        data_parallel = SimpleNamespace(index=0, size=1)

        def __init__(self, *_: object) -> None: ...
        def step(self, *_: object) -> Any:
            return SimpleNamespace(expert_load=torch.tensor([[3, 3, 1, 1]]))

    monkeypatch.setattr(command, "NativeEngine", CountedEngine)
    config = config_of(options("data.sequence=16"), 1, on_gpu=False)
    assert (
        command._native(options(), config, cast(Any, AxisSizes(ep=SimpleNamespace(size=ep)))).fullest
        == fullest
    )


def test_each_variant_is_shown_with_its_own_routing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Balanced rows are as many as were forecast."""
    outcome = variants.Outcome(Times([2.5]), None, 1.0)
    monkeypatch.setattr(command, "_native", lambda *_: outcome)
    monkeypatch.setattr(variants, "mesh_of_layout", lambda mesh, _: mesh)
    cases = [
        command._Case(kind, replace(options(), routing=kind), on_two_ranks("parallel.ep=2"))
        for kind in ("balanced", "zipf")
    ]
    head, *table = command._variant_lines(cases, cast(Any, SimpleNamespace(device=CPU, world=2, node=2)))
    assert head.startswith("2 x CPU") and len(table) == 4
    assert ["imbalance" in line for line in table] == [line.startswith("zipf") for line in table]


def test_variants_are_overrides_on_top() -> None:
    """A word without a dot is an axis, but for the bench's own."""
    found = variants.parse(
        "ep=2 | routing=zipf tp=2 | layers=3 optim.kind=muon overlap=off feed=inline",
        options("train.micro_batch=2"),
    )
    assert [one.options.overrides for one in found] == [
        ("train.micro_batch=2", "parallel.ep=2"), ("train.micro_batch=2", "parallel.tp=2"),
        ("train.micro_batch=2", "optim.kind=muon"),
    ]  # fmt: skip
    assert [one.options.routing for one in found] == ["real", "zipf", "real"]
    assert [one.options.layers for one in found] == [2, 2, 3]
    assert [one.options.overlap for one in found] == [True, True, False]
    assert [one.options.feed for one in found] == ["device", "device", "inline"]


@pytest.mark.parametrize(("text", "why"), [
    ("ep=1 | routing=ziff", "routing=ziff doesn't exist .did you mean 'zipf'.*; use one of real"),
    ("routing=", "routing= doesn't exist"), ("layers=x", "layers=x is not a whole number above 0; type e.g. layers=8"),
    ("layers=0", "layers=0 is not"), ("layers", "layers= is not"),
    ("feed=outline", "feed=outline doesn't exist .did you mean 'inline'"),
    ("overlap=of", "overlap=of doesn't exist; type overlap=on or overlap=off"),
])  # fmt: skip
def test_a_variant_that_does_not_exist_is_refused(text: str, why: str) -> None:
    with pytest.raises(UserError, match=why):
        variants.parse(text, options())


@pytest.mark.parametrize(("text", "name"), [
    ("ep=2 ep=4", "ep"), ("parallel.ep=2 ep=4", "ep"), ("routing=zipf routing=real", "routing"), ("auto auto", "auto"),
    ("optim.kind=muon optim.kind=adamw", "optim.kind"),
])  # fmt: skip
def test_a_setting_that_a_variant_has_twice_is_refused(text: str, name: str) -> None:
    """The last one won, in silence."""
    with pytest.raises(UserError, match=f"--variants '{text}' has {name} twice; type it once, or separate"):
        variants.parse(f"tp=1 | {text}", options())
    assert len(variants.parse("ep=2 tp=2 | ep=4 tp=2", options())) == 2


@pytest.mark.parametrize(("words", "reason"), [
    (["--variants", "zero=1 | tpp=2"], "--variants 'tpp=2': unknown field 'parallel.tpp' (did you mean 'parallel.tp'?)"),
    (["--variants", "tp=x"], "--variants 'tp=x': parallel.tp='x' is not a whole number"),
    (["--variants", "tp=2"], "--variants 'tp=2': --gpus 1 doesn't divide by parallel.pp*cp*tp=2"),
    (["--variants", "zero=1", "parallel.tp=2"], "megaray: --gpus 1 doesn't divide by parallel.pp*cp*tp=2"),
    (["--variants", "zero=1", "train.setps=2"], "megaray: unknown field 'train.setps' (did you mean 'train.steps'?)"),
])  # fmt: skip
def test_an_error_of_the_configuration_names_its_variant(
    words: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """But not one of what all variants have."""
    assert main(["bench", "--model", "demo", "--baselines", "none", *words]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("megaray: ") and reason in line


def test_the_planner_sets_the_axes_of_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layout fills the ranks, and what else it settled is in the configuration."""
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100 80GB HBM3")
    asked = options("train.global_batch=16", model="qwen3_30b_a3b")
    config, said = variants.resolve(variants.parse("auto", asked)[0].options, 4, True)
    sizes = [config.parallel.size(axis) for axis in ("pp", "dp", "cp", "tp")]
    assert math.prod(sizes) == 4 and f"parallel.dp={sizes[1]}" in said
    seconds, size = variants.forecast(config, 4)
    assert seconds is not None and 0.01 < seconds < 10 and 1e9 < size < 1e12


def test_the_planner_plans_for_the_routing_of_the_variant(monkeypatch: pytest.MonkeyPatch) -> None:
    """On four H200, ep 4 and dp 4 took 161.5 and 188.1 ms of balanced routing; of real text's 177.9 where hot experts were
    lent and 197.7 where they weren't, and 189.9."""
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H200")
    chosen = {}
    for kind in ("balanced", "real"):
        asked = options("train.global_batch=16", "model.vocab=25600", model="qwen3_30b_a3b")
        variant = variants.parse(f"auto routing={kind} layers=8", asked)[0]
        config, _ = variants.resolve(variant.options, 4, True)
        chosen[kind] = config.parallel.size("ep"), config.parallel.lend_rows
    assert chosen == {"balanced": (4, None), "real": (4, 2048)}


def test_a_table_of_variants_has_a_line_each(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    alone: list[object] = []
    read: list[bool] = []
    started = BatchLoader.started
    monkeypatch.setattr(BatchLoader, "started", lambda *a, **k: read.append(k["ahead"]) or started(*a, **k))
    monkeypatch.setattr(
        "trainer.bench.command.without_overlap", lambda device: alone.append(device) or nullcontext()
    )
    words = ["bench", "--model", "demo", "--baselines", "none", "--steps", "1", "--layers", "2"]
    table = "feed=ahead | feed=inline | optim.kind=muon overlap=off"
    assert main([*words, "--variants", table, "data.sequence=16", "model.vocab=256"]) == 0
    assert alone == [torch.device("cpu")] and read == [True, False]
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("optim.kind=muon ") for line in lines) == 2 and "no forecast" in lines[-1]
    assert sum(line.startswith(("feed=ahead ", "feed=inline ")) for line in lines) == 4
    assert main(["bench", "--model", "demo", "--variants", "zero=1"]) != 0


def test_a_word_without_a_value_names_the_variant() -> None:
    with pytest.raises(UserError, match="--variants 'tp=2 ep': ep has no value; type e.g. ep=2"):
        variants.parse("auto | tp=2 ep", options())


def test_rows_that_are_never_lent_are_a_note(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--model", "demo", "--layers", "1", "--steps", "1", "--baselines", "none", "data.sequence=16"]
    assert main(["bench", *words, "hardware=cpu", "parallel.lend_rows=64"]) == 0
    assert "note: parallel.lend_rows=64 lends nothing with parallel.ep=1" in capsys.readouterr().out
    assert main(["bench", *words, "hardware=cpu", "--variants", "lend_rows=64 | zero=1"]) == 0
    assert capsys.readouterr().out.count("note: parallel.lend_rows=64 lends nothing") == 2
