"""MoE Parallel Folding's five methods (arXiv 2504.14960, tables 1, 3, 4 and 5): each at its best layout.

The paper prints layouts for a part of its rows only. The others are searched, as its authors did: the fastest layout
that fits with room to spare; but FSDP's keep the sizes of the one row each that prints them (`PRINTED`). A micro-batch
is one sample, and layers aren't recomputed, except under FSDP where nothing fits otherwise. Routing is forced to be
even (capacity factor 1). MFU counts causal attention.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from configs.schema import ModelConfig
from trainer.sizing.memory import estimate as memory
from trainer.sizing.model import flops
from trainer.sizing.model.job import Recompute, TrainingJob
from trainer.sizing.model.layout import Layout
from trainer.sizing.time import estimate as time
from trainer.sizing.time.rates import Rates
from trainer.study import models, published
from trainer.study.cases import Row, number, whole

TABLE = "mpf"
METHODS = ("FSDP", "FSDP+EP", "TP+EP+DP", "MCore", "MCore+Folding")
"""The last word of a row's source; table 4 writes `_` for `+`, and its last one as `Folding`."""
#: Tensor- and expert-parallel size of the methods' rows for Mixtral-8x22B (tables 1 and 3).
PRINTED = {"FSDP": {"tp": 8, "ep": 1}, "FSDP+EP": {"tp": 2, "ep": 8}}
ROOM = 0.9
"""Of the device's memory that a searched layout may need: a long run isn't set up at the brink."""
BATCH = 1024
"""Samples of a step where a row has no batch (table 5): those of table 4."""
#: FSDP reduces in bf16 and gathers weights in bf16.
FSDP = replace(published.MEGATRON_CORE, name="fsdp", reduce_bytes=2)


@dataclass(frozen=True)
class PaperRun:
    """One row of the paper's tables."""

    key: str
    method: str
    model: str
    gpus: int
    sequence: int
    batch: int
    mfu: float | None
    """Measured, in percent; None: out of memory."""
    line: int
    """Of the table's file."""
    job: TrainingJob | None = None
    """The best layout that fits; None: none does."""
    seconds: float | None = None
    predicted: float | None = None
    """MFU in percent."""

    @property
    def setting(self) -> tuple[str, int, int, int]:
        """What methods are compared at."""
        return self.model, self.gpus, self.sequence, self.batch


def runs(rows: Sequence[Row]) -> tuple[list[PaperRun], dict[str, list[int]]]:
    """The block's rows, each searched; and lines of rows that can't be predicted, by reason."""
    out: list[PaperRun] = []
    skipped: dict[str, list[int]] = {}
    for line, row in enumerate(rows, start=2):
        if row["block"] != TABLE:
            continue
        run = _run(row, line)
        if isinstance(run, str):
            skipped.setdefault(run, []).append(line)
        else:
            out.append(run)
    return out, skipped


def _run(row: Row, line: int) -> PaperRun | str:
    method = row["source"].split()[-1].replace("_", "+")
    method = METHODS[-1] if method == "Folding" else method
    shaped, machine = models.model(row), published.rates(row["gpu_type"])
    gpus, sequence = whole(row, "gpus"), whole(row, "seq")
    if method not in METHODS or not gpus or not sequence:
        return "method, number of devices or sequence not on record"
    if isinstance(shaped, str) or isinstance(machine, str):
        return shaped if isinstance(shaped, str) else str(machine)
    measured = number(row, "mfu")
    if measured is None and row["mfu"] != "OOM":
        return "no MFU"
    batch = whole(row, "global_batch") or BATCH
    printed = PRINTED.get(method, {}) | {a: size for a in ("tp", "pp", "ep") if (size := whole(row, a))}
    task = _Task(method, gpus, sequence, batch, printed)
    fastest = _best(task, shaped, machine)
    key = f"line {line} {row['source'].removeprefix('MoE Parallel Folding ')}, {row['model']} on {gpus}"
    run = PaperRun(key, method, row["model"], gpus, sequence, batch, measured, line)
    if fastest is None:
        return run
    job, seconds = fastest
    per_token = flops.train_flops_per_token(shaped, sequence)
    peak = flops.peak(machine.hardware, "bf16") or math.nan
    return replace(
        run, job=job, seconds=seconds, predicted=100 * batch * sequence * per_token / (seconds * gpus * peak)
    )


@dataclass(frozen=True)
class _Task:
    method: str
    gpus: int
    sequence: int
    batch: int
    printed: dict[str, int]

    @property
    def searched(self) -> bool:
        """Whether its layout isn't printed."""
        return not self.method.startswith("FSDP") and len(self.printed) < 2

    def sizes(self, axis: str, choices: Sequence[int]) -> Sequence[int]:
        """The printed size of an axis, or those to choose from."""
        return (self.printed[axis],) if axis in self.printed else choices


def _best(task: _Task, shaped: ModelConfig, machine: Rates) -> tuple[TrainingJob, float] | None:
    """The fastest layout that fits: without recomputation, or, under FSDP only, with it where it must be."""
    room = ROOM * (memory.capacity(machine.hardware) or math.inf)
    choices: tuple[Recompute, ...] = ("none", "full") if task.method.startswith("FSDP") else ("none",)
    for recompute in choices:
        best: tuple[TrainingJob, float] | None = None
        for laid in _jobs(task, shaped):
            job = replace(laid, recompute=recompute)
            seconds = time.parts(job, machine).step
            if best is None or seconds < best[1]:
                _, used = memory.worst(job, machine.hardware.kind)
                if used.needed <= (room if task.searched else room / ROOM):
                    best = job, seconds
        if best is not None:
            return best
    return None


def _jobs(task: _Task, shaped: ModelConfig) -> Iterator[TrainingJob]:
    """What a method allows."""
    method = task.method
    piped = method.startswith("MCore")
    tps = task.sizes("tp", [tp for tp in (1, 2, 4, 8) if tp <= shaped.kv_heads])
    pps = task.sizes("pp", (1, 2, 4, 8, 16)) if piped else (1,)
    eps = task.sizes("ep", [ep for ep in (1, 2, 4, 8, 16, 32, 64) if shaped.experts % ep == 0])
    cps = (1,) if task.sequence <= 4096 else (1, 2, 4, 8, 16)
    for tp, pp, cp, ep in itertools.product(tps, pps, cps, (1,) if method == "FSDP" else eps):
        if task.gpus % (tp * pp * cp):
            continue
        dp = task.gpus // (tp * pp * cp)
        if task.batch % dp:
            continue
        for etp in _expert_tensor(method, tp):
            stage = tp * cp * dp if method == "MCore+Folding" else cp * dp
            if stage % (ep * (etp if method == "MCore+Folding" else 1)):
                continue
            for interleave in _interleave(shaped.layers, pp, task.batch // dp):
                yield TrainingJob(
                    model=shaped, layout=Layout(pp=pp, dp=dp, cp=cp, ep=ep, etp=etp, tp=tp), sequence=task.sequence,
                    micro_batch=1, global_batch=task.batch, zero=3 if method.startswith("FSDP") else 1,
                    interleave=interleave, folded=method == "MCore+Folding",
                    software=FSDP if method.startswith("FSDP") else published.MEGATRON_CORE,
                )  # fmt: skip


def _expert_tensor(method: str, tp: int) -> Sequence[int]:
    """Folding frees it; FSDP+EP has whole experts; the others cut experts as they cut attention."""
    if method == "MCore+Folding":
        return sorted({1, 2, tp})
    return (1,) if method == "FSDP+EP" else (tp,)


def _interleave(layers: int, pp: int, micro_batches: int) -> Iterator[int]:
    """One, and numbers of chunks that cut stages and micro-batches evenly."""
    yield 1
    if pp > 1 and micro_batches % pp == 0:
        yield from (chunks for chunks in (2, 4, 5, 7, 10) if layers % (pp * chunks) == 0)
