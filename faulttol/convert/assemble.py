"""The part of an import that all formats share: from tensors of another format to a checkpoint of ours."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from configs.errors import UserError
from configs.model import ModelConfig
from faulttol.checkpoint.boxes import Box, coverage_error
from faulttol.checkpoint.pieces import DTYPES
from faulttol.checkpoint.store import StoreLike
from faulttol.convert.facts import COUNT, Kind, Moments, balances, fresh, is_parameter
from faulttol.convert.facts import DTYPES as DTYPES_OF
from faulttol.convert.job import WORK, ConversionJob, Estimate
from faulttol.convert.placed import Foreign, PlacedTensor, import_bytes
from faulttol.convert.target import ConversionTarget, Value
from faulttol.convert.values import FLOATS, convertible

Fill = tuple[ModelConfig, Kind, Moments]
"""What decides which tensors training wants beside those that are there."""


@dataclass(frozen=True)
class ImportDestination:
    """The checkpoint that an import writes."""

    out: StoreLike
    run: str
    """That the folder belongs to."""
    step: int
    facts: dict[str, Any]


def imported(
    foreign: Foreign,
    placed: Sequence[PlacedTensor],
    into: ImportDestination,
    *,
    notes: Iterable[str] = (),
    fill: Fill | None = None,
    masters: bool = True,
    peak: int = 0,
) -> ConversionJob:
    """A checkpoint of foreign tensors.

    Args:
        placed: where each lies in ours.
        fill: None: nothing is made up.
        masters: whether floats become fp32, as a trainer keeps them; else dtypes stay.
        peak: bytes that reading takes beside the chunks.

    Raises:
        UserError: where a tensor is missing, doubled, or of another shape or kind, or the folder can't take the checkpoint.
    """
    moments = DTYPES_OF[fill[2]] if fill is not None else "float32"
    values = list(_values(foreign, placed, moments if masters else None))
    remarks = list(notes)
    if fill is not None:
        made = _complete_state(values, *fill)
        if made:
            remarks.append(f"made up as zeros: {_summary(made)}")
        values += made
    target = ConversionTarget(into.out, into.run, into.step, values)
    read = sum(one.elements * _item(foreign, one) for one in placed)
    cost = Estimate(
        bytes_read=read,
        bytes_written=target.size,
        bytes_moved=sum(value.bytes for value in values),
        peak_memory=target.at_once * WORK + peak,
    )
    return ConversionJob(cost, tuple(remarks), partial(target.run, foreign, into.facts, tuple(remarks)))


def _item(foreign: Foreign, placed: PlacedTensor) -> int:
    return DTYPES[foreign.dtype(placed.foreign)][1]


def _values(foreign: Foreign, placed: Sequence[PlacedTensor], moments: str | None) -> Iterable[Value]:
    """The tensors that the parts make up.

    Args:
        moments: dtype of an optimizer's slots, where other floats become fp32; None: dtypes stay.
    """
    parts: dict[str, list[PlacedTensor]] = {}
    there = set(foreign.names())
    missing = [one.foreign for one in placed if one.foreign not in there]
    if missing:
        raise UserError(
            f"{missing[0]} isn't there ({len(missing)} of {len(placed)} tensors are missing); complete the files"
        )
    for one in placed:
        shape = foreign.shape(one.foreign)
        if shape != one.shape:
            raise UserError(
                f"{one.foreign} is {list(shape)}, and {list(one.shape)} is what {one.name}{one.box} takes; correct the "
                "model's settings"
            )
        parts.setdefault(one.name, []).append(one)
    for name, mine in parts.items():
        mine.sort(key=lambda one: one.box.start)
        whole = mine[0].box.whole
        why = coverage_error(Box.full(whole), [one.box for one in mine])
        if why:
            raise UserError(f"{name}{why}; complete the files or correct their map of names")
        given = foreign.dtype(mine[0].foreign)
        wanted = given
        if moments is not None and given in FLOATS:
            wanted = moments if "/" in name and name != COUNT else "float32"
        for one in mine:
            if not convertible(foreign.dtype(one.foreign), wanted):
                raise UserError(
                    f"{one.foreign} is {foreign.dtype(one.foreign)}, which doesn't become {wanted} as {name} is; convert it"
                )
        divisible = all(one.order is None or one.order.dim for one in mine)
        yield Value(name, wanted, whole, partial(_read, foreign, mine, wanted), divisible)


def _read(foreign: Foreign, parts: Sequence[PlacedTensor], wanted: str, box: Box) -> Any:
    return import_bytes(foreign, parts, box, wanted)


def _complete_state(values: Sequence[Value], model: ModelConfig, kind: Kind, moments: Moments) -> list[Value]:
    there = {value.name for value in values}
    parameters = [(value.name, value.shape) for value in values if is_parameter(value.name)]
    return [*balances(model, there), *fresh(parameters, kind, moments, there)]


def _summary(made: Sequence[Value]) -> str:
    """Kinds of tensors with their number."""
    counts: dict[str, int] = {}
    for value in made:
        kind = (
            value.name
            if value.name == COUNT
            else value.name.rpartition("/")[2]
            if "/" in value.name
            else value.name.split(".feed.")[-1]
        )
        counts[kind] = counts.get(kind, 0) + 1
    return ", ".join(f"{count} {kind}" if count > 1 else kind for kind, count in counts.items())
