"""Published training runs (published_runs.csv): blocks of papers' and vendors' tables.

What a table doesn't print is taken from the models' own papers and configurations (`SHAPES`), and what a block's
software does from its paper (`megascale`, `megatron_core`).
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import lru_cache

from pydantic import ValidationError

from configs.compose import compose
from configs.hardware import HardwareConfig
from configs.schema import ModelConfig
from trainer.sizing.model import flops, frameworks
from trainer.sizing.model.job import Job, Recompute, Software
from trainer.sizing.model.layout import Layout
from trainer.sizing.time.fabric import from_catalogue
from trainer.sizing.time.rates import Overheads, Rates
from trainer.study.cases import Case, Cases, Row, number, whole

COLUMNS = ("source", "model", "layers", "hidden", "gpus", "gpu_type", "mfu", "block", "notes")

#: Experts, routed experts a token, width of shared experts, key/value heads. Mixtral: arXiv 2401.04088 and the 8x22B
#: config.json; G8T8: its experts cut in eight (arXiv 2504.14960, section 4.1); Llama3-8x70B: 8 copies of Llama 3 70B's
#: MLP, top 2 (same); Qwen2-57B-A14B: config.json; 352B: MegaScale-MoE, arXiv 2505.11432, section 6.
SHAPES: dict[str, tuple[int, int, int, int]] = {
    "Mixtral-8x22B": (8, 2, 0, 8),
    "Mixtral-8x22B-G8T8": (64, 8, 0, 8),
    "Llama3-8x70B": (8, 2, 0, 8),
    "Qwen2-57B-A14B": (64, 8, 20480, 4),
    "352B": (32, 3, 0, 8),
}
#: Key/value heads and gating of dense models that share key/value heads or aren't GPT.
DENSE: dict[str, tuple[int, bool]] = {
    "Llama3.1-405B": (8, True),
    "Llama3-8B": (8, True),
    "Llama2-70B": (8, True),
    "Nemotron4-15B": (8, False),
    "Nemotron4-340B": (8, False),
}
GPUS = {"a100": "a100", "h100": "h100", "h200": "h200", "h800": "h800", "b200": "b200", "mi300x": "mi300x"}

#: Megatron-LM as MegaScale ran its baseline: no fused attention, selective recomputation (Korthikanti et al. 2022).
MEGATRON_LM = Software(
    name="megatron-lm 2023",
    flash_attention=False,
    causal_flops=False,
    compiled=True,
    dropout=True,
    fused_accumulation=True,
    fused_projections=True,
    retention=frameworks.MEGATRON,
    sources=("arXiv 2402.15627, section 6; arXiv 2205.05198",),
)
#: MegaScale: FlashAttention-2; tensor-, pipeline- and data-parallel exchange overlapped. Its parallel block and sliding
#: window aren't modelled (+4.6 and +1.0 points of MFU in its ablation).
MEGASCALE = replace(
    MEGATRON_LM, name="megascale", flash_attention=True, causal_flops=True, overlap_dp=True, overlap_gather=True,
    overlap_tp=True, overlap_pp=True, sources=("arXiv 2402.15627, section 3",),
)  # fmt: skip
#: Megatron-Core with Transformer Engine: cuDNN attention, fused elementwise work and loss, gradients reduced behind the
#: backward pass, messages between stages behind it too (overlap_p2p_comm, its default under interleaving).
MEGATRON_CORE = Software(
    name="megatron-core",
    tuned_attention=True,
    compiled=True,
    fused_accumulation=True,
    fused_loss=True,
    fused_projections=True,
    overlap_dp=True,
    overlap_gather=True,
    overlap_pp=True,
    retention=frameworks.MEGATRON,
    sources=("github.com/NVIDIA/Megatron-LM core_r0.10; arXiv 2504.14960",),
)
OVERHEADS = Overheads(
    launch=8e-6, pass_kernels=30, source="fused kernels, launched ahead; none of it measured"
)


@lru_cache
def device(name: str) -> HardwareConfig | None:
    """The catalogue's device of a table's words; None where it has none."""
    found = next((preset for word, preset in GPUS.items() if word in name.lower()), None)
    return compose([f"hardware={found}"]).hardware if found and "40" not in name else None


@lru_cache
def rates(name: str) -> Rates | None:
    """Rates of that device; None where the catalogue has none."""
    found = device(name)
    return None if found is None else Rates(found, from_catalogue(found), overheads=OVERHEADS)


@lru_cache
def shape(name: str, layers: int, hidden: int, width: int, heads: int, vocab: int) -> ModelConfig:
    """A model of the tables."""
    known = next((key for key in sorted(SHAPES, key=len, reverse=True) if key in name), None)
    key_values, gated = DENSE.get(name, (heads, False))
    dense = ModelConfig(
        name=name, layers=layers, hidden=hidden, heads=heads, kv_heads=key_values, head_dim=hidden // heads, vocab=vocab,
        experts=1, top_k=1, expert_width=width, dense_layers=layers, dense_width=width, gated=gated,
    )  # fmt: skip
    if known is None:
        return dense
    experts, top_k, shared, key_values = SHAPES[known]
    moe = {
        "experts": experts,
        "top_k": top_k,
        "shared_width": shared,
        "kv_heads": key_values,
        "dense_layers": 0,
    }
    return ModelConfig.model_validate(dense.model_dump() | moe | {"dense_width": 0, "gated": True})


def model(row: Row) -> ModelConfig | None:
    """The row's model; None where its shape isn't printed, or is none."""
    numbers = [whole(row, column) for column in ("layers", "hidden", "ffn", "heads", "vocab")]
    if any(value is None for value in numbers):
        return None
    layers, hidden, width, heads, vocab = (value or 0 for value in numbers)
    try:
        return shape(row["model"], layers, hidden, width, heads, vocab)
    except ValidationError:
        return None


def context_parallel(row: Row) -> int:
    """Context-parallel size, which stands in the notes."""
    found = re.search(r"\bcp=(\d+)", row.get("notes") or "")
    return int(found[1]) if found else 1


Maker = Callable[[Row, ModelConfig], Job | None]


def _laid_out(
    row: Row, shaped: ModelConfig, software: Software, recompute: Recompute, zero: int = 1
) -> Job | None:
    """A job whose layout is printed."""
    numbers = [whole(row, column) for column in ("tp", "pp", "gpus", "seq", "global_batch")]
    if any(not value for value in numbers):
        return None
    tp, pp, gpus, sequence, batch = (value or 0 for value in numbers)
    cp, micro, ep = context_parallel(row), whole(row, "micro_batch") or 1, whole(row, "ep") or 1
    if gpus % (tp * pp * cp):
        return None
    dp = gpus // (tp * pp * cp)
    if batch % (dp * micro) or batch < dp * micro:
        return None
    layout = Layout(pp=pp, dp=dp, cp=cp, ep=ep, etp=1 if ep > 1 else tp, tp=tp)
    return Job(
        model=shaped, layout=layout, sequence=sequence, micro_batch=micro, global_batch=batch, zero=zero,
        recompute=recompute, interleave=whole(row, "vpp") or 1, software=software,
        precision="fp8" if "fp8" in row["precision"] else "bf16",
    )  # fmt: skip


def _megascale(row: Row, shaped: ModelConfig) -> Job | None:
    """MegaScale's Table 2; its ablation switches one thing at a time, and only its first row is Megatron-LM's.

    MegaScale-MoE (arXiv 2505.11432) is told by its model: Megatron-Core against it, with its overlaps.
    """
    source = row["source"]
    if shaped.experts > 1:
        software = (
            MEGATRON_CORE
            if "Megatron" in source
            else replace(MEGATRON_CORE, overlap_tp=True, overlap_ep=True)
        )
        return _laid_out(row, shaped, software, "selective")
    if "ablation" in source:
        return _laid_out(row, shaped, MEGATRON_LM, "selective") if row["notes"] == "baseline" else None
    if "Megatron" in source:
        return _laid_out(row, shaped, MEGATRON_LM, "selective")
    return _laid_out(row, shaped, MEGASCALE, "none")


def _dgxc(row: Row, shaped: ModelConfig) -> Job | None:
    """NVIDIA's DGX Cloud recipes: Megatron (NeMo) or JAX, which the source's name tells."""
    if "Paxml" in row["source"] or "MaxText" in row["source"]:
        return _laid_out(row, shaped, replace(MEGATRON_CORE, name="jax"), "none", zero=3)
    return _laid_out(row, shaped, replace(MEGATRON_CORE, overlap_tp=True), "selective")


def _sc21(row: Row, shaped: ModelConfig) -> Job | None:
    """Narayanan et al. 2021, Table 1: full recomputation; micro-batch and interleaving aren't printed."""
    software = replace(
        MEGATRON_LM, name="megatron-lm 2021", sequence_parallel=False, split_messages=True, gradient_bytes=2,
        reduce_bytes=2, fused_accumulation=False,
    )  # fmt: skip
    return _laid_out(row, shaped, software, "full", zero=0)


def _korthikanti(row: Row, shaped: ModelConfig) -> Job | None:
    """Korthikanti et al. 2022, Table 5."""
    if "full" in row["source"]:
        return _laid_out(
            row, shaped, replace(MEGATRON_LM, sequence_parallel=False, split_messages=True), "full", 0
        )
    return _laid_out(row, shaped, MEGATRON_LM, "selective", 0)


def _core(row: Row, shaped: ModelConfig) -> Job | None:
    """Megatron-Core as it comes."""
    return _laid_out(row, shaped, replace(MEGATRON_CORE, overlap_tp=True), "none")


BLOCKS: dict[str, Maker] = {
    "megascale": _megascale,
    "megascale_moe": _megascale,
    "dgxc_h100": _dgxc,
    "sc21": _sc21,
    "korthikanti": _korthikanti,
    "llama3": _core,
    "nemo_2412": _core,
}
SEARCHED = "mpf"
"""The block whose layouts are mostly not printed: `trainer.study.methods` searches them."""
CALIBRATION = ("dgxc_h100",)
"""Blocks whose first bf16 row of each Megatron series set `trainer.sizing.time.rates.SUSTAINED`."""


def cases(rows: Sequence[Row]) -> list[Cases]:
    """The runs of every block that has its model and layout printed, one `Cases` each."""
    out: dict[str, Cases] = {}
    series: set[tuple[str, str]] = set()
    for line, row in enumerate(rows, start=2):
        block = row["block"]
        if block == SEARCHED:
            continue
        found = out.setdefault(block, Cases(block))
        shaped, machine = model(row), rates(row["gpu_type"])
        maker = BLOCKS.get(block)
        if maker is None:
            found.skip("software, models or layouts of this block aren't modelled")
            continue
        if shaped is None or machine is None:
            found.skip("model or device not on record")
            continue
        job = maker(row, shaped)
        if job is None:
            found.skip("layout not printed in full, or an ablation that isn't modelled")
            continue
        case = _case(row, line, job, machine)
        if case is None:
            found.skip("no step time and no MFU")
            continue
        megatron = "Paxml" not in row["source"] and "MaxText" not in row["source"]
        first = block in CALIBRATION and row["precision"] == "bf16" and megatron
        if first and (row["source"], row["model"]) not in series:
            series.add((row["source"], row["model"]))
            case = replace(case, calibrates=True)
        found.cases.append(case)
    return list(out.values())


def _case(row: Row, line: int, job: Job, machine: Rates) -> Case | None:
    """A case, its step time from the row's own or from its MFU."""
    peak = flops.peak(machine.hardware, job.precision)
    if peak is None:
        return None
    per_token = flops.train_flops_per_token(job.model, job.sequence, full_attention=True)
    seconds, mfu = number(row, "iter_time_s"), number(row, "mfu")
    if seconds is None and mfu:
        seconds = job.global_batch * job.sequence * per_token / (mfu / 100 * job.layout.ranks * peak)
    if seconds is None:
        return None
    return Case(
        table=row["block"],
        key=f"line {line} {row['source']}, {row['model']} on {row['gpus']}",
        job=job,
        rates=machine,
        peak=peak,
        flops_per_token=per_token,
        seconds=seconds,
    )
