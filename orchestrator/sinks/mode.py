"""Whether, and how, W&B is logged to."""

from __future__ import annotations

import os
from netrc import NetrcParseError, netrc

from configs.schema import RunConfig


def mode_of(config: RunConfig) -> str:
    """W&B's mode: `$WANDB_MODE`, else the configuration's, where `auto` is online if a key is found."""
    mode = os.environ.get("WANDB_MODE") or config.tracking.wandb
    if mode != "auto":
        return mode
    if os.environ.get("WANDB_API_KEY"):
        return "online"
    try:
        known = netrc().authenticators("api.wandb.ai")
    except (OSError, NetrcParseError):
        known = None
    return "online" if known else "offline"
