"""Korthikanti et al. 2022 (arXiv 2205.05198), figure 1: GiB of states and of activations per GPU, by model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from trainer.sizing.memory import estimate as memory
from trainer.sizing.model.job import Recompute, Software, TrainingJob
from trainer.sizing.model.layout import Layout
from trainer.study import vtrain
from trainer.study.cases import Row, number

TABLE = "korthikanti_memory"
COLUMNS = ("model", "par_opt_GiB", "act_none_GiB", "act_seqsel_GiB")
#: Layers, width, heads, pipeline stages, interleaved chunks, micro-batch, global batch of the paper's table 3; tp is 8.
MODELS = {
    "22B": (48, 6144, 64, 1, 1, 4, 4),
    "175B": (96, 12288, 96, 8, 3, 1, 64),
    "530B": (105, 20480, 128, 35, 3, 1, 280),
    "1T": (128, 25600, 160, 64, 1, 1, 512),
}
SOFTWARE = replace(
    vtrain.SOFTWARE,
    name="megatron-lm 2022, fp32 gradients",
    gradient_bytes=4,
    reduce_bytes=4,
    fused_accumulation=True,
)


@dataclass(frozen=True)
class TableFigure:
    """One figure of the table."""

    model: str
    what: str
    printed: float
    predicted: float
    """GiB, both."""
    line: int = 0
    """Of the table's file."""


def lines(rows: Sequence[Row]) -> list[TableFigure]:
    """Every figure of a known model."""
    out = []
    for line, row in enumerate(rows, start=2):
        if row["model"] not in MODELS:
            continue
        tensor, selective = _job(row["model"], "none", False), _job(row["model"], "selective", True)
        made = (
            ("states", "par_opt_GiB", _states(tensor)),
            ("activations, tensor parallelism", "act_none_GiB", _activations(tensor)),
            (
                "activations, sequence parallelism, selective recomputation",
                "act_seqsel_GiB",
                _activations(selective),
            ),
        )
        for what, column, predicted in made:
            printed = number(row, column)
            if printed:
                out.append(TableFigure(row["model"], what, printed, predicted, line))
    return out


def _job(name: str, recompute: Recompute, sequence: bool) -> TrainingJob:
    layers, hidden, heads, pp, interleave, micro, batch = MODELS[name]
    software: Software = replace(SOFTWARE, sequence_parallel=sequence)
    return TrainingJob(
        model=vtrain.gpt(layers, hidden, heads, 51200), layout=Layout(pp=pp, dp=1, cp=1, ep=1, etp=1, tp=8),
        sequence=2048, micro_batch=micro, global_batch=batch, recompute=recompute, interleave=interleave,
        software=software,
    )  # fmt: skip


def _states(job: TrainingJob) -> float:
    _, used = memory.worst(job, "cuda")
    return (used.weights + used.gradients + used.optimizer) / memory.GIB


def _activations(job: TrainingJob) -> float:
    _, used = memory.worst(job, "cuda")
    return used.activations / memory.GIB
