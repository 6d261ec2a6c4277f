"""`export`, `import` and `grow`: from what was typed to a conversion that is ready to run."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from faulttol.checkpoint.folder import CheckpointCommit
from faulttol.checkpoint.store import CheckpointStore
from faulttol.commands import locations, terminal
from faulttol.convert.job import ConversionJob, Estimate

if TYPE_CHECKING:
    from configs.model import ModelConfig
    from faulttol.convert.facts import Kind, Moments


def export(options: argparse.Namespace, store: CheckpointStore, commit: CheckpointCommit) -> ConversionJob:
    """Of `export PATH`."""
    out = locations.output(options.out)
    if options.to == "dcp":
        from faulttol.convert.dcp import export_dcp

        return export_dcp(store, Path(options.out), commit)
    from faulttol.convert.hf import export_hf

    return export_hf(store, out, commit, options.dtype, options.shard_size)


def import_(options: argparse.Namespace) -> ConversionJob:
    """Of `import PATH`.

    Raises:
        UserError: where a map of names goes with a format whose names are known, and as the format's import does.
    """
    model, kind, moments = _training_config(options.overrides)
    out = locations.output(options.out)
    if options.form == "hf":
        from faulttol.convert.hf import import_hf

        if options.names:
            raise UserError(
                f"--names={options.names} is for dcp and deepspeed; the names of hf are known: leave it out"
            )
        return import_hf(CheckpointStore(options.path, "PATH"), out, options.run, kind, moments, model)
    from faulttol.convert import names

    rules = names.load(options.names) if options.names else names.KEEP
    fill = (model, kind, moments) if model is not None else None
    path = Path(options.path)
    if options.form == "dcp":
        from faulttol.convert.dcp import import_dcp

        return import_dcp(path, out, options.run, options.trust, rules, options.step, fill)
    from faulttol.convert.zero import import_zero

    if options.step is not None:
        raise UserError(f"--step={options.step} is for dcp; DeepSpeed's files tell their step: leave it out")
    return import_zero(path, out, options.run, rules, options.tag, options.trust, fill)


def grow(options: argparse.Namespace, store: CheckpointStore, commit: CheckpointCommit) -> ConversionJob:
    """Of `grow PATH`."""
    from faulttol.convert.grow import grow as growing

    run = options.run or f"{commit.run}-{options.layers}-layers"
    return growing(
        store, locations.output(options.out), run, options.layers, commit, options.method, options.optimizer
    )


def _training_config(overrides: Sequence[str]) -> tuple[ModelConfig | None, Kind, Moments]:
    """The model, where one is named, and the optimizer that training continues with."""
    if not overrides:
        return None, "adamw", "fp32"
    from configs.compose import compose

    config = compose(list(overrides))
    named = any(word.startswith(("model=", "model.", "experiment=")) for word in overrides)
    return config.model if named else None, config.optim.kind, config.optim.moments


def estimate_result(cost: Estimate, notes: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """An estimate with its notes, as data and for a person."""
    return {**asdict(cost), "notes": list(notes)}, [*terminal.estimate(cost), *(f"note: {n}" for n in notes)]


def run(job: ConversionJob, bar: Callable[[int, int], None]) -> tuple[dict[str, Any], list[str]]:
    """Run a conversion: what it has done, as data and for a person."""
    done = job.run(bar)
    what = f"{terminal.plural(done.tensors, 'tensor')}, {terminal.size(done.bytes_written)} written"
    lines = [f"{done.path}: {what}, {terminal.size(done.bytes_read)} read"]
    return asdict(done), [*lines, *(f"note: {note}" for note in done.notes)]
