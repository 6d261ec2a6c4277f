"""`python -m trainer size`: what it prints, where its numbers are from, and what is refused in one line."""

from __future__ import annotations

import json
import subprocess
import sys
from datetime import UTC, datetime

import pytest

from configs.errors import USER_ERROR_EXIT, UserError
from trainer import cli
from trainer.sizing.ask import questions, screen
from trainer.sizing.ask.answer import CATALOGUE, answer

pytestmark = pytest.mark.unit

OLMOE = ["model=olmoe_1b_7b", "hardware=mi300x"]
NOW = datetime(2026, 11, 25, 12, 0, tzinfo=UTC)


def typed(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    assert cli.main(["size", *words]) == 0
    return capsys.readouterr().out


def test_the_screen_has_counts_time_memory_and_lint(capsys: pytest.CaptureFixture[str]) -> None:
    text = typed(capsys, *OLMOE, "model.vocab=50257", "model.expert_width=1000", "--profile", CATALOGUE)
    lines = text.splitlines()
    assert lines[0] == "olmoe_1b_7b on mi300x: 4 x 4096 tokens, bf16, one device"
    assert "assumed: data.sequence=4096 train.micro_batch=4" in lines[1]
    for section in ("PARAMETERS", "ONE DEVICE", "LINT"):
        assert any(line.startswith(section) for line in lines)
    assert all(len(line) <= screen.WIDTH for line in lines), max(lines, key=len)
    costs = [
        line.split()[0]
        for line in lines
        if line.strip().startswith(tuple("0123456789")) and " % " in line[:12]
    ]
    assert [float(c) for c in costs] == sorted((float(c) for c in costs), reverse=True) and len(costs) >= 3
    assert "vocab=50304" in text and "matrix multiplication guide" in text
    assert next(line.split() for line in lines if line.strip().startswith("total"))[1:3] == ["6.768", "B"]


def test_golden_counts_of_zaya1(capsys: pytest.CaptureFixture[str]) -> None:
    tree = json.loads(typed(capsys, "model=zaya1_base", "hardware=mi300x", "--json"))
    counts = {
        name: figure["value"] for name, figure in tree["figures"].items() if name.startswith("parameters")
    }
    assert counts["parameters.total_without_embeddings"] / 1e9 == pytest.approx(8.30, abs=0.005)
    assert counts["parameters.active_without_embeddings"] / 1e9 == pytest.approx(0.753, abs=0.001)
    assert tree["lint"] and tree["unpriced"] is None and tree["rates"].startswith("catalogue")


def test_suggestions_are_shown_with_what_they_save(capsys: pytest.CaptureFixture[str]) -> None:
    text = typed(capsys, "model=olmoe_1b_7b", "hardware=h200", "model.vocab=50257", "--suggest")
    assert "SUGGESTIONS  time saved per token on h200" in text and "model.vocab=50304" in text
    none = typed(capsys, "model=olmoe_1b_7b", "hardware=b300", "--suggest")
    assert "SUGGESTIONS  none: b300 has no number of compute units on record" in none
    assert "LINT  without costs" in none and "no time: b300" in none


def test_two_devices_side_by_device_forecast(capsys: pytest.CaptureFixture[str]) -> None:
    lines = typed(capsys, "model=olmoe_1b_7b", "model.vocab=50257", "--compare", "h200,mi300x").splitlines()
    head = next(line for line in lines if line.split() == ["h200", "mi300x"])
    assert head and all(len(line) <= screen.WIDTH for line in lines)
    stride = next(line.split() for line in lines if line.strip().startswith("stride"))
    assert stride[-2:] == [".", "?"]
    trees = json.loads(typed(capsys, "model=demo", "--compare", "h200,mi300x", "--json"))
    assert [tree["hardware"] for tree in trees] == ["h200", "mi300x"]


def test_every_number_has_an_origin(capsys: pytest.CaptureFixture[str]) -> None:
    words = [*OLMOE, "parallel.ep=8", "model.vocab=50257"]
    names = [line.split()[0] for line in typed(capsys, *words, "--explain").splitlines()]
    assert len(names) > 40 and len(set(names)) == len(names)
    figures = answer(words).figures()
    assert names == list(figures)
    for name in names:
        first, *rest = screen.explained(figures, name)
        assert first.startswith(f"{name} = ") and rest and rest[0].strip().startswith("= "), name
    tree = typed(capsys, *words, "--explain", "speed.mfu").splitlines()
    assert tree[0].startswith("speed.mfu = ") and any("AMD Instinct MI300X" in line for line in tree)
    assert any("tiles of" in line for line in tree) and all(len(line) <= screen.WIDTH + 24 for line in tree)
    assert typed(capsys, "--explain", *words).splitlines()[0].startswith("parameters.total")


def test_a_typed_peak_is_said_to_be_typed(capsys: pytest.CaptureFixture[str]) -> None:
    text = typed(capsys, *OLMOE, "hardware.peak_tflops.bf16=1000", "--explain", "hardware.peak_tflops.bf16")
    assert text.splitlines()[0] == "hardware.peak_tflops.bf16 = 1000 TFLOP/s"
    assert "typed on the command line" in text


def test_a_layout_for_gpus_is_searched_and_explained(capsys: pytest.CaptureFixture[str]) -> None:
    text = typed(capsys, *OLMOE, "--gpus", "16")
    assert "STEP  16 devices" in text and "parallel=auto" in text and "tokens/s, MFU" in text
    fixed = typed(capsys, *OLMOE, "--gpus", "16", "parallel.tp=2")
    assert "dp=8, tp=2" in fixed.splitlines()[0] and "parallel=auto" not in fixed


def test_the_planners_questions(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["model=olmoe_1b_7b", "hardware=h100", "train.global_batch=512", "--gpus", "8", "parallel.ep=8"]
    text = typed(capsys, *words, "--fit", "--on", "mi300x", "--by", "30d", "--tokens", "100B")
    for title in ("WHAT MUST CHANGE TO FIT", "WHAT mi300x WOULD DO", "HOW MANY DEVICES BY 30d"):
        assert title in text
    tree = json.loads(
        typed(capsys, *words, "--fit", "--on", "mi300x", "--by", "30d", "--tokens", "100B", "--json")
    )
    assert set(tree["on"]) == {"h100", "mi300x"} and tree["by"]["devices"] >= 8 and "changes" in tree["fit"]
    span = typed(capsys, *words, "--by", "30d", "--tokens", "100B", "--explain", "time.run")
    assert span.startswith("time.run = ")


def test_numbers_of_tokens() -> None:
    assert [questions.parse_tokens(text) for text in ("300B", "1.5T", "3e11", "5m")] == [
        3e11,
        1.5e12,
        3e11,
        5e6,
    ]


def test_the_hardware_table_and_the_rules(capsys: pytest.CaptureFixture[str]) -> None:
    table = typed(capsys, "--hardware-table")
    assert table.splitlines()[2].strip().startswith("a100") and "[datasheet]" in table
    one = json.loads(typed(capsys, "--hardware-table", "mi300x", "--json"))
    assert one[0]["compute_units"] == 304
    rules = typed(capsys, "--rules")
    assert "because" in rules and "listed only" in rules


REFUSED = {
    "no model": (["hardware=h100"], "model= is missing; type model= one of"),
    "no hardware": (["model=demo"], "hardware= is missing; type hardware= one of"),
    "an unknown model": (["model=olmoe", "hardware=h100"], "model=olmoe is not a preset"),
    "an unknown device": (["model=demo", "hardware=h1000"], "did you mean 'h100'?"),
    "an unknown field": ([*OLMOE, "model.hiden=3"], "did you mean 'model.hidden'?"),
    "a field out of range": ([*OLMOE, "model.layers=0"], "model.layers=0 must be above 0"),
    "no number of gpus": ([*OLMOE, "--gpus", "x"], "'x' is not a whole number above 0"),
    "gpus beyond memory": ([*OLMOE, "--gpus", "99999999999"], "'99999999999' is above 10000000"),
    "ranks beyond memory": (
        [*OLMOE, "parallel.dp=99999999999"],
        "parallel.dp=99999999999 must be at most 10000000",
    ),
    "nodes beyond memory": (
        [*OLMOE, "cluster.nodes=99999999999"],
        "cluster.nodes=99999999999 must be at most",
    ),
    "layers without end": (
        [*OLMOE, "model.layers=99999999999"],
        "model.layers=99999999999 must be at most 100000",
    ),
    "experts without end": (
        [*OLMOE, "model.experts=99999999999"],
        "model.experts=99999999999 must be at most 100000",
    ),
    "gpus that don't divide": ([*OLMOE, "--gpus", "3", "parallel.tp=2"], "type --gpus 2"),
    "gpus and a layout of others": (
        [*OLMOE, "--gpus", "8", "parallel.dp=4"],
        "--gpus 8 is not dp*tp*pp*cp=4",
    ),
    "gpus that ep doesn't divide": (
        [*OLMOE, "--gpus", "4", "parallel.ep=8"],
        "ep*etp=8 does not divide dp*cp*tp=4",
    ),
    "an unknown number": ([*OLMOE, "--explain", "speed.mfo"], "did you mean 'speed.mfu'?"),
    "one device to compare": (["model=demo", "--compare", "h100"], "names 1 device"),
    "an unknown device to compare": (["model=demo", "--compare", "h100,mi30x"], "no device mi30x"),
    "an unknown device in the table": (["--hardware-table", "h101"], "did you mean 'h100'?"),
    "an unknown profile": ([*OLMOE, "--profile", "nope"], "profile nope is not there"),
    "a profile of another device": ([*OLMOE, "--profile", "h100"], "is of hardware=h100"),
    "a date without tokens": ([*OLMOE, "--by", "friday"], "--by and --tokens go together"),
    "no date": ([*OLMOE, "--by", "soon", "--tokens", "1T"], "--by soon is not a date"),
    "no tokens": ([*OLMOE, "--by", "friday", "--tokens", "many"], "--tokens many is not a number of tokens"),
    "an unknown device to be on": ([*OLMOE, "--on", "h101"], "--on h101: no such device"),
    "a device without memory": (["model=demo", "hardware=cpu", "--fit"], "has no memory on record"),
    "an unknown option": ([*OLMOE, "--sugest"], "'--sugest' is not an option"),
    "a file that isn't there": (["--config", "/nope.yaml"], "cannot read configuration /nope.yaml"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_wrong_is_refused_in_one_line(case: str, capsys: pytest.CaptureFixture[str]) -> None:
    words, said = REFUSED[case]
    assert cli.main(["size", *words]) == USER_ERROR_EXIT
    printed = capsys.readouterr()
    assert printed.out == "" and said in printed.err
    assert printed.err.startswith("megaray: ") and printed.err.count("\n") == 1


def test_an_unknown_command_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["sise"]) == USER_ERROR_EXIT
    assert "did you mean 'size'?" in capsys.readouterr().err


def test_a_deadline_that_has_passed_is_refused() -> None:
    with pytest.raises(UserError, match="has passed"):
        questions.devices_by_deadline(answer(OLMOE), "2026-01-01", "1T", NOW)


def test_sizing_loads_nothing_heavy() -> None:
    program = (
        "import sys; from trainer import cli; "
        "code = cli.main(['size', 'model=demo', 'hardware=h100', '--suggest', '--profile', 'catalogue']); "
        "print(code, sorted({'torch', 'ray', 'deepspeed', 'wandb', 'numpy'} & set(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.stderr.strip() == "0 []"


@pytest.mark.parametrize(
    ("act", "words"),
    [
        ("_size", ["size", *OLMOE]),
        ("_bench", ["bench"]),
        ("_validate", ["validate"]),
        ("_forecast", ["forecast", "x"]),
        ("_run", ["run"]),
    ],
)
def test_ctrl_c_is_one_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, act: str, words: list[str]
) -> None:
    def interrupted(*_: object) -> int:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, act, interrupted)
    try:
        code = cli.main(words)
    except KeyboardInterrupt:  # it would end all tests
        pytest.fail("Ctrl-C gets past the command line")
    assert code == 130
    assert capsys.readouterr() == ("", "megaray: interrupted\n")


@pytest.mark.parametrize(
    ("words", "note"),
    [
        ("parallel.schedule=zbv parallel.pp=2", "the trainer doesn't run this: parallel.lend_rows=64 with parallel."),
        ("parallel.etp=2", "the trainer doesn't run this: parallel.lend_rows=64 with parallel.etp=2"),
        ("parallel.ep=1", "parallel.lend_rows=64 lends nothing with parallel.ep=1"),
        ("parallel.lend_rows=99999999", "parallel.lend_rows=99999999 lends nothing with at most 32768 tokens"),
        ("parallel.tp=2", ""),
    ],
)  # fmt: skip
def test_a_layout_that_the_trainer_refuses_or_a_setting_without_effect_is_said(
    capsys: pytest.CaptureFixture[str], words: str, note: str
) -> None:
    call = [
        "model=demo",
        "hardware=h100",
        "--gpus",
        "4",
        "parallel.ep=2",
        "parallel.lend_rows=64",
        *words.split(),
    ]
    notes = json.loads(typed(capsys, *call, "--json"))["notes"]
    assert [one[: len(note)] for one in notes] == ([note] if note else [])
    assert ("  note: " in typed(capsys, *call)) == bool(note)
