"""`python orchestrator/ray_head.py start --head …`: Ray's own command, without the server of Ray's client.

Nothing here uses that server, `ray start` has no option to leave it out, and where it fails, as on a busy machine that
lets it wait for 30 s, all of Ray is ended with it.
"""

from __future__ import annotations

import sys

from ray.scripts import scripts

if __name__ == "__main__":
    if hasattr(scripts, "get_ray_client_dependency_error"):
        # What Ray asks whether the client can be had at all.
        scripts.get_ray_client_dependency_error = lambda: ImportError("left out")
    sys.exit(scripts.main())
