"""vTrain's A100 step times (vtrain_single_node.csv, vtrain_multi_node.csv): Megatron-LM of 2022, GPT, fp16.

Facts used: one node of 8 A100, and nodes of 8 with four 200 Gb/s adapters; no fused attention; vocabulary 51,200;
full recomputation on many nodes (its 3.6 B row takes what Narayanan et al. 2021 print with it), none on one.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

from configs.compose import compose
from configs.hardware import HardwareConfig
from configs.schema import ModelConfig
from trainer.sizing.model.job import Software, TrainingJob
from trainer.sizing.model.layout import Layout
from trainer.sizing.time.fabric import from_catalogue
from trainer.sizing.time.rates import Overheads, Rates
from trainer.study.cases import Cases, Row, StudyCase, number, whole

SINGLE, MULTI = "vtrain_single_node", "vtrain_multi_node"
COLUMNS = (
    "# GPUs",
    "global batch",
    "micro batch",
    "hidden size",
    "tensor parallelism",
    "iteration time (ms)",
)
CALIBRATION_ROWS = 20
"""The first rows of the single-node table."""
ADAPTERS = 4
OVERHEADS = Overheads(
    launch=24e-6,
    pass_kernels=45,
    tp_call=75e-6,
    source=f"the first {CALIBRATION_ROWS} rows of the single-node table: a layer's host time is 3.2 ms",
)
SOFTWARE = Software(
    name="megatron-lm 2022",
    flash_attention=False,
    causal_flops=False,
    sequence_parallel=False,
    compiled=True,
    dropout=True,
    split_messages=True,
    fused_projections=True,
    gradient_bytes=2,
    reduce_bytes=2,
    sources=("Narayanan et al. 2021, arXiv 2104.04473; github.com/NVIDIA/Megatron-LM v2.6",),
)


@lru_cache
def gpt(layers: int, hidden: int, heads: int, vocab: int) -> ModelConfig:
    """A GPT with an MLP of four times its width and a tied output projection."""
    return ModelConfig(
        name="gpt", layers=layers, hidden=hidden, heads=heads, kv_heads=heads, head_dim=hidden // heads, vocab=vocab,
        experts=1, top_k=1, expert_width=4 * hidden, dense_layers=layers, dense_width=4 * hidden, gated=False,
        tie_embeddings=True,
    )  # fmt: skip


@lru_cache
def hardware(adapters: int) -> HardwareConfig:
    """A100 in nodes with so many adapters."""
    catalogued = compose(["hardware=a100"]).hardware
    return catalogued.model_copy(update={"nic": catalogued.nic.model_copy(update={"per_node": adapters})})


def cases(rows: Sequence[Row]) -> Cases:
    """The table's runs; more than eight GPUs make it the multi-node one."""
    multi = any((whole(row, "# GPUs") or 0) > 8 for row in rows)
    out = Cases(MULTI if multi else SINGLE)
    device = hardware(ADAPTERS)
    rates = Rates(device, from_catalogue(device), overheads=OVERHEADS)
    columns = ("# layers", "hidden size", "attention heads", "sequence length", "micro batch", "global batch")
    for line, row in enumerate(rows, start=2):
        shape = [whole(row, column) for column in columns]
        axes = [whole(row, f"{axis} parallelism") for axis in ("tensor", "data", "pipeline")]
        milliseconds = number(row, "iteration time (ms)")
        if any(value is None for value in (*shape, *axes)) or not milliseconds:
            out.skip("incomplete", line)
            continue
        layers, hidden, heads, sequence, micro, batch = (value or 0 for value in shape)
        tp, dp, pp = (value or 0 for value in axes)
        job = TrainingJob(
            model=gpt(layers, hidden, heads, 51200), layout=Layout(pp=pp, dp=dp, cp=1, ep=1, etp=1, tp=tp),
            sequence=sequence, micro_batch=micro, global_batch=batch, recompute="full" if multi else "none",
            software=SOFTWARE,
        )  # fmt: skip
        out.cases.append(
            StudyCase(
                table=out.table,
                key=f"line {line}",
                line=line,
                job=job,
                rates=rates,
                seconds=milliseconds / 1e3,
                group=f"{hidden} wide, {layers} layers, {whole(row, '# GPUs')} GPUs, batch {batch}",
                label=f"tp={tp} pp={pp} dp={dp} mbs={micro}",
                calibrates=not multi and line < 2 + CALIBRATION_ROWS,
            )
        )
    return out
