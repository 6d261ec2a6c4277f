"""Weights whose gradients are computed later in the backward pass than the gradients of their inputs.

The engine of autograd runs the nodes that were made last first. A weight's own node, made early, so runs after all that the
inputs' gradients lead to, such as the start of a collective, which the weight's matmul then overlaps. Zero-bubble schedules
split the backward pass likewise (Qi et al. 2023).

Shape letters: R rows, L experts, F and D output and input width of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

GradientBuffer = Callable[[int], Tensor]
"""Allocates a buffer for the gradient of one expert of a weight."""
GradientInputs = tuple[Tensor, Tensor, Tensor | None]
"""Gradients of the output rows, the input rows, and where each expert's rows end where there are several."""
SendGradients = Callable[[Sequence[Tensor], Sequence[GradientBuffer]], None]
"""Starts to send gradients of borrowed weights, and to receive those of lent ones into buffers."""


class _DeferredGradient:
    """A weight's gradient that is still to be computed: its inputs, and how.

    The weight's node in the graph holds this and not the `DeferredWeight`, whose `weight` holds that node: reference counts
    never free such a cycle, and nothing else frees memory while a run trains.
    """

    def __init__(self, product: Callable[..., Tensor]) -> None:
        self._product = product
        self._inputs: GradientInputs | None = None
        self._received: list[tuple[int, Tensor]] = []
        self._wait: Callable[[], None] | None = None

    def save(self, inputs: GradientInputs) -> None:
        """Keep what `compute` needs."""
        self._inputs = inputs

    def receive_buffer(self, number: int) -> Tensor:
        """A buffer for the gradient of part `number` along dim 0, which another rank computes."""
        assert self._inputs is not None, "the rows' backward pass comes before"
        grad_RF, x_RD, _ = self._inputs
        self._received.append((number, grad_RF.new_empty(grad_RF.shape[1], x_RD.shape[1])))
        return self._received[-1][1]

    def wait_with(self, wait: Callable[[], None]) -> None:
        """Call `wait` before the buffers are read."""
        self._wait = wait

    def compute(self) -> Tensor:
        """The weight's gradient; once."""
        assert self._inputs is not None, "the rows' backward pass comes before"
        inputs, self._inputs = self._inputs, None
        gradient = self._product(*inputs)
        if self._wait is not None:
            self._wait()
        for number, part in self._received:
            gradient[number] = part
        self._received, self._wait = [], None
        return gradient


class DeferredWeight:
    """A weight [F, D] whose gradient is computed when the backward pass comes to the place where this object was made."""

    def __init__(self, weight: Tensor) -> None:
        self.gradient = _DeferredGradient(self.product)
        self.weight: Tensor = _Weight.apply(weight, self.gradient)

    def save(self, grad_RF: Tensor, x_RD: Tensor) -> None:
        """Keep the inputs of the weight's gradient."""
        self.gradient.save((grad_RF, x_RD, None))

    def placeholder(self) -> Tensor:
        """A gradient that nothing reads, in the shape that autograd wants."""
        return _placeholder(self.weight)

    @staticmethod
    def product(grad_RF: Tensor, x_RD: Tensor, _ends_L: Tensor | None) -> Tensor:
        """The weight's gradient."""
        return torch.mm(grad_RF.t(), x_RD)


class DeferredExpertWeight(DeferredWeight):
    """The same for a weight [L, F, D] of grouped matmuls."""

    def matmul(self, x_RD: Tensor, ends_L: Tensor) -> Tensor:
        """Each row times the transposed weight of its expert, [R, F]; once."""
        return _GroupedMatmul.apply(x_RD, self.weight, ends_L, self.gradient)

    @staticmethod
    def product(grad_RF: Tensor, x_RD: Tensor, ends_L: Tensor | None) -> Tensor:
        """The weight's gradient, [L, F, D]."""
        assert ends_L is not None, "rows of experts come with their ends"
        if fits_grouped_mm(x_RD, grad_RF):
            return F.grouped_mm(grad_RF.t(), x_RD, offs=ends_L)
        *grads, _ = split_rows(grad_RF, ends_L)
        parts = zip(grads, split_rows(x_RD, ends_L), strict=False)
        return torch.stack([torch.mm(grad.t(), rows) for grad, rows in parts])


class LentGradients:
    """The point of the backward pass where gradients of lent weights are returned. It is made right behind the weights, so
    that a rank computes gradients of borrowed weights before its own, and its own while those travel.

    Args:
        own: weights of which some experts may be lent.
    """

    def __init__(self, own: Sequence[DeferredExpertWeight]) -> None:
        self._return = _GradientReturn([weight.gradient for weight in own])
        self._token: Tensor = _ReturnGradients.apply(self._return, *(weight.weight for weight in own))

    def attach(self, rows: Tensor) -> Tensor:
        """The same rows; their backward pass leads to this point."""
        return _Attach.apply(rows, self._token)

    def expect(
        self, borrowed: Sequence[DeferredExpertWeight], send: SendGradients, wait: Callable[[], None]
    ) -> None:
        """Say that weights were lent or borrowed.

        Args:
            borrowed: weights whose gradients this rank returns.
            send: starts to send them, and to receive those of own weights.
            wait: has what follows wait for both.
        """
        self._return.borrowed = [weight.gradient for weight in borrowed]
        self._return.send, self._return.wait = send, wait


@dataclass
class _GradientReturn:
    """What `_ReturnGradients` does, apart from the `LentGradients` that holds its node."""

    own: Sequence[_DeferredGradient]
    borrowed: Sequence[_DeferredGradient] = ()
    send: SendGradients | None = None
    wait: Callable[[], None] | None = None

    def run(self) -> None:
        assert self.send is not None and self.wait is not None, "nothing was lent"
        self.send(
            [gradient.compute() for gradient in self.borrowed],
            [gradient.receive_buffer for gradient in self.own],
        )
        for gradient in self.own:
            gradient.wait_with(self.wait)


class _ReturnGradients(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gradient_return: _GradientReturn, *weights: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.gradient_return = gradient_return
        return weights[0].new_empty(1)

    @staticmethod
    def backward(ctx: Any, _placeholder: Tensor | None) -> tuple[None, ...]:
        ctx.gradient_return.run()
        return None, *(None for _ in ctx.needs_input_grad[1:])


class _Attach(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, rows: Tensor, _token: Tensor) -> Tensor:
        return rows.view_as(rows)

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None


def fits_grouped_mm(*matrices: Tensor) -> bool:
    """Whether torch's grouped matmul takes these: bf16 on a GPU, rows of whole 16 bytes."""
    fit = all(one.is_cuda and one.dtype == torch.bfloat16 and one.shape[-1] % 8 == 0 for one in matrices)
    return fit and hasattr(F, "grouped_mm")


def split_rows(x_RD: Tensor, ends_L: Tensor) -> tuple[Tensor, ...]:
    """Each expert's rows, for which the host waits, and those beyond the last end."""
    ends = ends_L.tolist()
    return x_RD.split([end - begin for begin, end in zip((0, *ends), (*ends, len(x_RD)), strict=True)])


def _placeholder(weight: Tensor) -> Tensor:
    return weight.new_empty(1).expand(weight.shape)


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, gradient: _DeferredGradient) -> Tensor:
        ctx.gradient = gradient
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, _placeholder: Tensor) -> tuple[Tensor, None]:
        return ctx.gradient.compute(), None


class _GroupedMatmul(torch.autograd.Function):
    # Holds no `DeferredExpertWeight`: borrowed ones, and those computed again, would stay in memory with their `weight`.
    @staticmethod
    def forward(
        ctx: Any, x_RD: Tensor, weight: Tensor, ends_L: Tensor, gradient: _DeferredGradient
    ) -> Tensor:
        ctx.save_for_backward(x_RD, weight, ends_L)
        ctx.gradient = gradient
        return _grouped_mm(x_RD, weight.transpose(1, 2), ends_L)

    @staticmethod
    def backward(ctx: Any, grad_RF: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_RD, weight, ends_L = ctx.saved_tensors
        grad_RF = grad_RF.contiguous()
        ctx.gradient.save((grad_RF, x_RD, ends_L))
        return _grouped_mm(grad_RF, weight, ends_L), _placeholder(weight), None, None


def _grouped_mm(x_RD: Tensor, weight: Tensor, ends_L: Tensor) -> Tensor:
    """Rows times the matrix of their expert, [R, F], of `weight` [L, D, F].

    A single expert takes it too, although a plain matmul takes the device a quarter less: the number of rows differs each
    time, and for each new shape cuBLAS looks for a kernel, which costs the host far more than the device gains
    (`python -m tests.trainer.gpu.shapes`).
    """
    if fits_grouped_mm(x_RD, weight):
        return F.grouped_mm(x_RD, weight, offs=ends_L)
    *parts, beyond = split_rows(x_RD, ends_L)
    out = [torch.mm(rows, one) for rows, one in zip(parts, weight, strict=True)]
    return torch.cat([*out, x_RD.new_zeros(len(beyond), weight.shape[2])])
