"""Published training runs (published_runs.csv): blocks of papers' and vendors' tables.

What a row doesn't print of its model is in `trainer.study.models`; what its software does is from its paper or
documentation, one function for each source. A row without what a forecast needs is listed with the reason.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

from configs.hardware import HardwareConfig
from configs.schema import ModelConfig
from trainer.sizing.memory import estimate as memory
from trainer.sizing.model import flops, frameworks
from trainer.sizing.model.job import Recompute, Software, TrainingJob
from trainer.sizing.model.layout import Layout
from trainer.sizing.time.fabric import from_catalogue
from trainer.sizing.time.rates import Overheads, Rates
from trainer.study import models
from trainer.study.cases import Cases, Row, StudyCase, number, whole

COLUMNS = ("source", "model", "layers", "hidden", "gpus", "gpu_type", "mfu", "block", "notes")

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
#: MegaScale: FlashAttention-2; tensor-, pipeline- and data-parallel exchange overlapped.
MEGASCALE = replace(
    MEGATRON_LM, name="megascale", flash_attention=True, causal_flops=True, overlap_dp=True, overlap_gather=True,
    overlap_tp=True, overlap_pp=True, joined_block=True, sources=("arXiv 2402.15627, section 3",),
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
#: torchtitan and others on FSDP2 with torch.compile: FlashAttention 2 through torch, sharded fp32 gradients.
TORCH = Software(
    name="torch fsdp2",
    compiled=True,
    fused_accumulation=True,
    overlap_dp=True,
    overlap_gather=True,
    fresh_gradients=True,
    context="gather",
    sources=("arXiv 2410.06511",),
)
#: llm-foundry under Composer: torch's first FSDP, eager layers, gradients reduced in bf16; FlashAttention 1 in Triton,
#: which FlashAttention 2 is 1.7 times as fast as (arXiv 2307.08691, figures 4 to 6).
FOUNDRY = replace(
    TORCH, name="llm-foundry", compiled=False, fused_projections=True, reduce_bytes=2, attention_share=0.6,
    sources=("github.com/mosaicml/llm-foundry scripts/train/benchmarking",),
)  # fmt: skip
OVERHEADS = Overheads(
    launch=8e-6, pass_kernels=30, source="fused kernels, launched ahead; none of it measured"
)
LIMITED = 0.68
"""Sustained rate of torchtitan's H100, which are limited to 500 of 700 W (arXiv 2410.06511): 0.80 times the root of 5/7."""
WINDOW = 512
"""Tokens that a query sees under MegaScale's sliding window, which its paper doesn't print; it adds a point of MFU."""


@lru_cache
def rates(name: str) -> Rates | str:
    """Rates of the device of a table's words, or why there are none."""
    hardware = models.device(name)
    if isinstance(hardware, str):
        return hardware
    limited = LIMITED if "96" in name and hardware.name == "h100" else None
    return Rates(hardware, from_catalogue(hardware), overheads=OVERHEADS, sustained=limited)


def context_parallel(row: Row) -> int:
    """Context-parallel size, which stands in the notes."""
    return _noted(row, "cp") or 1


def _noted(row: Row, name: str) -> int | None:
    match = re.search(rf"\b{name}=(\d+)", row.get("notes") or "")
    return int(match[1]) if match else None


def _precision(row: Row) -> str:
    """The matmuls' precision as rates know it: 16 bits are one rate, 8 bits another; empty where it is neither."""
    words = row["precision"].lower()
    if "fp4" in words:
        return ""
    return "fp8" if "fp8" in words else "bf16"


def batch(row: Row, sequence: int) -> int | None:
    """Samples of a step, as printed or as step time and tokens a second give them; None where neither is there."""
    seconds, speed = number(row, "iter_time_s"), number(row, "tokens_per_s")
    return whole(row, "global_batch") or (round(seconds * speed / sequence) if seconds and speed else None)


@dataclass(frozen=True)
class Run:
    """What a source's function decides about a row."""

    software: Software
    recompute: Recompute | None = "none"
    """None: what isn't printed is the mildest that fits the device's memory."""
    zero: int = 1
    interleave: int | None = None
    """Where it isn't printed."""
    zero_bubble: bool = False
    model: ModelConfig | None = None
    """Instead of the row's."""
    sequence: int | None = None
    micro_batch: int | None = None
    """Where they aren't printed, or mean something else."""
    batch: int | None = None


def laid_out(row: Row, shaped: ModelConfig, hardware: HardwareConfig, run: Run) -> TrainingJob | str:
    """A job whose layout is printed, or what is missing."""
    sequence, gpus = run.sequence or whole(row, "seq"), whole(row, "gpus")
    samples = run.batch or batch(row, sequence or 1)
    named = (("sequence", sequence), ("number of devices", gpus), ("global batch", samples))
    missing = [name for name, value in named if not value]
    missing += [axis for axis in ("tp", "pp") if not whole(row, axis)]
    if missing or not (sequence and gpus and samples):
        return f"{', '.join(missing)} not printed"
    tp, pp, cp = whole(row, "tp") or 1, whole(row, "pp") or 1, context_parallel(row)
    micro, ep = run.micro_batch or whole(row, "micro_batch") or 1, whole(row, "ep") or 1
    dp, rest = divmod(gpus, tp * pp * cp)
    etp = _noted(row, "etp") or (1 if ep > 1 else tp)
    if rest or dp * cp * tp % (ep * etp):
        return f"{gpus} devices don't divide by tp={tp} pp={pp} cp={cp} ep={ep} etp={etp}"
    if samples % (dp * micro):
        return f"a batch of {samples} doesn't divide over dp={dp} and micro-batches of {micro}"
    precision = _precision(row)
    if not precision:
        return f"{row['precision']}: rates of 4-bit matmuls aren't on record"
    job = TrainingJob(
        model=run.model or shaped, layout=Layout(pp=pp, dp=dp, cp=cp, ep=ep, etp=etp, tp=tp), sequence=sequence,
        micro_batch=micro, global_batch=samples, precision=precision, zero=run.zero, recompute=run.recompute or "none",
        interleave=whole(row, "vpp") or run.interleave or 1, zero_bubble=run.zero_bubble,
        node=hardware.devices_per_node or 8, software=run.software,
    )  # fmt: skip
    if run.recompute is None and memory.fits(job, hardware) is False:
        return replace(job, recompute="full")
    return job


Maker = Callable[[Row, ModelConfig], Run | str]


def _megascale(row: Row, shaped: ModelConfig) -> Run | str:
    """MegaScale's Table 2, and Table 3, which adds one thing after the other to Megatron-LM."""
    source = row["source"]
    if "ablation" in source:
        return _ablated(row["notes"], shaped)
    if "Megatron" in source:
        return Run(MEGATRON_LM, "selective")
    return Run(MEGASCALE)


#: Table 3 in its order: what is added, by a word of its note, and what that changes.
ABLATION: tuple[tuple[str, dict[str, Any]], ...] = (
    ("baseline", {}),
    ("parallel transformer block", {"joined_block": True}),
    ("sliding window", {}),
    ("TP overlap", {"overlap_tp": True}),
    ("PP overlap", {"overlap_pp": True}),
    ("DP overlap", {"overlap_dp": True, "overlap_gather": True}),
    ("efficient operators", {"flash_attention": True, "causal_flops": True}),
    ("misc", {}),
    ("LAMB", {}),
)


def _ablated(note: str, shaped: ModelConfig) -> Run | str:
    at = next((i for i, (word, _) in enumerate(ABLATION) if word in note), None)
    if at is None:
        return f"'{note}' is not a step of MegaScale's ablation on record"
    changes = {name: value for _, what in ABLATION[: at + 1] for name, value in what.items()}
    model = shaped.model_copy(update={"parallel_block": at >= 1, "window": WINDOW if at >= 2 else 0})
    software = replace(MEGATRON_LM, **changes)
    return Run(software, "none" if software.flash_attention else "selective", model=model)


def _megascale_moe(row: Row, _shaped: ModelConfig) -> Run:
    """arXiv 2505.11432: Megatron-Core, against its own overlap of exchange with computing inside and between layers."""
    if "Megatron" in row["source"]:
        return Run(MEGATRON_CORE, "selective")
    return Run(replace(MEGATRON_CORE, overlap_tp=True, overlap_ep=True), "selective")


def _jax(_row: Row, _shaped: ModelConfig) -> Run:
    """Paxml and MaxText: weights gathered behind computing; recomputation isn't printed."""
    return Run(replace(MEGATRON_CORE, name="jax"), None, zero=3)


def _nemo(row: Row, _shaped: ModelConfig) -> Run:
    """NVIDIA's recipes for NeMo and Megatron-Bridge; `fsdp` in the notes: its own FSDP."""
    core = replace(MEGATRON_CORE, overlap_tp=True, overlap_ep=True, node_dispatch=True)
    return Run(core, zero=3 if _noted(row, "fsdp") else 1)


def _sc21(_row: Row, _shaped: ModelConfig) -> Run:
    """Narayanan et al. 2021, Table 1: full recomputation; micro-batch and interleaving aren't printed."""
    software = replace(
        MEGATRON_LM, name="megatron-lm 2021", sequence_parallel=False, split_messages=True, gradient_bytes=2,
        reduce_bytes=2, fused_accumulation=False,
    )  # fmt: skip
    return Run(software, "full", zero=0)


def _korthikanti(row: Row, _shaped: ModelConfig) -> Run:
    """Korthikanti et al. 2022, Table 5."""
    if "full" in row["source"]:
        return Run(replace(MEGATRON_LM, sequence_parallel=False, split_messages=True), "full", 0)
    return Run(MEGATRON_LM, "selective", 0)


def _llama3(_row: Row, _shaped: ModelConfig) -> Run:
    """The Llama 3 herd, section 3.3: interleaved stages of one layer (126 of 128 places), keys and values gathered; its
    attention is older than kernels made for Hopper."""
    return Run(replace(MEGATRON_CORE, tuned_attention=False, context="gather"), interleave=8)


def _torchtitan(row: Row, _shaped: ModelConfig) -> Run:
    """arXiv 2410.06511: the printed micro-batch is a replica's share of a step; its pipeline takes one sample at a time."""
    software = replace(TORCH, overlap_tp="asyncTP" in row["notes"], overlap_pp=True)
    each = whole(row, "micro_batch") or 1
    dp = (whole(row, "gpus") or 0) // (
        (whole(row, "tp") or 1) * (whole(row, "pp") or 1) * context_parallel(row)
    )
    return Run(software, _recomputed(row), zero=3, micro_batch=1, batch=each * dp)


def _recomputed(row: Row) -> Recompute:
    return "full" if "full AC" in row["notes"] or "AC=True" in row["notes"] else "none"


def _kempner(row: Row, _shaped: ModelConfig) -> Run | str:
    """KempnerForge on FSDP2."""
    if "moe_packed" in row["source"]:
        return "experts run one after the other in Python there, and their width isn't printed"
    return Run(replace(TORCH, compiled=False), _recomputed(row), zero=3)


def _foundry(row: Row, _shaped: ModelConfig) -> Run:
    """llm-foundry's throughput tables: FULL_SHARD is ZeRO-3, SHARD_GRAD_OP ZeRO-2."""
    return Run(FOUNDRY, _recomputed(row), zero=3 if "FULL_SHARD" in row["notes"] else 2)


def _deepseek(_row: Row, _shaped: ModelConfig) -> Run:
    """DeepSeek-V3, arXiv 2412.19437 section 3.2: DualPipe hides dispatch and fills the pipeline with weight gradients."""
    return Run(replace(MEGATRON_CORE, overlap_ep=True, node_dispatch=True), zero_bubble=True)


#: Primus on one node. Its FLOP/s and tokens/s, 23.4 GFLOP a token, are those of 16 of Llama 2's 32 layers at 4,096 tokens.
#: It doesn't print its batch: at 32 micro-batches its two first rows, 1F1B and two chunks a rank, are as far apart as they
#: are, 1.091 = (m + 7) / (m + 3.5).
PRIMUS_LAYERS, PRIMUS_SEQUENCE, PRIMUS_MICRO_BATCHES = 16, 4096, 32
PRIMUS_CALIBRATION = ("Primus pipeline 1f1b", "Primus pipeline vpp2")


def _primus(row: Row, shaped: ModelConfig) -> Run | str:
    """AMD's Primus on Megatron-Core, where it shows its schedules on a pipeline alone."""
    schedule = row["source"].rpartition("pipeline ")[2]
    if schedule in ("v-half", "v-min"):
        return f"schedule {schedule} trades a bubble for memory and isn't modelled"
    count = (whole(row, "gpus") or 0) // (whole(row, "pp") or 1)
    cut = shaped.model_copy(update={"layers": PRIMUS_LAYERS, "dense_layers": PRIMUS_LAYERS})
    filled = "zero" in schedule or "zbv" in schedule
    software = replace(MEGATRON_CORE, tuned_attention=False, overlap_pp=False)
    return Run(
        software, zero_bubble=filled, model=cut, sequence=PRIMUS_SEQUENCE, micro_batch=1,
        batch=PRIMUS_MICRO_BATCHES * count,
    )  # fmt: skip


SOURCES: tuple[tuple[str, Maker], ...] = (
    ("megascale-moe", _megascale_moe), ("megascale", _megascale), ("paxml", _jax), ("maxtext", _jax), ("sc21", _sc21),
    ("korthikanti", _korthikanti), ("llama 3 herd", _llama3), ("torchtitan", _torchtitan), ("kempner", _kempner),
    ("llm-foundry", _foundry), ("deepseek", _deepseek), ("primus", _primus), ("bridge", _nemo), ("nemo", _nemo),
    ("dgxc", _nemo), ("nemotron", _nemo), ("megatron", _nemo), ("mcore", _nemo), ("neox", _korthikanti),
)  # fmt: skip
"""Who decides about a row, by a word of its source; the first that is in it."""
SEARCHED = "mpf"
"""The block whose layouts are mostly not printed: `trainer.study.methods` searches them."""
CALIBRATION = ("dgxc_h100",)
"""Blocks whose first bf16 row of each Megatron series set `trainer.sizing.time.rates.SUSTAINED`."""


def cases(rows: Sequence[Row]) -> list[Cases]:
    """The runs of every block, one `Cases` each, with a reason for each row that can't be predicted."""
    out: dict[str, Cases] = {}
    series: set[tuple[str, str]] = set()
    for line, row in enumerate(rows, start=2):
        block = row["block"]
        if block == SEARCHED:
            continue
        block_cases = out.setdefault(block, Cases(block))
        case = _case(row, line)
        if isinstance(case, str):
            block_cases.skip(case, line)
            continue
        first = block in CALIBRATION and row["precision"] == "bf16" and case.job.software.name != "jax"
        if first and (row["source"], row["model"]) not in series:
            series.add((row["source"], row["model"]))
            case = replace(case, calibrates=True)
        if row["source"] in PRIMUS_CALIBRATION:
            case = replace(case, calibrates=True)
        block_cases.cases.append(case)
    return list(out.values())


def _case(row: Row, line: int) -> StudyCase | str:
    """A row's case, or why there is none."""
    shaped, machine = models.model(row), rates(row["gpu_type"])
    if isinstance(machine, str) or isinstance(shaped, str):
        return machine if isinstance(machine, str) else str(shaped)
    maker = next((make for word, make in SOURCES if word in row["source"].lower()), None)
    if maker is None:
        return f"what the software of '{row['source']}' does isn't on record"
    run = maker(row, shaped)
    job = run if isinstance(run, str) else laid_out(row, shaped, machine.hardware, run)
    if isinstance(job, str):
        return job
    why = machine.kernels.why(job.precision)
    if flops.peak(machine.hardware, job.precision) is None or why:
        return why or f"{machine.hardware.name} has no {job.precision} peak on record"
    key = f"line {line} {row['source']}, {row['model']} on {row['gpus']}"
    case = StudyCase(table=row["block"], key=key, job=job, rates=machine, line=line)
    seconds = _seconds(row, case)
    return (
        replace(case, seconds=seconds) if seconds else "neither step time nor tokens a second nor MFU printed"
    )


def _seconds(row: Row, case: StudyCase) -> float | None:
    """The measured step: printed, or from tokens a second, MFU or FLOP/s, in this order."""
    seconds, speed, mfu, tera = (
        number(row, column) for column in ("iter_time_s", "tokens_per_s", "mfu", "tflops_per_gpu")
    )
    if seconds is not None:
        return seconds
    if speed:
        return case.tokens / speed
    rate = mfu / 100 * case.peak if mfu else tera * 1e12 if tera else None
    return case.tokens * case.flops_per_token / (rate * case.job.layout.ranks) if rate else None
