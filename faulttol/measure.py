"""A measurement of the fabric as a gang runs it: with a ring of records, so that its ranks are watched like any others."""

from __future__ import annotations

from collectives.studies.program import main as measure
from configs.rank import RankContext
from configs.schema import RunConfig
from faulttol.recorder import RankPhase, Recorder


def main(config: RunConfig, rank: RankContext) -> None:
    """Measure, as one rank of a gang.

    What is found slow is in the metric lines; the rank ends well all the same.

    Raises:
        UserError: for what the user can mend.
        FabricLost: where a rank stays away or dies in the middle.
    """
    recorder = Recorder(rank.files.ring, rank.rank)

    def beat(case: int, finished: bool) -> None:
        if finished:
            recorder.step(case)
        else:
            recorder.begin(RankPhase.COLLECTIVE, case + 1)

    measure(config, rank, beat)
    recorder.close()
