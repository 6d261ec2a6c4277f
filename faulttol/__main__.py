"""`python -m faulttol run`: one rank of a measurement, under a gang or torchrun."""

from __future__ import annotations

import argparse
import os
import sys
import traceback
from pathlib import Path

from configs.compose import load
from configs.errors import USER_ERROR_EXIT, UserError
from configs.paths import default_home
from configs.rank import RankContext, die_with_parent


def main(arguments: list[str]) -> int:
    """Run one rank; exit code 0 done, 2 a user's mistake, 1 anything else."""
    parser = argparse.ArgumentParser(prog="python -m faulttol", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    run = commands.add_parser("run", help="measure; each rank is one process, as torchrun starts them")
    run.add_argument(
        "--config", type=Path, required=True, help="a resolved configuration, as saved with a run"
    )
    options = parser.parse_args(arguments)
    die_with_parent(os.environ)
    try:
        rank = RankContext.from_environment(os.environ, default_home() / "runs" / "torchrun")
        config = load(options.config)
        from faulttol.measure import main as measure  # torch loads after the parent's death is arranged for

        measure(config, rank)
    except UserError as error:
        print(f"megaray: {error}", file=sys.stderr)
        return USER_ERROR_EXIT
    except Exception:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's teardown: communication libraries have threads that can hang in it.
    os._exit(code)
