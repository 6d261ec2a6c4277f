"""A training step in fp64, written to be read: what the trainer is tested against.

One sample, one token, one head and one expert after the other, every operation spelled out. It shares nothing with
`trainer`; from `configs` it reads the values of plain configuration objects. torch gives tensors, derivatives and the
product of a matrix with a vector, but no layer, loss or optimizer.

Names of tensors are those of the whole model (`blocks.3.feed.experts.gate_up`), so the reference speaks of the same
state as the trainer in any layout. Shapes in names: S places of a sample, D model width, N query heads, G key/value
heads, H head width, E experts, F inner width.
"""

from tests.trainer.reference.loss import ReferenceStep, document_ids, gradients
from tests.trainer.reference.names import parameter_shapes, random_state
from tests.trainer.reference.run import Reference, ReferenceLine
from tests.trainer.reference.schedule import learning_rate, samples_of_step

__all__ = [
    "ReferenceLine",
    "Reference",
    "ReferenceStep",
    "document_ids",
    "gradients",
    "learning_rate",
    "parameter_shapes",
    "random_state",
    "samples_of_step",
]
