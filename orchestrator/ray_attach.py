"""`python -m orchestrator.ray_attach HOME HOST:PORT`: start the controller of a cluster unless it is there, and leave."""

from __future__ import annotations

import sys
from pathlib import Path

from configs.errors import USER_ERROR_EXIT, UserError
from configs.paths import HomePaths
from orchestrator import ray_cluster
from orchestrator.ray_controller import ControllerClient


def main(arguments: list[str]) -> int:
    """0 once the controller has answered; what the supervisor of a cluster has done, since it loads no Ray itself."""
    home, address = arguments
    try:
        ray_cluster.connect(address)
        ControllerClient.connect(HomePaths(Path(home)))
    except UserError as error:
        sys.stderr.write(f"megaray: {error}\n")
        return USER_ERROR_EXIT
    finally:
        ray_cluster.disconnect()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
