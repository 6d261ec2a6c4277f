"""What a resume may ask for otherwise than the submission did, and what follows from it. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from configs.compose import amend, groups
from configs.errors import UserError
from configs.schema import RunConfig
from orchestrator import PROGRAM
from trainer.optim.schedule import consumed_samples, learning_rate

Change = tuple[str, str, str]
"""Field, its value before, its value now."""

_KEPT = {
    "model": "its model, whose state its checkpoints have",
    "data": "its data, in which it has a position",
    "train.seed": "its seed, which orders its samples",
    "optim.kind": "its optimizer, whose state its checkpoints have",
    "optim.moments": "its optimizer's moments, which its checkpoints have",
    "workload": "what it does",
    "collectives": "what it measures",
    "name": "its name",
    "resume": "what it began from",
    "experiment": "its model and data, which an experiment sets",
}
"""What another resume mustn't change: a field, or a section for all in it."""
_LAYOUT = ("parallel", "cluster", "hardware")


def refuse_fixed(config: RunConfig, overrides: Sequence[str], run_id: str) -> None:
    """Refuse what a run keeps for life; typing the value that it has is not a change.

    Raises:
        UserError: naming the field, and what to type for a new run.
    """
    now = flatten(config)
    for override in overrides:
        key, _, value = override.partition("=")
        kept = _kept(key)
        if kept is None or (key in now and as_typed(now[key]) == value):
            continue
        if key in groups() and key != "experiment" and value == getattr(getattr(config, key), "name", None):
            continue
        raise UserError(
            f"{override}: run {run_id} keeps {kept}; leave it out, or type `{PROGRAM} submit {override} …` for a new run"
        )


def _kept(field: str) -> str | None:
    """What a run keeps that the field belongs to; None where it may change."""
    return next((why for name, why in _KEPT.items() if field == name or field.startswith(f"{name}.")), None)


def layout_changed(old: RunConfig, new: RunConfig) -> bool:
    """Whether a gang of the old shape can't run it."""
    return any(name.partition(".")[0] in _LAYOUT for name, _, _ in changes(old, new))


def amended(
    config: RunConfig, overrides: Sequence[str], chosen: Sequence[str], fixed_nodes: int | None
) -> RunConfig:
    """The configuration that `overrides` make of a stopped run's, with what the planner chose before open again.

    Where the layout or the nodes change, the numbers that followed from them and that nobody typed are chosen anew. The
    batch never is, since it would change what is learned.

    Args:
        config: resolved, of the run's last attempt.
        overrides: as typed.
        chosen: fields that the planner chose when the run was submitted.
        fixed_nodes: number of nodes that the user asked for at the submission; None where it was left open.

    Raises:
        UserError: for what `configs.compose` refuses.
    """
    typed = {override.partition("=")[0] for override in overrides}
    opened: list[str] = []
    if any(name.partition(".")[0] in _LAYOUT for name in typed):  # what was typed is set after it
        opened = [f"{name}=null" for name in chosen if name.startswith("parallel.")]
        opened += ["cluster.nodes=null", "cluster.slots_per_node=null"]
        if fixed_nodes is not None and "cluster.slots_per_node" not in typed:
            opened.append(f"cluster.nodes={fixed_nodes}")
    made = amend(config, [*opened, *overrides])
    for name, before, now in changes(config, made):
        if (why := _kept(name)) is not None:
            raise UserError(
                f"{name} would be {now} and was {before}: a run keeps {why}; set single fields instead of presets"
            )
    return made


def changes(old: RunConfig, new: RunConfig) -> list[Change]:
    """Fields that two configurations set otherwise."""
    before, now = flatten(old), flatten(new)
    return [
        (name, as_typed(before.get(name)), as_typed(now.get(name)))
        for name in dict.fromkeys([*before, *now])
        if before.get(name) != now.get(name)
    ]


def consequences(old: RunConfig, new: RunConfig, step: int, samples: int | None) -> list[str]:
    """What the changes mean for what is learned, a line each.

    Args:
        step: that the run continues from.
        samples: consumed up to it, as its checkpoint says; None where it doesn't, so that they are counted.
    """
    done = consumed_samples(old.train, step) if samples is None else samples
    length, lines = new.data.sequence, list[str]()
    was, will = (_rest(config, step) for config in (old, new))
    if was != will:
        lines.append(
            f"samples: {done} are consumed up to step {step} and sample {done} comes next; {will} follow in "
            f"{max(0, new.train.steps - step)} steps, where {was} would have in {max(0, old.train.steps - step)}"
        )
        lines.append(
            f"tokens: {(done + will) * length} in all, where it would have been {(done + was) * length}"
        )
    if step < min(old.train.steps, new.train.steps):
        rates = [learning_rate(config.optim, step, config.train.steps) for config in (old, new)]
        if rates[0] != rates[1]:
            lines.append(
                f"learning rate of step {step + 1}: {rates[1]:.6g}, where it would have been {rates[0]:.6g}"
            )
    return lines


def _rest(config: RunConfig, step: int) -> int:
    """Samples of the steps that are left."""
    steps = config.train.steps
    return max(0, consumed_samples(config.train, steps) - consumed_samples(config.train, step))


def flatten(config: RunConfig) -> dict[str, Any]:
    """Every field by its dotted name."""
    fields: dict[str, Any] = {}

    def walk(tree: dict[str, Any], prefix: str) -> None:
        for name, value in tree.items():
            if isinstance(value, dict) and value:
                walk(value, f"{prefix}{name}.")
            else:
                fields[f"{prefix}{name}"] = value

    walk(config.model_dump(mode="json"), "")
    return fields


def as_typed(value: Any) -> str:
    """A value as it is typed."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else str(value)
    return "null" if value is None else str(value)
