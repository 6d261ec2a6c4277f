"""Consistency of the published tables: what must hold within a row, within a series, and between rows.

A finding names the rows, what doesn't fit, and by how much. Rules are checked where their columns are filled in.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median

from trainer.sizing.model import flops
from trainer.study import models, nanotron, published, vtrain
from trainer.study.cases import Row, has_columns, number, whole

TOLERANCE = 0.02
"""Relative difference that rounding in print explains."""
JUMP = 0.05
"""Relative change of FLOPs per token of one model, beyond which a convention has changed."""
UTILISATION = 0.03
"""Relative difference of a printed MFU from the one that its own step time gives, above which one is misprinted."""


@dataclass(frozen=True)
class TableFinding:
    """Something in a table that doesn't fit."""

    rule: str
    where: str
    what: str

    def __str__(self) -> str:
        return f"{self.rule}: {self.where}: {self.what}"


def findings(rows: Sequence[Row]) -> list[TableFinding]:
    """What doesn't fit in a table, by the rules for its kind."""
    if has_columns(rows, nanotron.COLUMNS):
        of_rows = _each(rows, _nanotron_row)
        return [*of_rows, *_in_tokens(rows), *_nanotron_flops(rows), *_before_and_after(rows)]
    if has_columns(rows, vtrain.COLUMNS):
        return list(_each(rows, _vtrain_row))
    if has_columns(rows, published.COLUMNS):
        return [*_each(rows, _published_row), *_published_flops(rows), *_copied(rows)]
    return []


def _each(rows: Sequence[Row], check: Callable[[Row, str], Iterable[TableFinding]]) -> Iterator[TableFinding]:
    for line, row in enumerate(rows, start=2):
        yield from check(row, f"line {line}")


def _differs(
    rule: str, where: str, said: float, computed: float, tolerance: float, unit: str
) -> Iterator[TableFinding]:
    off = said / computed - 1
    if abs(off) > tolerance:
        yield TableFinding(
            rule, where, f"says {said:.6g} {unit}, its other columns give {computed:.6g} ({off:+.1%})"
        )


def _whole_batch(where: str, batch: float, replicas: float) -> Iterator[TableFinding]:
    if batch % replicas:
        yield TableFinding(
            "batch", where, f"global batch {batch:g} is not a multiple of dp x micro-batch = {replicas:g}"
        )


# ---- the nanotron sweep ----


def _nanotron_row(row: Row, where: str) -> Iterator[TableFinding]:
    where = f"{where} job {row['job_id']}"
    axes = [number(row, axis) for axis in ("dp", "pp", "tp")]
    nodes = number(row, "nodes")
    if nodes and all(axes):
        ranks = (axes[0] or 0) * (axes[1] or 0) * (axes[2] or 0)
        # A job of fewer ranks than a node's is counted as a whole node.
        if ranks != 8 * nodes and not (nodes == 1 and ranks < 8):
            yield TableFinding("ranks", where, f"dp x pp x tp = {ranks:g}, on {nodes:g} nodes of 8")
    batch, samples = number(row, "gbs"), _samples(row)
    if batch and samples and batch != samples * (number(row, "seq_len") or 1):
        yield from _differs("batch", where, batch, samples, 0.0, "samples")
    named = row.get("name", "")
    for column in ("dp", "tp", "pp", "mbs", "batch_accum"):
        mark = "acc" if column == "batch_accum" else column
        printed = re.match(r"[\d.]+", named.partition(f"_{mark}")[2])
        value = number(row, column)
        if printed and value is not None and float(printed[0]) != value:
            yield TableFinding("name", where, f"is named {named}, but has {column}={value:g}")


def _samples(row: Row) -> float | None:
    """Samples of a step, from the layout."""
    parts = [number(row, column) for column in ("dp", "mbs", "batch_accum")]
    return (parts[0] or 0) * (parts[1] or 0) * (parts[2] or 0) if all(parts) else None


def _in_tokens(rows: Sequence[Row]) -> Iterator[TableFinding]:
    """Batches that count tokens where the column counts samples."""
    lines = [
        line
        for line, row in enumerate(rows, start=2)
        if (samples := _samples(row))
        and number(row, "gbs") == samples * (number(row, "seq_len") or 1) != samples
    ]
    if lines:
        what = f"gbs counts tokens in {len(lines)} of {len(rows)} rows, samples in the others: use dp x mbs x batch_accum"
        yield TableFinding("batch", f"lines {lines[0]} to {lines[-1]}", what)


def _nanotron_flops(rows: Sequence[Row]) -> Iterator[TableFinding]:
    keys = (
        "hidden_size", "num_layers", "interm_dim", "vocab_size", "num_kv_heads", "num_heads", "seq_len", "num_params",
    )  # fmt: skip
    yield from _constant_flops(
        rows, lambda row: tuple(row[key] for key in keys), lambda row: _over(row, "mTFLOPs", "tok/s/gpu", 1.0),
        lambda row: f"job {row['job_id']}",
    )  # fmt: skip


def _before_and_after(rows: Sequence[Row]) -> Iterator[TableFinding]:
    """The same set-up measured before and after the pipeline fix."""
    keys = (
        "num_params", "nodes", "dp", "pp", "tp", "mbs", "batch_accum", "zero_stage", "num_kv_heads", "seq_len",
    )  # fmt: skip
    speeds: dict[tuple[str, ...], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        speed = number(row, "tok/s/gpu")
        if speed and row["status"] == "Success":
            speeds[tuple(row[key] for key in keys)][row["after_pp_fix"]].append(speed)
    ratios = [
        max(s, 1 / s)
        for both in speeds.values()
        if {"True", "False"} <= both.keys()
        for s in [median(both["True"]) / median(both["False"])]
    ]
    changed = [ratio for ratio in ratios if ratio > 1 + JUMP]
    if changed:
        what = f"{len(changed)} of {len(ratios)} set-ups measured before and after it differ, by up to {max(changed):.1f} x"
        yield TableFinding("before the fix", "after_pp_fix=False", f"{what}: use the rows after it for time")


# ---- vTrain ----


def _vtrain_row(row: Row, where: str) -> Iterator[TableFinding]:
    axes = [number(row, f"{axis} parallelism") for axis in ("tensor", "data", "pipeline")]
    gpus, batch, micro = (number(row, column) for column in ("# GPUs", "global batch", "micro batch"))
    if not (gpus and batch and micro and all(axes)):
        return
    tp, dp, pp = (axis or 0 for axis in axes)
    if tp * dp * pp != gpus:
        yield TableFinding("ranks", where, f"tp x dp x pp = {tp * dp * pp:g}, on {gpus:g} GPUs")
    yield from _whole_batch(where, batch, dp * micro)
    size, layers, hidden = (number(row, c) for c in ("Parameters (billion)", "# layers", "hidden size"))
    if size and layers and hidden:
        count = 12 * layers * hidden**2 * (1 + 13 / (12 * hidden)) + (51200 + 2048) * hidden
        yield from _differs("parameters", where, size, count / 1e9, 0.03, "billion parameters")


# ---- published runs ----


def _published_row(row: Row, where: str) -> Iterator[TableFinding]:
    where = f"{where} {row['source']}, {row['model']} on {row['gpus']} {row['gpu_type']}"
    tokens, batch, sequence, seconds = (
        number(row, column) for column in ("tokens_per_s", "global_batch", "seq", "iter_time_s")
    )
    if tokens and batch and sequence and seconds:
        yield from _differs("tokens", where, tokens, batch * sequence / seconds, TOLERANCE, "tokens/s")
    gpus, tp, pp, dp, ep = (whole(row, column) for column in ("gpus", "tp", "pp", "dp", "ep"))
    if gpus and tp and pp and dp:
        ranks = tp * pp * dp * published.context_parallel(row)
        if ranks != gpus:
            yield TableFinding("ranks", where, f"tp x pp x dp x cp = {ranks}, on {gpus} GPUs")
    if gpus and pp and ep and (gpus // pp) % ep:
        yield TableFinding("experts", where, f"ep={ep} does not divide the {gpus // pp} ranks of a stage")
    micro = whole(row, "micro_batch")
    if batch and micro and dp:
        yield from _whole_batch(where, batch, dp * micro)
    yield from _steps(row, where, batch, micro, dp)
    noted = _NOTED.search(row.get("notes") or "")
    if noted:
        yield TableFinding("noted", where, noted[0])
    yield from _utilisation(row, where)


#: Errors of a source that the table's compiler has put right and says so.
_NOTED = re.compile(r"(paper prints|v1 of the paper printed|third-party copies)[^;]*")


def _steps(
    row: Row, where: str, batch: float | None, micro: int | None, dp: int | None
) -> Iterator[TableFinding]:
    """Accumulation steps, which some notes print, against the batch."""
    words = (row.get("notes") or "").lower().replace(";", " ").split()
    said = next((word[3:] for word in words if word.startswith("ga=") and word[3:].isdigit()), "")
    if said and batch and micro and dp and int(said) * micro * dp != batch:
        yield TableFinding(
            "batch", where, f"global batch {batch:g}, but {said} steps of {micro} samples on {dp} replicas"
        )


def _utilisation(row: Row, where: str) -> Iterator[TableFinding]:
    """MFU against model FLOPs of the printed shape over the printed step time, in either count of attention."""
    mfu, seconds, gpus = number(row, "mfu"), number(row, "iter_time_s"), number(row, "gpus")
    batch, sequence = number(row, "global_batch"), number(row, "seq")
    if row["block"] not in _OWN_MFU or not (mfu and seconds and gpus and batch and sequence):
        return
    shaped, machine = models.model(row), published.rates(row["gpu_type"])
    if isinstance(shaped, str) or isinstance(machine, str):
        return
    peak = (machine.hardware.peak_tflops.get("bf16") or 0) * 1e12
    said = mfu / 100 * seconds * gpus * peak / (batch * sequence)
    counts = [flops.train_flops_per_token(shaped, int(sequence), full) for full in (True, False)]
    nearest = min(counts, key=lambda count: abs(said / count - 1))
    if abs(said / nearest - 1) > UTILISATION:
        yield TableFinding(
            "mfu", where, f"{mfu} % in {seconds} s is {said:.4g} FLOPs a token; its shape has {nearest:.4g}"
        )


#: Blocks whose MFU and step time are both printed, neither made from the other by the table's compiler.
_OWN_MFU = ("megascale", "megascale_moe", "korthikanti")


def _published_flops(rows: Sequence[Row]) -> Iterator[TableFinding]:
    """TFLOP/s over tokens/s must be constant for a model and sequence, whatever it runs on."""
    once = [row for row in rows if "RECOMPUTE" not in (row["notes"] or "").upper()]
    yield from _constant_flops(
        once,
        lambda row: (row["block"], row["model"], row["seq"], row["vocab"]),
        lambda row: _over(row, "tflops_per_gpu", "tokens_per_s", number(row, "gpus") or 0.0),
        lambda row: f"{row['source']} on {row['gpus']} {row['gpu_type']} {row['precision']}",
    )


def _copied(rows: Sequence[Row]) -> Iterator[TableFinding]:
    """A series of one model that repeats another model's measurements digit by digit."""
    series: dict[tuple[str, str], list[tuple[str, ...]]] = defaultdict(list)
    for row in rows:
        if number(row, "mfu") is not None and row["block"] == "mpf":
            series[row["source"].rpartition(" ")[0], row["model"]].append(
                (row["source"], row["gpus"], row["seq"], row["mfu"])
            )
    named = sorted(series)
    for i, (table, model) in enumerate(named):
        for other_table, other in named[:i]:
            mine, theirs = series[table, model], series[other_table, other]
            if table == other_table and len(mine) >= 3 and sorted(mine) == sorted(theirs):
                yield TableFinding("copied", table, f"the {len(mine)} rows of {model} are those of {other}")


# ---- both ----


def _over(row: Row, tflops: str, speed: str, ranks: float) -> float | None:
    work, tokens = number(row, tflops), number(row, speed)
    return work * 1e12 * ranks / tokens if work and tokens and ranks else None


def _constant_flops(
    rows: Sequence[Row],
    key: Callable[[Row], tuple[str, ...]],
    flops: Callable[[Row], float | None],
    name: Callable[[Row], str],
) -> Iterator[TableFinding]:
    groups: dict[tuple[str, ...], list[tuple[float, str]]] = defaultdict(list)
    for row in rows:
        per_token = flops(row)
        if per_token:
            groups[key(row)].append((per_token, name(row)))
    for parts, values in groups.items():
        middle = median([value for value, _ in values])
        odd = [(value, label) for value, label in values if abs(value / middle - 1) > JUMP]
        if odd:
            value, label = max(odd, key=lambda entry: abs(entry[0] / middle - 1))
            share = f"{len(odd)} of {len(values)} rows have other FLOPs per token than most ({middle:.4g})"
            what = f"{share}: {label} {value / middle:.3f} x"
            yield TableFinding("flops", " ".join(parts), what)
