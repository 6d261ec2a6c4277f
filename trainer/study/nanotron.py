"""Hugging Face's nanotron sweep on H100 with EFA (hf_nanotron_sweep.csv, the Ultra-Scale Playbook's benchmark).

Each row holds the bandwidths that its own job measured at its start, over the whole job and inside a node. They are
microbenchmarks of the fabric that it ran on, so a prediction may use them. Their message size isn't recorded; 256 MiB is
assumed, which puts a ring's latency at about 0.6 ms a node, constant from 2 to 64 nodes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

from configs.compose import compose
from configs.hardware import HardwareConfig
from configs.schema import ModelConfig
from trainer.sizing.model import frameworks
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.model.layout import Layout
from trainer.sizing.time.fabric import HOP, STEP, Fabric, from_catalogue
from trainer.sizing.time.rates import Overheads, Rates
from trainer.study.cases import Cases, Row, StudyCase, number, whole

TABLE = "hf_nanotron_sweep"
COLUMNS = (
    "job_id", "nodes", "mbs", "batch_accum", "tok/s/gpu", "after_pp_fix", "zero_stage", "interm_dim", "status",
)  # fmt: skip
CALIBRATION_EVERY = 11
"""Every so many of the rows that succeeded after the pipeline fix, by job id, the first among them."""
OVERHEADS = Overheads(
    launch=18e-6,
    pass_kernels=70,
    tp_call=30e-6,
    tp_rank_call=280e-6,
    update_bytes=228.0,
    source=f"every {CALIBRATION_EVERY}th timed row of the sweep by job id: a layer's host time is 4 ms, and 2.25 ms more "
    "for each tensor-parallel rank in jobs of several nodes; and its pairs of runs on one or two nodes that differ in ZeRO "
    "stage only: the optimizer step of a weight takes as long as moving 228 bytes",
)
SUSTAINED = 0.74
"""From the same rows."""
BENCHMARK_BYTES = 2**28
NETWORK_RATE = 300e9
"""Bytes/s that all-gathers of the sweep's fastest jobs approach on few nodes (229 to 182 GB/s at 2 to 8 nodes)."""
INSIDE_RATE = 242e9
"""Bytes/s of an all-gather inside a node, the median of the sweep's jobs; some had a fifth of it."""
HOP_SHARE = 0.2
"""Of a node's latency that its crossing takes; the steps of its eight ranks share the rest. Same rows."""
ROUNDS = 3.0
"""Times that an all-reduce there goes through a ring's steps. Same rows: those without ZeRO, on many nodes."""
HEALTHY = 100.0
"""GB/s of all-reduce inside a node below which links are broken: others have 385 to 462, these 41 to 46."""


def fabric(row: Row, hardware: HardwareConfig) -> Fabric:
    """The row's own fabric: the catalogue's links and latency, as far as its all-gather benchmarks confirm them."""
    base = from_catalogue(hardware)
    nodes, rate = whole(row, "nodes") or 1, number(row, "AllGather (GB/s)")
    step, hop = STEP, HOP
    if nodes > 1 and rate:
        ranks = 8 * nodes
        wire = BENCHMARK_BYTES * (ranks - 1) / ranks
        waited = math.sqrt(max(0.0, (wire / (rate * 1e9)) ** 2 - (wire / NETWORK_RATE) ** 2))
        node = max(8 * STEP + HOP, waited / (nodes - 1))
        step, hop = (1 - HOP_SHARE) * node / 8, HOP_SHARE * node
    inside = number(row, "AG Intra-node (GB/s)")
    sound = min(1.0, inside * 1e9 / INSIDE_RATE) if inside else 1.0
    # Its all-reduce is no faster than two rings there: 13 GB/s at 64 nodes is 40 ms for 256 MiB.
    return replace(
        base,
        inside=tuple((ranks, gbps * sound) for ranks, gbps in base.inside),
        step=step,
        hop=hop,
        rounds=ROUNDS,
        tree_hop=math.inf,
        low_latency=None,  # its latency is what was measured, by whatever protocol
        source="the row's own all-gather benchmarks",
    )


def model(row: Row) -> ModelConfig | None:
    """The row's Llama; None where its shape is incomplete."""
    hidden, layers, heads = whole(row, "hidden_size"), whole(row, "num_layers"), whole(row, "num_heads")
    width, vocab = whole(row, "interm_dim"), whole(row, "vocab_size")
    key_values = whole(row, "num_kv_heads") or heads  # nanotron's default, where the column is empty
    if not (hidden and layers and heads and width and key_values and vocab):
        return None
    return ModelConfig(
        name=f"llama_{row['num_params']}b", layers=layers, hidden=hidden, heads=heads, kv_heads=key_values,
        head_dim=hidden // heads, vocab=vocab, experts=1, top_k=1, expert_width=width, dense_layers=layers,
        dense_width=width, tie_embeddings=row["tie_word_embeddings"] == "True",
    )  # fmt: skip


def job(row: Row, models: dict[tuple[str, ...], ModelConfig | None]) -> TrainingJob | None:
    """What the row ran; None where its record is incomplete."""
    shape = tuple(row[c] for c in ("hidden_size", "num_layers", "interm_dim", "num_kv_heads", "vocab_size"))
    shape += (row["num_heads"], row["tie_word_embeddings"], row["num_params"])
    if shape not in models:
        models[shape] = model(row)
    llama = models[shape]
    numbers = [whole(row, c) for c in ("dp", "pp", "tp", "mbs", "batch_accum", "seq_len", "zero_stage")]
    if llama is None or any(n is None for n in numbers):
        return None
    dp, pp, tp, micro, steps, sequence, zero = (n or 0 for n in numbers)
    if row["tp_mode"] != "REDUCE_SCATTER" or not micro * steps * dp:
        return None
    software = replace(
        frameworks.nanotron(before_fix=row["after_pp_fix"] != "True"),
        bucket_bytes=round((number(row, "ddp_bucket_cap_mb") or 25) * 2**20),
    )
    return TrainingJob(
        model=llama, layout=Layout(pp=pp, dp=dp, cp=1, ep=1, etp=1, tp=tp), sequence=sequence, micro_batch=micro,
        global_batch=micro * steps * dp, zero=zero, software=software,
    )  # fmt: skip


def cases(rows: Sequence[Row]) -> Cases:
    """The sweep's runs: time of those that succeeded after the fix, memory of all."""
    out = Cases(TABLE)
    hardware = compose(["hardware=h100"]).hardware
    models: dict[tuple[str, ...], ModelConfig | None] = {}
    timed = sorted(
        (whole(row, "job_id") or 0, row["name"])
        for row in rows
        if _succeeded(row) and row["after_pp_fix"] == "True"
    )
    calibrates = set(timed[::CALIBRATION_EVERY]) | _pairs(rows)
    for line, row in enumerate(rows, start=2):
        if row["status"] not in ("Success", "OOM"):
            out.skip(f"status {row['status'] or 'missing'}", line)
            continue
        made = job(row, models)
        if made is None:
            out.skip("incomplete shape or layout", line)
            continue
        ran = _succeeded(row)
        fixed = row["after_pp_fix"] == "True"
        ranks, rate = 8 * (number(row, "nodes") or 0), number(row, "tok/s/gpu")
        seconds = None
        if ran and fixed and rate and ranks:
            seconds = made.global_batch * made.sequence / (rate * ranks)
        inside = number(row, "AR Intra-node (GB/s)")
        out.cases.append(
            StudyCase(
                table=TABLE,
                key=f"line {line} job {row['job_id']}",
                line=line,
                job=made,
                rates=Rates(hardware, fabric(row, hardware), overheads=OVERHEADS, sustained=SUSTAINED),
                seconds=seconds,
                fits=ran,
                reserved=_bytes(row, "Mem Res (GB)") if ran else None,
                group=f"{row['num_params']}B on {whole(row, 'nodes')} nodes",
                label=f"tp={made.layout.tp} pp={made.layout.pp} dp={made.layout.dp} mbs={made.micro_batch}",
                calibrates=(whole(row, "job_id") or 0, row["name"]) in calibrates,
                note="broken links" if inside is not None and inside < HEALTHY else "",
            )
        )
    return out


def _pairs(rows: Sequence[Row]) -> set[tuple[int, str]]:
    """Runs after the fix on one or two nodes that have a twin with another ZeRO stage."""
    twins: dict[tuple[str, ...], dict[str, tuple[int, str]]] = {}
    for row in rows:
        if (
            _succeeded(row)
            and row["after_pp_fix"] == "True"
            and (number(row, "nodes") or 9) <= 2
            and row["dp"] != "1"
        ):
            key = tuple(row[c] for c in ("num_params", "nodes", "dp", "pp", "tp", "mbs", "batch_accum"))
            twins.setdefault(key, {})[row["zero_stage"]] = (whole(row, "job_id") or 0, row["name"])
    return {run for pair in twins.values() if len(pair) > 1 for run in pair.values()}


def _succeeded(row: Row) -> bool:
    return row["status"] == "Success" and number(row, "tok/s/gpu") is not None


def _bytes(row: Row, column: str) -> float | None:
    value = number(row, column)
    return None if not value else value * 2**30
