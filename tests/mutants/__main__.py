"""`python -m tests.mutants [--only TEXT] [--jobs N]`: plant every defect of the lists; exit code 1 where one lives."""

from __future__ import annotations

import argparse
import os
import sys

from tests.mutants.harness import run


def main() -> int:
    """Print a line for each mutant, then what is wrong, then the count."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutants", description=__doc__)
    parser.add_argument("--only", default="", help="mutants with this text in their name, file or test")
    parser.add_argument("--jobs", type=int, default=min(2, os.cpu_count() or 1), help="mutants at a time")
    options = parser.parse_args()
    killed, count, wrong = run(options.only, max(1, options.jobs), lambda line: print(line, flush=True))
    for line in wrong:
        print(line, file=sys.stderr)
    sys.stderr.flush()
    print(f"killed {killed} of {count} mutants")
    return 0 if killed == count and not wrong else 1


if __name__ == "__main__":
    sys.exit(main())
