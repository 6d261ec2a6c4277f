"""`python -m collectives`: measure a fabric, fit it, compare it, report it."""

from __future__ import annotations

import sys

from configs.errors import leave, starting

with starting():
    from collectives.cli import main

if __name__ == "__main__":
    leave(main(sys.argv[1:]))
