"""What every rank of a measurement runs, under `python -m collectives run`, torchrun, srun, mpirun or a gang."""

from __future__ import annotations

import torch.distributed as dist

from collectives.analysis.judge import Finding
from collectives.ops.groups import Partition, partitions
from collectives.store import metadata
from collectives.store.results import Metadata, Row
from collectives.studies.faults import Faults
from collectives.studies.journal import Beat, Journal
from collectives.studies.moe import Moe
from collectives.studies.sweep import Sweep
from collectives.timing import clock
from collectives.timing.measure import Bench
from collectives.timing.team import FabricLost, Team
from configs.errors import UserError
from configs.rank import RankContext
from configs.schema import RunConfig


def main(
    config: RunConfig, rank: RankContext, beat: Beat | None = None, arguments: tuple[str, ...] = ()
) -> list[Finding]:
    """Measure, as one rank of several.

    Returns:
        On rank 0, what was found slow or wrong.

    Raises:
        UserError: for what the user can mend.
        FabricLost: where a rank died in the middle.
    """
    team = Team.meet(config, rank)
    layout = layout_of(config, rank.world)
    journal = Journal(rank, beat)
    ticks = clock.choose(config.collectives.timer, team.device, team.control)
    bench = Bench(team, ticks, config.collectives, journal.alive)
    study = _study(config, bench, journal, layout)
    journal.cases = study.cases
    first = _first_partition(config, team, layout)
    about = metadata.collect(config, team, ticks, first, layout, list(arguments))
    done = _begin(team, journal, about)
    try:
        study.run(done)
    except RuntimeError as error:
        if isinstance(error, UserError) or not _is_lost(error):
            raise
        raise FabricLost(
            f"rank {rank.rank} lost its peers: {str(error).splitlines()[0]}; {journal.finished} of {journal.cases} "
            f"cases are kept in {journal.store.folder}, and the same command goes on after them"
        ) from error
    journal.end()
    team.wait()
    return journal.findings


def _study(config: RunConfig, bench: Bench, journal: Journal, layout: dict[str, int]) -> Sweep | Faults | Moe:
    match config.collectives.study:
        case "sweep":
            return Sweep(bench, journal, layout)
        case "moe":
            return Moe(bench, journal, config, layout)
    several = len(set(bench.team.nodes)) > 1
    return Faults(
        bench, journal, config.hardware.inter_node_gbps if several else config.hardware.intra_node_gbps
    )


def _begin(team: Team, journal: Journal, about: Metadata) -> frozenset[tuple[str | int, ...]]:
    """Open the store on rank 0, and tell all ranks what is done, or why not."""
    kept: list[Row] = []
    refusal = ""
    if team.rank.rank == 0:
        try:
            kept = journal.begin(about)
        except UserError as error:
            refusal = str(error)
        except OSError as error:
            refusal = f"can't write {journal.store.folder} ({error.strerror}); name another folder"
    refusal, keys = team.tell((refusal, [row.key for row in kept]))
    if refusal:
        raise UserError(refusal)
    journal.finished = len(keys)
    return frozenset(keys)


def _first_partition(config: RunConfig, team: Team, layout: dict[str, int]) -> Partition:
    if config.collectives.study != "sweep":
        return Partition("world", (tuple(range(team.rank.world)),))
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


def _is_lost(error: RuntimeError) -> bool:
    """Whether an error is the network's: a peer that went away, or a timeout."""
    lost = (dist.DistNetworkError, dist.DistBackendError)
    words = ("connection", "timed out", "timeout", "peer", "socket", "broken pipe", "nccl", "gloo")
    return isinstance(error, lost) or any(word in str(error).lower() for word in words)
