"""`python -m tests.bench`: run every `bench_*` module of the packages, one after the other.

Each prints ratios against a baseline that it measures in the same run; none is a test, since none may fail
because a machine is busy.
"""

from __future__ import annotations

import subprocess
import sys

from tests.source_tree import ROOT, modules


def main() -> int:
    """Run them all; the number of those that failed."""
    names = [module.name for module in modules() if module.path.name.startswith("bench_")]
    failed = [name for name in names if subprocess.run([sys.executable, "-m", name], cwd=ROOT).returncode]
    if failed:
        sys.stderr.write(f"failed: {', '.join(failed)}\n")
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
