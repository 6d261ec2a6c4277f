"""`python -m collectives`: measure a fabric, fit it, compare it, report it."""

from __future__ import annotations

import os
import sys

from configs.errors import starting

with starting():
    from collectives.cli import main

if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's teardown: communication libraries have threads that can hang in it.
    os._exit(code)
