"""`python -m orchestrator`: the command line."""

import gc
import sys

# A command lives for half a second or waits for others; collecting garbage would be a tenth of its work.
gc.set_threshold(100_000)

from orchestrator.cli import main  # noqa: E402  # after the line above, since imports make the most objects

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
