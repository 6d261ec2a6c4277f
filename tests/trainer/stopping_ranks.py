"""Gangs that are asked to stop, each in a layout and with an engine, and then resumed; prints what became of them as JSON:
`python -m tests.trainer.stopping_ranks FOLDER`. Run by `test_stopping`."""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path
from typing import Any

from configs.compose import compose, dump
from configs.metrics import ResumedLine, SavedLine, StepLine, StoppedLine, read_all
from faulttol import exits
from faulttol.recorder import read
from tests.faulttol.watched import RankFault, WatchedGang
from trainer.sizing.search.planner import Capacity, plan

CASES = {
    "dp": (2, ("parallel.dp=2", "train.engine=native")),
    "pp-tp": (4, ("parallel.dp=1", "parallel.pp=2", "parallel.tp=2", "train.engine=native")),
    "deepspeed": (2, ("parallel.dp=2", "train.engine=deepspeed")),
}
STEP = 3
"""Index of the step in which one rank is asked."""
WORDS = (
    "experiment=smoke", "model.layers=2", "model.hidden=16", "model.heads=2", "model.kv_heads=2", "model.head_dim=8",
    "model.experts=4", "model.expert_width=8", "data.sequence=16", "train.micro_batch=1", "train.global_batch=4",
    "train.precision=fp32", "train.log_every=1", "checkpoint.every=1000", "optim.warmup_steps=1",
)  # fmt: skip


def _gang(
    run: Path, world: int, words: tuple[str, ...], rings: Path, steps: int, attempt: int
) -> dict[str, Any]:
    text = run.parent / "text.txt"
    text.write_text("".join(chr(97 + n * 7 % 26) for n in range(20000)))
    files = f"data.path={text}", f"data.cache={run.parent / 'data'}", f"train.steps={steps}"
    config = plan(compose([*WORDS, *words, *files]), Capacity.of_nodes([world])).config
    (run / "config.yaml").write_text(dump(config))
    fault = RankFault(world - 1, "term", "step", STEP) if attempt == 1 else None
    gang = WatchedGang(run, config, world, rings / str(attempt), fault, attempt)
    try:
        found = gang.judged(120.0, enough=WatchedGang.all_ended)
        gang.settle(60.0)
        lines = list(read_all(gang.paths.metrics))
        told = [exits.read(rings / str(attempt) / f"{rank:05d}.raised") for rank in range(world)]
        return {
            "codes": [gang.codes().get(rank) for rank in range(world)],
            "verdicts": [v.to_json() for v in found],
            "steps": [line.step for line in lines if isinstance(line, StepLine)],
            "stopped": [(line.step, line.saved) for line in lines if isinstance(line, StoppedLine)],
            "saved": [line.step for line in lines if isinstance(line, SavedLine)],
            "resumed": [
                (line.step, line.facts["start_seconds"]) for line in lines if isinstance(line, ResumedLine)
            ],
            "blames": [one.blames_peer if one is not None else None for one in told],
            "records": [
                [(r.mark.name, r.phase.name, r.step) for r in read(rings / str(attempt) / f"{rank:05d}.ring")]
                for rank in range(world)
            ],
        }
    finally:
        gang.kill()


def main() -> None:
    """Run all cases."""
    # Before the first fork, so that ranks begin warm: the compiler would be loaded at the first FSDP module.
    import torch._dynamo  # noqa: F401

    import tests.preloaded  # noqa: F401
    import trainer.engines.native
    import trainer.loop  # noqa: F401

    folder, answers = Path(sys.argv[1]), {}
    with tempfile.TemporaryDirectory(dir="/dev/shm") as memory:
        for name, (world, words) in CASES.items():
            run = folder / name / "run"
            run.mkdir(parents=True)
            rings = Path(memory) / name
            first = _gang(run, world, words, rings, 100000, 1)
            answers[name] = [first, _gang(run, world, words, rings, STEP + 3, 2)]
    print(json.dumps(answers))


if __name__ == "__main__":
    main()
