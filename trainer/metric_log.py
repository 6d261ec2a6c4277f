"""The metric lines that rank 0 writes, and messages for a person where no console reads the lines."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterable
from typing import Any

from configs.metrics import (
    EndedLine,
    EvaluatedLine,
    MetricLine,
    MetricWriter,
    ResumedLine,
    SavedLine,
    SaveFailedLine,
    StepLine,
    StoppedLine,
)
from configs.rank import PARENT, RankContext
from configs.schema import RunConfig
from faulttol.staged.saver import SaveOutcome
from trainer.sizing.model import flops


class MetricLog:
    """Writes lines on rank 0, and nothing on the others."""

    def __init__(self, config: RunConfig, rank: RankContext) -> None:
        self._config, self._rank = config, rank
        self._writer = MetricWriter(rank.paths.metrics) if rank.rank == 0 else None

    def _write(self, line: MetricLine) -> None:
        if self._writer is not None:
            self._writer.write(line)

    def message(self, texts: Iterable[str]) -> None:
        """Write messages to standard error."""
        for text in texts if self._writer is not None else ():
            sys.stderr.write(f"{text}\n")

    def resumed(self, step: int, path: str | None, facts: dict[str, Any]) -> None:
        """The attempt continues from a step."""
        basis = flops.basis(self._config.hardware, str(self._config.train.precision))
        self._write(ResumedLine(time.time(), self._rank.attempt, step, path, basis, facts))

    def stepped(self, line: StepLine) -> None:
        """A step's numbers."""
        self._write(line)
        if self._writer is not None and PARENT not in os.environ:
            rate, seconds = line.tokens_per_second, line.step_seconds
            sys.stdout.write(
                f"step {line.step}/{self._config.train.steps} | loss {line.loss:.4f} | {rate:,.0f} tok/s | "
                f"{seconds:.3f} s/step\n"
            )
            sys.stdout.flush()

    def evaluated(self, step: int, loss: float, samples: int, seconds: float) -> None:
        """The loss on held-out documents."""
        self._write(EvaluatedLine(time.time(), self._rank.attempt, step, loss, samples, seconds))

    def saved(self, outcome: SaveOutcome, due: int | None, differs: str) -> None:
        """A save was committed, though copies of the state may differ; the next is due at a step."""
        self._write(
            SavedLine(
                time.time(), self._rank.attempt, outcome.step, outcome.path, outcome.bytes, outcome.seconds,
                outcome.held, outcome.tier, due, differs,
            )
        )  # fmt: skip

    def failed(self, outcome: SaveOutcome, in_a_row: int) -> None:
        """A save wasn't committed."""
        line = SaveFailedLine(time.time(), self._rank.attempt, outcome.step, str(outcome.error), in_a_row)
        self._write(line)
        if PARENT not in os.environ:  # else `watch` says so
            self.message([line.words])

    def ended(self, step: int, loss: float, tokens: int) -> None:
        """All steps are done."""
        self._write(EndedLine(time.time(), self._rank.attempt, step, loss, tokens))

    def stopped(self, step: int, saved: bool) -> None:
        """The ranks stop before the last step, since one was asked to."""
        self._write(StoppedLine(time.time(), self._rank.attempt, step, saved))

    def mfu(self, tokens_per_second: float) -> float | None:
        """Model FLOPs utilisation; None where the device's peak is unknown."""
        peak = flops.peak(self._config.hardware, str(self._config.train.precision))
        if peak is None:
            return None
        per_token = flops.train_flops_per_token(self._config.model, self._config.data.sequence)
        return tokens_per_second * per_token / (peak * self._rank.world)

    def close(self) -> None:
        """Nothing is written any more.

        Raises:
            OSError: where lines are left that the file doesn't take.
        """
        if self._writer is not None:
            self._writer.close()
