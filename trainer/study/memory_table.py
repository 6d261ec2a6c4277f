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
    vtrain.SOFTWARE, name="megatron-lm 2022, fp32 gradients", gradient_bytes=4, reduce_bytes=4, fused_accumulation=True
)  # fmt: skip


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
        tensor, selective = _used(row["model"], "none", False), _used(row["model"], "selective", True)
        made = (
            ("states", tensor.weights + tensor.gradients + tensor.optimizer),
            ("activations, tensor parallelism", tensor.activations),
            ("activations, sequence parallelism, selective recomputation", selective.activations),
        )
        for (what, predicted), column in zip(made, COLUMNS[1:], strict=True):
            printed = number(row, column)
            if printed:
                out.append(TableFigure(row["model"], what, printed, predicted / memory.GIB, line))
    return out


def _used(name: str, recompute: Recompute, sequence: bool) -> memory.MemoryUsage:
    """Memory of a model's fullest rank."""
    layers, hidden, heads, pp, interleave, micro, batch = MODELS[name]
    software: Software = replace(SOFTWARE, sequence_parallel=sequence)
    job = TrainingJob(
        model=vtrain.gpt(layers, hidden, heads, 51200), layout=Layout(pp=pp, dp=1, cp=1, ep=1, etp=1, tp=8),
        sequence=2048, micro_batch=micro, global_batch=batch, recompute=recompute, interleave=interleave,
        software=software,
    )  # fmt: skip
    return memory.worst(job, "cuda")[1]
