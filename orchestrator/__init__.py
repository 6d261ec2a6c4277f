"""What runs where: queue, placement, controller, command line."""

import sys
from pathlib import PurePath

PROGRAM = "megaray" if PurePath(sys.argv[0]).name == "megaray" else "python -m orchestrator"
"""What a person types; every hint begins with it."""
