"""`python -m trainer`: one rank, under a gang, under torchrun, or alone; or a model sized for its hardware."""

from __future__ import annotations

import sys

from configs.errors import leave, starting

with starting():
    from trainer.cli import main

if __name__ == "__main__":
    leave(main(sys.argv[1:]))
