"""The child that acts for the page: reads one order as JSON, has the controller do it, and prints the answer as JSON.

A process of its own, so that Ray, which may hang, is neither loaded nor waited for by the server.
"""

from __future__ import annotations

import argparse
import inspect
import json
import sys
from typing import Any

from configs.errors import UserError, from_json
from configs.paths import HomePaths, default_home
from orchestrator.commands import cluster_target
from orchestrator.commands.calls import CommandCall


def act(controller: Any, order: dict[str, str]) -> str:
    """Have a controller do it; the sentence to show.

    Raises:
        UserError: where it isn't done.
    """
    action, target, by = order["action"], order["target"], order["by"]
    if action == "cancel":
        # Who asked goes into the event where this controller takes it.
        takes = "by" in inspect.signature(controller.cancel).parameters
        return str(controller.cancel(target, False, by) if takes else controller.cancel(target, False))
    if action == "dump_stacks":
        if not hasattr(controller, "dump_stacks"):
            raise UserError(
                "this controller is of an earlier version, which writes stacks only before it stops hung ranks"
            )
        return f"the stacks are being written to {controller.dump_stacks(target, by)}"
    controller.mark_node(target, action, order["reason"], by)
    return f"{target} is {'kept free' if action == 'cordon' else 'used again'}"


def main() -> int:
    """One order."""
    order: dict[str, str] = from_json(sys.stdin.readline())
    options = argparse.Namespace(address=None, json=True)
    call = CommandCall(options, HomePaths(default_home()), ())
    try:
        with cluster_target.client(call) as controller:
            ok, said = True, act(controller, order)
    except UserError as error:
        ok, said = False, str(error)
    sys.stdout.write(f"\n{json.dumps({'ok': ok, 'said': said})}\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
