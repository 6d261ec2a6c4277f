"""A published run: what was run, where, and what was measured of it."""

from __future__ import annotations

import csv
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

from configs.errors import UserError
from trainer.sizing.model import flops
from trainer.sizing.model.job import TrainingJob
from trainer.sizing.time.rates import Rates

Row = Mapping[str, str]


@dataclass(frozen=True)
class StudyCase:
    """One row of a table. What isn't known of it is None, and then it isn't scored."""

    table: str
    key: str
    """Which row, for people: line and name."""
    job: TrainingJob
    rates: Rates
    seconds: float | None = None
    """Measured step."""
    fits: bool | None = None
    """Whether it ran; False: out of memory."""
    reserved: float | None = None
    """Peak bytes that the allocator held."""
    group: str = ""
    """Rows that a user would have chosen among; empty: none."""
    label: str = ""
    """What tells it from the others of its group."""
    calibrates: bool = False
    """Was used to set an overhead, and isn't scored."""
    line: int = 0
    """Of the table's file."""
    note: str = ""
    """What is odd about the run, by its own record."""

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.job.global_batch * self.job.sequence

    @property
    def peak(self) -> float:
        """Peak of one device in FLOP/s at the run's precision; NaN where it is unknown."""
        return flops.peak(self.rates.hardware, self.job.precision) or math.nan

    @cached_property
    def flops_per_token(self) -> float:
        """Model FLOPs with the whole attention matrix, as the tables' sources count them."""
        return flops.train_flops_per_token(self.job.model, self.job.sequence, full_attention=True)


@dataclass
class Cases:
    """What a table came to."""

    table: str
    cases: list[StudyCase] = field(default_factory=list)
    skipped: dict[str, list[int]] = field(default_factory=dict)
    """Lines of rows that can't be predicted, by reason."""

    def skip(self, reason: str, line: int) -> None:
        """Note a row that can't be predicted."""
        self.skipped.setdefault(reason, []).append(line)


def read(path: Path) -> list[Row]:
    """The rows of a CSV file.

    Raises:
        UserError: where it isn't there, isn't text, or has no rows.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows: list[Row] = list(csv.DictReader(file))
    except FileNotFoundError:
        raise UserError(f"{path} is not there; give an existing CSV file") from None
    except OSError as error:
        raise UserError(f"{path} can't be read: {error.strerror}; give an existing CSV file") from None
    except (UnicodeDecodeError, csv.Error) as error:
        raise UserError(f"{path} is not a CSV file ({error}); give a table with a header line") from None
    if not rows:
        raise UserError(f"{path} has no rows; give a table with a header line and at least one row")
    return rows


def number(row: Row, column: str) -> float | None:
    """A cell as a number; None where it is empty, `nan`, or something else."""
    try:
        value = float(row.get(column) or "nan")
    except ValueError:
        return None
    return None if value != value else value


def whole(row: Row, column: str) -> int | None:
    """A cell as a whole number; None where it isn't one."""
    value = number(row, column)
    return None if value is None or value != int(value) else int(value)


def data_folder(given: Path | None) -> Path:
    """The folder of the published tables: as given, or from MEGARAY_DATA, or `shared/data` beside the repository.

    Raises:
        UserError: where there is none.
    """
    named = given or (Path(os.environ["MEGARAY_DATA"]) if os.environ.get("MEGARAY_DATA") else None)
    beside = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    folder = named or beside
    if not folder.is_dir():
        raise UserError(
            f"--data: {folder} is not a folder; the published tables aren't part of this repository: name their folder "
            "by --data DIR or MEGARAY_DATA, or one table by --runs FILE"
        )
    return folder


def has_columns(rows: Sequence[Row], columns: Sequence[str]) -> bool:
    """Whether a table has these columns."""
    return all(column in rows[0] for column in columns)
