"""What each rank of a DeepSpeed run would load at its first step: with torch's compiler two seconds of a processor.

Loaded once, where ranks of tests are forked from, and only by a torch without GPUs: DeepSpeed looks for one when it is
loaded, and forked processes couldn't use it any more.
"""

from __future__ import annotations

import torch

if torch.version.cuda is None and torch.version.hip is None:
    import deepspeed.runtime.zero.muon.muon_optimizer  # noqa: F401
