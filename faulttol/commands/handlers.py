"""The commands, from what was typed to an answer; the command line prints it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from typing import Any

from configs.errors import UserError
from faulttol.checkpoint import retention as retaining
from faulttol.checkpoint.folder import CheckpointCommit, CheckpointFolder
from faulttol.checkpoint.hashes import MAX_READ, THREADS, CheckpointSource, tensor_hashes
from faulttol.checkpoint.manifest import Incomplete
from faulttol.checkpoint.retention import Retention
from faulttol.checkpoint.store import CheckpointStore
from faulttol.commands import locations, terminal
from faulttol.convert.job import ConversionJob, Estimate


@dataclass(frozen=True)
class CommandResult:
    """What a command found or did."""

    data: Any
    """As plain data, for `--json`."""
    lines: Sequence[str] = field(default_factory=list)
    """For a person."""
    code: int = 0
    """Exit code."""


def _named(options: argparse.Namespace) -> locations.CheckpointLocation:
    return locations.find(options.path, options.step, options.attempt)


def _source(place: locations.CheckpointLocation) -> CheckpointSource:
    store = place.store
    return CheckpointSource(store, place.commit(CheckpointFolder(store)))


def _read(source: CheckpointSource) -> AbstractContextManager[None]:
    """Keeps a checkpoint while it is read: the run may continue saving and removing."""
    return retaining.read_lease(source.store, source.commit)


def _bar(what: str) -> terminal.ByteProgress:
    return terminal.ByteProgress(sys.stderr, what)


def _told(estimate: Estimate) -> CommandResult:
    return CommandResult(asdict(estimate), terminal.estimate(estimate))


def inspect(options: argparse.Namespace) -> CommandResult:
    """`inspect PATH`."""
    from faulttol.commands import inspect as inspecting

    inspected = inspecting.inspect(_named(options))
    return CommandResult(inspected.to_json(), inspected.lines(options.tensors))


def verify(options: argparse.Namespace) -> CommandResult:
    """`verify PATH`."""
    from faulttol.commands import verify as verifying

    place = _named(options)
    store = place.store
    folder = CheckpointFolder(store)
    there = place.commits(folder)
    folder.refuse_others()
    commits = there if options.all else there[-1:]
    if options.dry_run:
        heads = [folder.head(commit) for commit in commits]
        return _told(Estimate(sum(h.size for h in heads), 0, 0, THREADS * MAX_READ))
    verified = []
    for commit in commits:
        with _bar(f"verify step {commit.step}") as bar, retaining.read_lease(store, commit):
            verified.append(verifying.verify(store, commit, bar))
    lines = [line for one in verified for line in one.lines()]
    if len(there) > len(commits):
        lines.append(f"1 of {len(there)} checkpoints was looked at; --all takes them all")
    whole = all(one.whole for one in verified)
    data = [one.to_json() for one in verified]
    return CommandResult(data if options.all else data[0], lines, 0 if whole else 1)


def diff(options: argparse.Namespace) -> CommandResult:
    """`diff FIRST SECOND`."""
    from faulttol.commands import diff as comparing

    first, second = _source(locations.find(options.path)), _source(locations.find(options.other))
    with _bar("compare") as bar, _read(first), _read(second):
        difference = comparing.diff(first, second, bar)
    return CommandResult(difference.to_json(), difference.lines(), 0 if difference.same else 1)


def reshard(options: argparse.Namespace) -> CommandResult:
    """`reshard PATH --out FOLDER`."""
    from faulttol.commands import reshard as cutting

    text = f"dp={options.files}" if options.files else options.layout
    layout = cutting.parse_layout(text)
    out = locations.output(options.out)
    source = _source(_named(options))
    cutting.refuse_out(source, out)
    if options.dry_run:
        return _told(cutting.estimate(source, layout))
    with _read(source):
        with _bar("reshard") as bar:
            done = cutting.reshard(source, out, layout, bar)
        data, lines = done.to_json(), done.lines()
        if not options.check:
            return CommandResult(data, lines)
        with _bar("hash before") as bar:
            before = tensor_hashes(source.store, source.commit, bar)
    with _bar("hash after") as bar:
        after = tensor_hashes(out, source.commit, bar)
    other = sorted(name for name in before if before[name] != after.get(name))
    if other:
        raise Incomplete(f"{done.path}: {len(other)} tensors have another hash than before: {other[0]}")
    data["equal"] = len(before)
    lines.append(f"the hashes of all {len(before)} tensors are equal")
    return CommandResult(data, lines)


def prune(options: argparse.Namespace) -> CommandResult:
    """`prune PATH`."""
    from faulttol.commands import prune as pruning

    place = locations.find(options.path, options.step)
    store = place.store
    folder = CheckpointFolder(store)
    folder.refuse_others()
    if options.pin or options.unpin:
        return _pin(options, place)
    if place.step is not None:
        raise UserError(
            f"step {place.step} is named, and neither --pin nor --unpin: type --steps {place.step} to remove it"
        )
    retention = pruning.retention_of(place)
    if options.keep or options.keep_every:
        last = options.keep or (retention.last if retention else 1)
        retention = Retention(last, options.keep_every)
    steps = pruning.parse_steps(options.steps)
    broken = _broken(store, folder) if options.verify else []
    going = pruning.candidates(folder, retention, steps, broken)
    left_over = pruning.interrupted(folder) if options.interrupted else []
    pruned = pruning.prune(store, going, left_over, dry=True)
    if not options.dry_run and (going or left_over):
        if not _agreed(options, pruned.lines(), pruning.question(pruned)):
            return CommandResult({"removed": False}, ["nothing was removed"], 1)
        pruned = pruning.prune(store, going, left_over, dry=False)
    lines = pruned.lines()
    lines += [f"  step {c.step}, attempt {c.attempt} is damaged: `verify` tells where" for c in broken]
    data = pruned.to_json() | {"damaged": [{"step": c.step, "attempt": c.attempt} for c in broken]}
    return CommandResult(data, lines)


def _pin(options: argparse.Namespace, place: locations.CheckpointLocation) -> CommandResult:
    """Pin or unpin a step, the newest where none is named."""
    store = place.store
    step = place.step if place.step is not None else place.commit().step
    lines = []
    if options.pin:
        retaining.pin(store, step, options.pin)
        lines.append(f"step {step} in {place.root} is kept as {options.pin}")
    if options.unpin:
        retaining.unpin(store, step, options.unpin)
        lines.append(f"step {step} in {place.root} is no longer kept as {options.unpin}")
    names = {commit.step: names for commit, names in retaining.pins(store).items()}
    return CommandResult({"step": step, "pins": names.get(step, [])}, lines)


def _broken(store: CheckpointStore, folder: CheckpointFolder) -> list[CheckpointCommit]:
    """Commits that are damaged inside."""
    from faulttol.commands import verify as verifying

    damaged = []
    for commit in folder.commits:
        with _bar(f"verify step {commit.step}") as bar:
            if not verifying.verify(store, commit, bar).whole:
                damaged.append(commit)
    return damaged


def _agreed(options: argparse.Namespace, lines: Sequence[str], question: str) -> bool:
    """Whether a person at a terminal agrees; nobody is asked elsewhere."""
    if options.yes or options.json or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return True
    sys.stdout.write("\n".join(lines) + "\n")
    try:
        return input(question).strip().lower() in ("y", "yes")
    except EOFError:
        return False


def export(options: argparse.Namespace) -> CommandResult:
    """`export PATH --out FOLDER`."""
    from faulttol.commands import convert

    return _convert(options, convert.export)


def grow(options: argparse.Namespace) -> CommandResult:
    """`grow PATH --layers N --out FOLDER`."""
    from faulttol.commands import convert

    return _convert(options, convert.grow)


def _convert(
    options: argparse.Namespace,
    ready: Callable[[argparse.Namespace, CheckpointStore, CheckpointCommit], ConversionJob],
) -> CommandResult:
    place = _named(options)
    store = place.store
    commit = place.commit(CheckpointFolder(store))
    with retaining.read_lease(store, commit):
        return _run(options, ready(options, store, commit))


def import_(options: argparse.Namespace) -> CommandResult:
    """`import PATH --from FORMAT --out FOLDER`."""
    from faulttol.commands import convert

    return _run(options, convert.import_(options))


def _run(options: argparse.Namespace, job: ConversionJob) -> CommandResult:
    """Run a conversion, or tell what it would take."""
    from faulttol.commands import convert

    if options.dry_run:
        return CommandResult(*convert.estimate_result(job.estimate, job.notes))
    with _bar(options.command) as bar:
        return CommandResult(*convert.run(job, bar))


ACTS: dict[str, Callable[[argparse.Namespace], CommandResult]] = {
    "inspect": inspect,
    "verify": verify,
    "diff": diff,
    "reshard": reshard,
    "prune": prune,
    "export": export,
    "import": import_,
    "grow": grow,
}
"""By command."""
