"""`python -m faulttol`: the command line."""

import sys

from configs.errors import leave, starting

with starting():
    from faulttol.cli import main

if __name__ == "__main__":
    leave(main(sys.argv[1:]))
