"""What runs where: queue, placement, controller, command line."""

import sys
from pathlib import PurePath

PROGRAM = "megaray" if PurePath(sys.argv[0]).name == "megaray" else "python -m orchestrator"
"""What a person types; every hint begins with it."""
DASHBOARD_PORT = 8260
"""Where the dashboard is looked for, unless another port was typed or this one is in use."""
