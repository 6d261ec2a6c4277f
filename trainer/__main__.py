"""`python -m trainer run`: one rank, under a gang, under torchrun, or alone."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

from configs.compose import compose, load
from configs.errors import USER_ERROR_EXIT, UserError
from configs.paths import default_home
from configs.rank import RankContext, die_with_parent


def main(arguments: list[str]) -> int:
    """Run one rank; exit code 0 done, 2 a user's mistake, 1 anything else."""
    parser = argparse.ArgumentParser(prog="python -m trainer", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="train; each rank is one process, as torchrun starts them")
    run.add_argument(
        "overrides", nargs="*", metavar="field=value", help="configuration, as `submit` takes it"
    )
    run.add_argument("--config", type=Path, help="a resolved configuration, as saved with a run")
    options = parser.parse_args(arguments)
    try:
        return _run(options.config, options.overrides)
    except UserError as error:
        print(f"megaray: {error}", file=sys.stderr)
        return USER_ERROR_EXIT
    except Exception:
        traceback.print_exc()
        return 1


def _run(file: Path | None, overrides: list[str]) -> int:
    die_with_parent(os.environ)
    rank = RankContext.from_environment(os.environ, default_home() / "runs" / "torchrun")
    config = load(file) if file is not None and not overrides else compose(overrides, file)
    if None in (config.parallel.dp, config.train.global_batch, config.train.precision):
        from trainer.sizing.planner import Capacity, plan  # a resolved configuration needs no plan

        config = plan(config, Capacity.of_nodes([rank.world])).config
    from trainer.loop import main as train  # torch loads after the parent's death is arranged for

    train(config, rank)
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's teardown: communication libraries have threads that can hang in it.
    os._exit(code)
