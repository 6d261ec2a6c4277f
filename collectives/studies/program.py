"""What every rank of a measurement runs, under `python -m collectives run`, torchrun, srun, mpirun or a gang."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from collectives.analysis.judge import BandwidthFinding
from collectives.ops.groups import GroupPartition, partitions
from collectives.store import metadata
from collectives.store.results import Metadata, SweepRow
from collectives.store.resume import difference, other_measurement_error, refuse_finished
from collectives.studies.faults import FaultStudy
from collectives.studies.journal import Heartbeat, Journal
from collectives.studies.moe import MoeStudy
from collectives.studies.sweep import SweepRunner
from collectives.timing import clock
from collectives.timing.measure import MeasurementSetup
from collectives.timing.team import FabricLost, Team
from configs.errors import UserError
from configs.paths import RunPaths
from configs.rank import RankContext
from configs.schema import RunConfig


class NothingMeasuredError(RuntimeError):
    """A sweep that ran to its end without a single time."""


def main(
    config: RunConfig,
    rank: RankContext,
    beat: Heartbeat | None = None,
    arguments: tuple[str, ...] = (),
    named: bool = True,
) -> list[BandwidthFinding]:
    """Measure, as one rank of several.

    Args:
        config: what to measure.
        rank: who this is, and the run's folder.
        beat: called with the number of the case, and whether it is finished.
        arguments: as typed, for the record.
        named: whether all ranks were given the same folder; else rank 0's is everyone's.

    Returns:
        On rank 0, what was found slow or wrong.

    Raises:
        UserError: for what the user can mend.
        FabricLost: where a rank died in the middle.
        NothingMeasuredError: where no case could be measured.
    """
    _disable_graph_registration(config)
    team = Team.join(config, rank)
    layout = layout_of(config, rank.world)
    if not named:
        rank = replace(rank, run=RunPaths(Path(team.tree.broadcast_object(str(rank.run.root)))))
        os.environ.update(rank.environment())
    journal = Journal(rank, beat)
    waits = config.collectives.sync != "loop"
    ticks = clock.make_clock("host" if waits else config.collectives.timer, team.device, lambda: team.control)
    bench = MeasurementSetup(team, ticks, config.collectives, journal.alive)
    study = _study(config, bench, journal, layout)
    journal.cases = study.cases
    first = _first_partition(config, team, layout)
    about = metadata.collect(config, team, ticks, first, layout, list(arguments))
    done = _open_store(team, journal, about)
    try:
        study.run(done)
    except RuntimeError as error:
        if isinstance(error, UserError) or not _is_network_error(error):
            raise
        raise FabricLost(
            f"rank {rank.rank} lost its peers: {str(error).splitlines()[0]}; {journal.finished} of {journal.cases} "
            f"cases are kept in {journal.store.folder}, and the same command continues after them"
        ) from error
    if isinstance(study, SweepRunner):
        _refuse_empty_sweep(team, journal)
    journal.end()
    team.tree.wait()
    return journal.findings


def _disable_graph_registration(config: RunConfig) -> None:
    """Have NCCL use the same transport in a graph as outside of one, unless graphs are what is to be measured.

    It registers the buffers of a captured call, which makes large messages faster than the same call made by itself.
    """
    if config.collectives.timer == "auto":
        os.environ.setdefault("NCCL_GRAPH_REGISTER", "0")


def _refuse_empty_sweep(team: Team, journal: Journal) -> None:
    """Fail where no case of a sweep has times."""
    why = ""
    if team.rank.rank == 0:
        why = "" if journal.timed else journal.first_note or "no case has times"
    if why := team.tree.broadcast_object(why):
        raise NothingMeasuredError(f"nothing was measured: {why}")


def _study(
    config: RunConfig, bench: MeasurementSetup, journal: Journal, layout: dict[str, int]
) -> SweepRunner | FaultStudy | MoeStudy:
    match config.collectives.study:
        case "sweep":
            return SweepRunner(bench, journal, layout)
        case "moe":
            return MoeStudy(bench, journal, config, layout)
    return FaultStudy(bench, journal, config.hardware)


def _open_store(team: Team, journal: Journal, about: Metadata) -> frozenset[tuple[str | int, ...]]:
    """Open the store on rank 0, and broadcast the finished cases, or why it can't be opened."""
    kept: list[SweepRow] = []
    refusal = ""
    if team.rank.rank == 0:
        try:
            _prepare_folder(journal, about, team.rank.attempt)
            kept = journal.begin(about)
        except UserError as error:
            refusal = str(error)
        except BrokenPipeError:  # of the table's head, whose reader has ended: not the folder's
            raise
        except OSError as error:
            refusal = f"can't write {journal.store.folder} ({error.strerror}); name another folder"
    refusal, keys = team.tree.broadcast_object((refusal, [row.key for row in kept]))
    if refusal:
        raise UserError(refusal)
    journal.finished = len(keys)
    return frozenset(keys)


def _prepare_folder(journal: Journal, about: Metadata, attempt: int) -> None:
    """Refuse a folder that holds another measurement, or a finished one.

    A later attempt of a run is measured anew where it has landed on other hosts, say, and the earlier rows are kept aside.

    Raises:
        UserError: with what differs.
    """
    store = journal.store
    if not store.metadata.exists():
        return
    if attempt == 1:
        refuse_finished(store)
    differs = difference(store.read_metadata()[0], about)
    if differs and attempt == 1:
        raise other_measurement_error(store.folder, differs)
    if differs:
        store.folder.rename(store.folder.with_name(f"{store.folder.name}-before-attempt-{attempt}"))


def _first_partition(config: RunConfig, team: Team, layout: dict[str, int]) -> GroupPartition:
    if config.collectives.study != "sweep":
        return GroupPartition("world", (tuple(range(team.rank.world)),))
    return partitions(config.collectives.groups[0], team.nodes, layout)[0]


def layout_of(config: RunConfig, world: int) -> dict[str, int]:
    """Size by axis for `world` ranks, with an open dp filled in.

    Raises:
        UserError: where the axes don't make up the ranks.
    """
    parallel = config.parallel
    layout = {axis: parallel.size(axis) for axis in ("pp", "cp", "ep", "etp", "tp")} | {
        "dp": parallel.dp or 0
    }
    others = layout["pp"] * layout["cp"] * layout["tp"]
    if parallel.dp is None:
        layout["dp"] = max(1, world // others)
    if layout["dp"] * others != world:
        raise UserError(
            f"parallel.pp*dp*cp*tp={layout['dp'] * others}, but {world} ranks were started; leave parallel.dp out, or "
            f"start {layout['dp'] * others} ranks"
        )
    if world // layout["pp"] % (layout["ep"] * layout["etp"]):
        raise UserError(
            f"parallel.ep*etp={layout['ep'] * layout['etp']} does not divide the {world // layout['pp']} ranks of a stage; "
            "choose a divisor"
        )
    return layout


def _is_network_error(error: RuntimeError) -> bool:
    """Whether an error is the network's: a peer that went away, or a timeout."""
    lost = (dist.DistNetworkError, dist.DistBackendError)
    # gloo raises plain RuntimeErrors, of what it can't do too, so that its name alone says nothing.
    words = ("connection", "timed out", "timeout", "by peer", "socket", "broken pipe")
    return isinstance(error, lost) or any(word in str(error).lower() for word in words)
