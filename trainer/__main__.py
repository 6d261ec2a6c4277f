"""`python -m trainer`: one rank, under a gang, under torchrun, or alone; or a model sized for its hardware."""

from __future__ import annotations

import os
import sys

from configs.errors import starting

with starting():
    from trainer.cli import main

if __name__ == "__main__":
    code = main(sys.argv[1:])
    sys.stdout.flush()
    sys.stderr.flush()
    # Without the interpreter's teardown: communication libraries have threads that can hang in it.
    os._exit(code)
