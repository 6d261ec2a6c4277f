"""The study: metrics by hand, readers on extracts of the published tables, data lint, the report, and its command."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import UserError
from trainer.cli import main
from trainer.sizing.model import parameters
from trainer.sizing.model.job import TrainingJob
from trainer.study import (
    baselines,
    cases,
    lint,
    metrics,
    models,
    nanotron,
    published,
    report,
    score,
    sweeps,
    vtrain,
)
from trainer.study.cases import Row
from trainer.study.validate import validate

pytestmark = pytest.mark.unit

EXTRACTS = Path(__file__).parent / "published"


def rows(name: str) -> list[Row]:
    return cases.read(EXTRACTS / f"{name}.csv")


def changed(name: str, pick: Callable[[Row], bool], **values: str) -> list[Row]:
    """An extract, its first picked row altered."""
    out = [dict(row) for row in rows(name)]
    next(row for row in out if pick(row)).update(values)
    return list(out)


# ---- metrics ----


def test_errors_by_hand() -> None:
    errors = metrics.errors([1.1, 0.8, 2.0], [1.0, 1.0, 1.0])
    assert errors is not None
    assert (errors.rows, errors.most) == (3, 1.0)
    assert errors.mean == pytest.approx((0.1 + 0.2 + 1.0) / 3) and errors.median == pytest.approx(0.2)
    assert errors.bias == pytest.approx((1.1 * 0.8 * 2.0) ** (1 / 3))
    assert metrics.errors([], []) is None


def test_kendalls_tau_by_hand() -> None:
    assert metrics.kendall([1, 2, 3, 4], [10, 20, 30, 40]) == 1
    assert metrics.kendall([1, 2, 3, 4], [4, 3, 2, 1]) == -1
    assert metrics.kendall([1, 2, 3, 4], [1, 2, 4, 3]) == pytest.approx(4 / 6)
    # One tie in the prediction: 5 concordant pairs of 6, tau-b = 5 / sqrt(5 * 6).
    assert metrics.kendall([1, 1, 2, 3], [1, 2, 3, 4]) == pytest.approx(5 / (5 * 6) ** 0.5)
    assert metrics.kendall([1, 1], [1, 2]) is None


def test_regret_pairs_and_classes_by_hand() -> None:
    assert metrics.regret([3, 1, 2], [80, 50, 100]) == pytest.approx(0.2)
    assert metrics.right_pairs([1, 2, 3], [1, 3, 2]) == (2, 3)
    assert metrics.right_pairs([1, 1], [1, 2]) == (0, 1)
    classes = metrics.classified([True, False, False, True], [True, False, True, False])
    assert (
        classes is not None and classes.accuracy == 0.5 and classes.precision == 0.5 and classes.recall == 0.5
    )
    assert metrics.inside([1, 1], [2, 2], [1.5, 3]) == 0.5


# ---- readers ----


def test_a_step_of_the_sweep_is_its_samples_over_its_speed() -> None:
    sweep = nanotron.cases(rows("nanotron"))
    timed = [case for case in sweep.cases if case.seconds]
    # 256 samples of 4096 tokens at 15,565 tokens a second on each of 8 GPUs.
    one = next(case for case in timed if "14098549" in case.key)
    assert one.job.global_batch == 256 and one.seconds == pytest.approx(8.421, abs=0.001)
    ranked = sorted(timed, key=lambda case: int(case.key.rpartition(" ")[2]))
    assert ranked[0].calibrates and sum(case.calibrates for case in timed) < len(timed) / 2
    assert [case.fits for case in sweep.cases].count(False) == 6


def test_the_sweeps_own_flops_are_counted_as_it_counts_them() -> None:
    for row, case in zip(rows("nanotron"), nanotron.cases(rows("nanotron")).cases, strict=True):
        work, speed = cases.number(row, "mTFLOPs"), cases.number(row, "tok/s/gpu")
        if work and speed:
            assert case.flops_per_token == pytest.approx(work * 1e12 / speed, rel=0.01)


def test_a_rows_own_benchmark_sets_the_latency_of_its_network() -> None:
    row = dict(next(row for row in rows("nanotron") if row["nodes"] == "32.0"))
    hardware = nanotron.cases([row]).cases[0].rates.hardware
    slow, fast = nanotron.fabric(row, hardware), nanotron.fabric(row | {"AllGather (GB/s)": "75"}, hardware)
    assert slow.low_latency is None, "the benchmark's latency is that of the protocol which NCCL took"
    assert 8 * slow.step + slow.hop == pytest.approx(0.6e-3, rel=0.15)
    assert fast.step < slow.step / 4


def test_vtrains_tables_are_told_apart_by_their_gpus() -> None:
    one, many = vtrain.cases(rows("vtrain_single")), vtrain.cases(rows("vtrain_multi"))
    assert (one.table, many.table) == ("vtrain_single_node", "vtrain_multi_node")
    assert {case.job.recompute for case in one.cases} == {"none"}
    assert {case.job.recompute for case in many.cases} == {"full"}
    assert sum(case.calibrates for case in one.cases) == vtrain.CALIBRATION_ROWS
    assert not any(case.calibrates for case in many.cases)


def test_a_step_time_that_is_not_printed_follows_from_its_mfu() -> None:
    blocks = {
        made.table: made
        for made in published.cases(
            changed("published", lambda r: "T2" in r["source"], iter_time_s="", tokens_per_s="")
        )
    }
    case = blocks["megascale"].cases[0]
    assert case.seconds == pytest.approx(40.0, rel=0.005)
    assert baselines.at_peak(case) / case.seconds == pytest.approx(0.53)


def test_what_a_table_does_not_print_is_skipped_and_counted() -> None:
    blocks = {
        made.table: made
        for made in published.cases(changed("published", lambda r: r["block"] == "megascale", tp=""))
    }
    assert len(blocks["megascale"].cases) == 7 and blocks["megascale"].skipped == {"tp not printed": [2]}


def row_of(**values: str) -> Row:
    """A row of Megatron-Bridge's tables, of which nothing is missing, but for what is given."""
    printed = {"source": "Megatron-Bridge 26.06", "model": "Llama3.1-405B", "seq": "8192", "gpus": "256",
               "gpu_type": "GB200", "tp": "4", "pp": "16", "dp": "4", "vpp": "8", "micro_batch": "1",
               "global_batch": "1536", "precision": "mxfp8",
               "iter_time_s": "62.774", "tokens_per_s": "200448", "notes": "cp=1", "block": "mbridge"}  # fmt: skip
    return (
        dict.fromkeys((*published.COLUMNS, "ep", "ffn", "heads", "vocab", "tflops_per_gpu"), "")
        | printed
        | values
    )


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"model": "Nemotron_3_Nano"}, "state-space layers"),
        ({"model": "Unheard-of-9B"}, "neither printed in full nor on record"),
        ({"gpu_type": "TPUv4"}, "TPUv4 isn't in the catalogue"),
        ({"precision": "nvfp4"}, "4-bit matmuls"),
        ({"source": "A blog"}, "isn't on record"),
        ({"pp": "", "tp": ""}, "tp, pp not printed"),
        ({"global_batch": "", "iter_time_s": ""}, "global batch not printed"),
        ({"gpus": "100"}, "don't divide"),
        ({"micro_batch": "5"}, "doesn't divide over dp=4"),
        ({"iter_time_s": "", "tokens_per_s": ""}, "neither step time nor tokens"),
        ({"source": "Primus pipeline v-half"}, "isn't modelled"),
        ({"source": "KempnerForge moe_packed"}, "one after the other"),
        ({"source": "MegaScale T3 ablation", "notes": "+magic"}, "step of MegaScale's ablation"),
    ],
)
def test_each_row_without_a_forecast_has_its_reason(values: dict[str, str], reason: str) -> None:
    (block,) = published.cases([row_of(**values)])
    ((why, lines),) = block.skipped.items()
    assert not block.cases and reason in why and lines == [2]


def test_rows_of_each_software_are_set_up_as_their_sources_say() -> None:
    def job(**values: str) -> TrainingJob:
        (block,) = published.cases([row_of(**values)])
        assert block.cases, block.skipped
        return block.cases[0].job

    bridge = job()
    assert bridge.precision == "fp8" and bridge.interleave == 8 and bridge.node == 64 and bridge.zero == 1
    assert job(notes="cp=1; fsdp=4").zero == 3
    titan = job(
        source="torchtitan",
        notes="full AC asyncTP",
        gpus="512",
        pp="8",
        micro_batch="32",
        tp="8",
        global_batch="",
    )
    assert (titan.recompute, titan.micro_batch, titan.global_batch, titan.layout.dp) == ("full", 1, 256, 8)
    mpt = {"source": "llm-foundry MPT", "model": "30b", "block": "llmfoundry", "tp": "1", "pp": "1", "gpus": "8", "vpp": "",
           "gpu_type": "a100_40gb", "precision": "bf16", "global_batch": "168"}  # fmt: skip
    shard = job(**mpt, notes="FULL_SHARD AC=True")
    assert (shard.zero, shard.recompute, shard.model.hidden, shard.model.gated) == (3, "full", 7168, False)
    assert job(**mpt, notes="SHARD_GRAD_OP AC=False").zero == 2
    kimi = job(model="Kimi-K2", tp="1", pp="4", ep="64", vpp="4", global_batch="4096")
    assert (
        kimi.layout.ep == 64
        and kimi.layout.etp == 1
        and kimi.model.experts == 384
        and kimi.model.attention == "mla"
    )
    primus = job(source="Primus pipeline zbv", model="Llama2-7B", gpu_type="MI300X", gpus="8", pp="8", tp="1", seq="",
                 global_batch="", micro_batch="", vpp="", precision="bf16")  # fmt: skip
    assert primus.zero_bubble and primus.model.layers == 16 and primus.micro_batches == 32
    jax = job(source="DGXC MaxText", model="Llama2-70B", gpu_type="H100-80G", gpus="64", pp="1", tp="1", vpp="", seq="4096",
              micro_batch="2", global_batch="128", precision="bf16")  # fmt: skip
    assert jax.recompute == "full"  # 80 layers of 8,192 tokens don't fit otherwise
    steps = [job(source="MegaScale T3 ablation", model="GPT-175B", layers="96", hidden="12288", ffn="49152", heads="128",
                 vocab="64000", gpu_type="A100-80G", tp="8", pp="8", vpp="6", seq="2048", global_batch="256",
                 precision="bf16", notes=note)  # fmt: skip
             for note in ("baseline", "+parallel transformer block", "+sliding window attn",
                          "+efficient operators")]  # fmt: skip
    assert [one.model.parallel_block for one in steps] == [False, True, True, True]
    assert [one.model.window for one in steps] == [0, 0, 512, 512]
    assert [one.software.flash_attention for one in steps] == [False, False, False, True]
    assert steps[3].software.overlap_tp and not steps[2].software.overlap_tp


def test_a_measured_step_follows_from_what_is_printed() -> None:
    def seconds(**values: str) -> float:
        (block,) = published.cases([row_of(**values)])
        return block.cases[0].seconds or 0.0

    assert seconds() == 62.774
    assert seconds(iter_time_s="") == pytest.approx(1536 * 8192 / 200448)
    bare = {"iter_time_s": "", "tokens_per_s": ""}
    by_rate, by_mfu = seconds(**bare, tflops_per_gpu="1976"), seconds(**bare, mfu=str(100 * 1976 / 5000))
    assert by_rate == pytest.approx(by_mfu) and by_rate == pytest.approx(62.774, rel=0.06)
    assert published.batch(row_of(global_batch="", iter_time_s="14.81", tokens_per_s="35405"), 4096) == 128


def test_the_published_shapes_have_their_published_counts() -> None:
    """Billions of parameters, all and active, as the models' cards round them."""
    for name, whole, active in (
        ("Mixtral-8x22B", 141, 39), ("Kimi-K2", 1027, 32.8), ("DeepSeek-V2", 236, 21), ("DeepSeek-V2-Lite", 15.7, 2.66),
        ("Qwen3-235B-A22B", 235, 22), ("GPT-OSS-120B", 117, 5.7), ("GPT-OSS-20B", 20.9, 4.2), ("DBRX", 132, 36.5),
        ("Grok-1", 316, 86), ("Phi-3.5-MoE", 41.9, 6.6), ("Llama3.1-405B", 405.8, 405.8), ("Llama3-13B", 14.84, 14.84),
        ("Llama4-Scout", 107.8, 17.2), ("Nemotron4-15B", 15.6, 15.6), ("MPT-30b", 29.97, 29.97),
    ):  # fmt: skip
        shaped = models.model(row_of(model=name))
        assert not isinstance(shaped, str)
        counted = parameters.count(shaped)
        assert counted.total / 1e9 == pytest.approx(whole, rel=0.03), name
        assert counted.active / 1e9 == pytest.approx(active, rel=0.13), name


def test_collectives_are_predicted_or_have_a_reason() -> None:
    made = sweeps.collectives(
        [
            {"system": "NDv4-A100", "op": "allgather", "ranks": "8", "ranks_per_node": "8", "size_bytes": "1073741824",
             "time_us": "3683.13"},
            {"system": "NDv4-A100", "op": "allreduce", "ranks": "8", "ranks_per_node": "8", "size_bytes": "8192",
             "time_us": "6.51"},
            {"system": "NDv4-A100", "op": "gossip", "ranks": "8", "ranks_per_node": "8", "size_bytes": "8388608",
             "time_us": "6.51"},
        ],
        "mscclpp_baselines",
    )  # fmt: skip
    # 7/8 of 1 GiB over 80 % of 300 GB/s, and a start-up.
    assert made.predicted == [pytest.approx(66e-6 + 2**30 * 7 / 8 / 240e9)] and made.lines == {2}
    assert list(made.skipped.values()) == [[3], [4]]


# ---- golden: the forecast on the extracts ----


@pytest.mark.parametrize(
    ("name", "table", "bound"),
    [
        ("nanotron", "hf_nanotron_sweep", 0.12),
        ("vtrain_multi", "vtrain_multi_node", 0.12),
        ("vtrain_single", "vtrain_single_node", 0.12),
        ("published", "megascale", 0.08),
        ("published", "korthikanti", 0.13),
    ],
)
def test_the_forecast_stays_as_good_as_it_is(name: str, table: str, bound: float) -> None:
    study = validate(None, EXTRACTS / f"{name}.csv")
    scored = next(timed for timed in study.times if timed.table == table)
    assert scored.scored is not None and scored.scored.mean < bound


def test_five_methods_of_moe_parallelism_are_ranked_as_measured() -> None:
    study = validate(None, EXTRACTS / "published.csv")
    assert study.methods is not None and study.methods.pairs == 10 and study.methods.right == 10
    searched = {run.method: run for run in study.methods.runs}
    # As the paper prints.
    assert searched["TP+EP+DP"].job is not None and searched["TP+EP+DP"].job.layout.tp == 4
    folded = searched["MCore+Folding"]
    assert folded.predicted == pytest.approx(49.3, rel=0.1)


def test_out_of_memory_is_told_on_the_extract() -> None:
    study = validate(None, EXTRACTS / "nanotron.csv")
    assert study.memory is not None and study.memory.fits[score.MODEL].accuracy >= 0.9


def test_baselines_are_fitted_to_one_half_and_never_to_the_other() -> None:
    runs = vtrain.cases(rows("vtrain_single")).cases
    fit, test = baselines.halves(len(runs))
    assert not set(fit) & set(test) and len(fit) + len(test) == len(runs)
    once = baselines.predict("constant MFU", runs, fit)
    # A constant MFU: all predictions have the same one.
    assert (
        len({round(baselines.at_peak(case) / seconds, 8) for case, seconds in zip(runs, once, strict=True)})
        == 1
    )
    for name in baselines.NAMES:
        assert all(seconds > 0 for seconds in baselines.predict(name, runs, fit))


# ---- data lint ----


@pytest.mark.parametrize("name", ["nanotron", "vtrain_single", "vtrain_multi", "published"])
def test_sound_extracts_have_no_findings(name: str) -> None:
    findings = [str(f) for f in lint.findings(rows(name)) if f.rule != "noted"]
    if name == "nanotron":  # its rows out of memory count their batch in tokens, as in the whole table
        assert "gbs counts tokens in 6 of" in findings.pop()
    assert findings == []


def megascale(row: Row) -> bool:
    return row["block"] == "megascale"


@pytest.mark.parametrize(
    ("name", "values", "rule"),
    [
        # As MegaScale-MoE's row of 240 GPUs: 2.3 % between tokens a second and step time.
        ("published", {"tokens_per_s": "40200"}, "tokens"),
        # As MoE Parallel Folding's table 4 and Llama 3's table 4 print their GPUs and replicas.
        ("published", {"gpus": "128"}, "ranks"),
        ("published", {"dp": "2"}, "ranks"),
        ("published", {"ep": "7"}, "experts"),
        ("published", {"micro_batch": "5"}, "batch"),
        # As Grok-1's rows: accumulation steps that contradict the batch.
        ("published", {"micro_batch": "1", "notes": "ga=128"}, "batch"),
        ("published", {"iter_time_s": "36.0", "tokens_per_s": "43700"}, "mfu"),
        ("published", {"notes": "paper prints 128 GPUs, really 256"}, "noted"),
        ("vtrain_multi", {"# GPUs": "32"}, "ranks"),
        ("vtrain_multi", {"micro batch": "7"}, "batch"),
        ("vtrain_multi", {"hidden size": "4096"}, "parameters"),
        ("nanotron", {"dp": "50"}, "ranks"),
        ("nanotron", {"gbs": "512.0"}, "batch"),
        ("nanotron", {"gbs": "1048576"}, "batch"),
    ],
)  # fmt: skip
def test_each_rule_finds_its_error(name: str, values: dict[str, str], rule: str) -> None:
    pick = megascale if name == "published" else (lambda row: True)
    findings = lint.findings(changed(name, pick, **values))
    assert rule in [finding.rule for finding in findings]


def test_a_changed_count_of_flops_is_found() -> None:
    # As Megatron-Bridge from 26.06 on: 1.198 times the FLOPs a token for GPT-OSS-120B.
    first = dict(rows("published")[0]) | {
        "block": "mbridge",
        "mfu": "",
        "notes": "",
        "iter_time_s": "",
        "tflops_per_gpu": "165",
    }
    third = first | {"source": "later", "tflops_per_gpu": str(165 * 1.198)}
    findings = [f for f in lint.findings([first, dict(first), third]) if f.rule == "flops"]
    assert len(findings) == 1 and "1.198 x" in findings[0].what and "later" in findings[0].what
    assert not [f for f in lint.findings([first, dict(first)]) if f.rule == "flops"]


def test_a_series_copied_from_another_model_is_found() -> None:
    source = [dict(row) for row in rows("published") if row["block"] == "mpf"]
    for i, row in enumerate(source):
        row["source"], row["seq"] = "MoE Parallel Folding T5 MCore", str(4096 << i)
    twins = [row | {"model": "Qwen2-57B-A14B"} for row in source]
    assert [f.rule for f in lint.findings([*source, *twins]) if f.rule == "copied"] == ["copied"]
    twins[0]["mfu"] = "11.1"
    assert not [f for f in lint.findings([*source, *twins]) if f.rule == "copied"]


def test_set_ups_measured_before_and_after_the_fix_are_found() -> None:
    after = dict(next(row for row in rows("nanotron") if row["status"] == "Success"))
    slower = {c: str(float(after[c]) / 4.7) for c in ("tok/s/gpu", "mTFLOPs")}
    before = after | {"after_pp_fix": "False"} | slower
    assert [f.rule for f in lint.findings([after, before])] == ["before the fix"]
    assert lint.findings([after, after | {"after_pp_fix": "False"}]) == []


def test_a_name_that_contradicts_its_columns_is_found() -> None:
    row = dict(rows("nanotron")[0])
    row["name"] = re.sub(r"_tp\d+", "_tp3", row["name"])
    assert "name" in [finding.rule for finding in lint.findings([row])]


# ---- the report and the command ----


def test_the_report_shows_its_plots_and_counts_its_rows(tmp_path: Path) -> None:
    study = validate(None, EXTRACTS / "nanotron.csv")
    written = report.write(study, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    pictures = [path for path in written if path.suffix == ".png"]
    assert len(pictures) >= 2 and all(f"]({path.name})" in text for path in pictures)
    assert "constant MFU" in text and "What was calibrated" in text and "of 33 rows are predicted" in text
    assert "## Targets" in text and "nanotron sweep, step time, MAPE" in text
    assert written[0].name == "report.md" and all(path.is_file() for path in written)


def test_the_command_takes_one_table_and_prints_targets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["validate", "--runs", str(EXTRACTS / "vtrain_multi.csv"), "--out", str(tmp_path)]
    assert main(given) == 0
    out = capsys.readouterr().out
    assert "vTrain, many nodes, MAPE" in out and str(tmp_path / "report.md") in out


def test_json_counts_rows_by_block_and_gives_targets(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["validate", "--runs", str(EXTRACTS / "published.csv"), "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert (report["rows"], report["predicted"]) == (17, 17)
    blocks = {block["block"]: block for block in report["blocks"]}
    assert {name: block["predicted"] for name, block in blocks.items()} == {
        "megascale": 8,
        "korthikanti": 4,
        "mpf": 5,
    }
    assert blocks["mpf"]["pairs"] == blocks["mpf"]["right"] == 10 and blocks["megascale"]["mape"] < 0.08
    assert {target["what"] for target in report["targets"]} >= {"MoE Parallel Folding, MFU, MAPE"}


def test_a_folder_needs_no_more_than_one_known_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vtrain_multi_node.csv").write_text((EXTRACTS / "vtrain_multi.csv").read_text())
    monkeypatch.setenv("MEGARAY_DATA", str(tmp_path))
    assert validate(None, None).files == ["vtrain_multi_node.csv"]


def _table(path: Path, head: list[str], *lines: list[str]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *lines])
    return path


def test_every_second_layer_of_llama_4_maverick_has_experts() -> None:
    """Not the last 24, which would give the last pipeline stages all of the experts."""
    shaped = models.model(row_of(model="Llama4-Maverick"))
    assert not isinstance(shaped, str) and shaped.moe_layers == tuple(range(1, 48, 2))


def test_mistakes_are_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGARAY_DATA", str(tmp_path / "nowhere"))
    unknown = _table(tmp_path / "unknown.csv", ["a", "b"], ["1", "2"])
    empty = _table(tmp_path / "empty.csv", ["a", "b"])
    prose = _table(tmp_path / "prose.txt", ["It costs"], ["time", " memory", " and patience."])
    messages = {
        (): "is not a folder",
        ("--data", str(tmp_path)): "has none of",
        ("--runs", str(tmp_path / "none.csv")): "is not there",
        ("--runs", str(tmp_path)): "can't be read: Is a directory",
        ("--runs", str(empty / "x.csv")): "can't be read: Not a directory",
        ("--runs", str(prose)): "has the columns It costs, …, which no known table has",
        ("--runs", str(unknown)): "which no known table has",
        ("--runs", str(empty)): "has no rows",
        ("--runs", str(unknown), "--out", str(empty)): "is a file; name a folder",
        ("extra",): "one word too many",
    }
    for words, message in messages.items():
        assert main(["validate", *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, words


def test_an_unknown_folder_names_how_to_give_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="MEGARAY_DATA"):
        validate(tmp_path / "none", None)
