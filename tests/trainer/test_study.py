"""The study: metrics by hand, readers on extracts of the published tables, data lint, the report, and its command."""

from __future__ import annotations

import csv
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import UserError
from trainer.cli import main
from trainer.study import baselines, cases, lint, metrics, nanotron, published, report, score, vtrain
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
    found = metrics.errors([1.1, 0.8, 2.0], [1.0, 1.0, 1.0])
    assert found is not None
    assert (found.rows, found.most) == (3, 1.0)
    assert found.mean == pytest.approx((0.1 + 0.2 + 1.0) / 3) and found.median == pytest.approx(0.2)
    assert found.bias == pytest.approx((1.1 * 0.8 * 2.0) ** (1 / 3))
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
    found = metrics.classified([True, False, False, True], [True, False, True, False])
    assert found is not None and found.accuracy == 0.5 and found.precision == 0.5 and found.recall == 0.5
    assert metrics.inside([1, 1], [2, 2], [1.5, 3]) == 0.5


# ---- readers ----


def test_a_step_of_the_sweep_is_its_samples_over_its_speed() -> None:
    found = nanotron.cases(rows("nanotron"))
    timed = [case for case in found.cases if case.seconds]
    # 256 samples of 4096 tokens at 15,565 tokens a second on each of 8 GPUs.
    one = next(case for case in timed if "14098549" in case.key)
    assert one.job.global_batch == 256 and one.seconds == pytest.approx(8.421, abs=0.001)
    ranked = sorted(timed, key=lambda case: int(case.key.rpartition(" ")[2]))
    assert ranked[0].calibrates and sum(case.calibrates for case in timed) < len(timed) / 2
    assert [case.fits for case in found.cases].count(False) == 6


def test_the_sweeps_own_flops_are_counted_as_it_counts_them() -> None:
    for row, case in zip(rows("nanotron"), nanotron.cases(rows("nanotron")).cases, strict=True):
        work, speed = cases.number(row, "mTFLOPs"), cases.number(row, "tok/s/gpu")
        if work and speed:
            assert case.flops_per_token == pytest.approx(work * 1e12 / speed, rel=0.01)


def test_a_rows_own_benchmark_sets_the_latency_of_its_network() -> None:
    row = dict(next(row for row in rows("nanotron") if row["nodes"] == "32.0"))
    hardware = nanotron.cases([row]).cases[0].rates.hardware
    slow, fast = nanotron.fabric(row, hardware), nanotron.fabric(row | {"AllGather (GB/s)": "75"}, hardware)
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
    found = {
        made.table: made
        for made in published.cases(changed("published", lambda r: "T2" in r["source"], iter_time_s=""))
    }
    case = found["megascale"].cases[0]
    assert case.seconds == pytest.approx(40.0, rel=0.005) and case.mfu == pytest.approx(53.0)


def test_what_a_table_does_not_print_is_skipped_and_counted() -> None:
    found = {
        made.table: made
        for made in published.cases(changed("published", lambda r: r["block"] == "megascale", tp=""))
    }
    assert len(found["megascale"].cases) == 7 and sum(found["megascale"].skipped.values()) == 1


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
    found = next(timed for timed in study.times if timed.table == table)
    assert found.scored is not None and found.scored.mean < bound


def test_five_methods_of_moe_parallelism_are_ranked_as_measured() -> None:
    study = validate(None, EXTRACTS / "published.csv")
    assert study.methods is not None and study.methods.pairs == 10 and study.methods.right == 10
    searched = {run.method: run for run in study.methods.runs}
    assert (
        searched["TP+EP+DP"].job is not None and searched["TP+EP+DP"].job.layout.tp == 4
    )  # as the paper prints
    folded = searched["MCore+Folding"]
    assert folded.predicted == pytest.approx(49.3, rel=0.1)


def test_out_of_memory_is_told_on_the_extract() -> None:
    study = validate(None, EXTRACTS / "nanotron.csv")
    assert study.memory is not None and study.memory.fits[score.MODEL].accuracy >= 0.9


def test_baselines_are_fitted_to_one_half_and_never_to_the_other() -> None:
    found = vtrain.cases(rows("vtrain_single")).cases
    fit, test = baselines.halves(len(found))
    assert not set(fit) & set(test) and len(fit) + len(test) == len(found)
    once = baselines.predict("constant MFU", found, fit)
    # A constant MFU: all predictions have the same one.
    assert len({round(case.mfu_of(seconds), 6) for case, seconds in zip(found, once, strict=True)}) == 1
    for name in baselines.NAMES:
        assert all(seconds > 0 for seconds in baselines.predict(name, found, fit))


# ---- data lint ----


@pytest.mark.parametrize("name", ["nanotron", "vtrain_single", "vtrain_multi", "published"])
def test_sound_extracts_have_no_findings(name: str) -> None:
    found = [str(f) for f in lint.findings(rows(name)) if f.rule != "noted"]
    if name == "nanotron":  # its rows out of memory count their batch in tokens, as in the whole table
        assert "gbs counts tokens in 6 of" in found.pop()
    assert found == []


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
    found = lint.findings(changed(name, pick, **values))
    assert rule in [finding.rule for finding in found]


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
    found = [f for f in lint.findings([first, dict(first), third]) if f.rule == "flops"]
    assert len(found) == 1 and "1.198 x" in found[0].what and "later" in found[0].what
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


def test_the_report_is_one_page_with_its_plots_in_it(tmp_path: Path) -> None:
    study = validate(None, EXTRACTS / "nanotron.csv")
    written = report.write(study, tmp_path / "out")
    page = (tmp_path / "out" / "report.html").read_text()
    assert page.count("data:image/png;base64,") == len([p for p in written if p.suffix == ".png"]) >= 2
    assert 'src="http' not in page and "constant MFU" in page and "What was calibrated" in page
    text = (tmp_path / "out" / "report.md").read_text()
    assert "## Targets" in text and "nanotron sweep, step time, MAPE" in text
    assert written[0].name == "report.html" and all(path.is_file() for path in written)


def test_the_command_takes_one_table_and_prints_targets(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["validate", "--runs", str(EXTRACTS / "vtrain_multi.csv"), "--out", str(tmp_path)]
    assert main(given) == 0
    out = capsys.readouterr().out
    assert "vTrain, many nodes, MAPE" in out and str(tmp_path / "report.html") in out


def test_a_folder_needs_no_more_than_one_known_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "vtrain_multi_node.csv").write_text((EXTRACTS / "vtrain_multi.csv").read_text())
    monkeypatch.setenv("MEGARAY_DATA", str(tmp_path))
    assert validate(None, None).files == ["vtrain_multi_node.csv"]


def _table(path: Path, head: list[str], *lines: list[str]) -> Path:
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([head, *lines])
    return path


def test_mistakes_are_told_in_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEGARAY_DATA", str(tmp_path / "nowhere"))
    unknown = _table(tmp_path / "unknown.csv", ["a", "b"], ["1", "2"])
    empty = _table(tmp_path / "empty.csv", ["a", "b"])
    told = {
        (): "is not a folder",
        ("--data", str(tmp_path)): "has none of",
        ("--runs", str(tmp_path / "none.csv")): "is not there",
        ("--runs", str(tmp_path)): "is not a CSV file",
        ("--runs", str(unknown)): "which no known table has",
        ("--runs", str(empty)): "has no rows",
        ("--runs", str(unknown), "--out", str(empty)): "is a file; name a folder",
        ("extra",): "one word too many",
    }
    for words, message in told.items():
        assert main(["validate", *words]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1, words


def test_an_unknown_folder_names_how_to_give_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="MEGARAY_DATA"):
        validate(tmp_path / "none", None)
