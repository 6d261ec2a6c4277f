"""The trainer's state as named boxes: what engines, optimizers and checkpoints speak of, and nothing else.

A name is that of the parameter in the whole model (`blocks.3.feed.experts.gate_up`, `3` being the layer of the whole
model and the first dim the expert of the layer), with `/moment` behind it for what an optimizer keeps beside it. No buffer,
group or rank is in a name.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from faulttol.checkpoint.boxes import Box as Box


@dataclass(frozen=True)
class Slice:
    """One rank's part of a named tensor."""

    name: str
    tensor: Tensor
    """The live part; `box.shape` is its shape. A reader copies it, a loader copies into it."""
    box: Box
    replica: int = 0
    """Which of `replicas` equal copies this is, on as many ranks."""
    replicas: int = 1
    exact: int = 0
    """How many replicas in a row, from a multiple of it, have equal bits; others may part from them by rounding. 0: all."""
