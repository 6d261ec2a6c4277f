"""Differentiable collectives. The gradient of each is the collective that undoes it.

Shape letters: n ranks of the group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from trainer.parallel.mesh import Axis

# torch 2.13 has new names for these two, and warns of the old ones, the only ones that 2.11 has.
_GATHER = "all_gather_single" if hasattr(dist, "all_gather_single") else "all_gather_into_tensor"
_SCATTER = "reduce_scatter_single" if hasattr(dist, "reduce_scatter_single") else "reduce_scatter_tensor"

_Start = Callable[[Tensor, Axis], tuple[Tensor, dist.Work]]


def _gather_into(out: Tensor, x: Tensor, axis: Axis, later: bool = False) -> Any:
    return getattr(dist, _GATHER)(out, x, group=axis.process_group, async_op=later)


def _scatter_from(out: Tensor, x: Tensor, axis: Axis, later: bool = False) -> Any:
    return getattr(dist, _SCATTER)(out, x, group=axis.process_group, async_op=later)


def all_gather_raw(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """The ranks' parts side by side along `dim`, without gradient."""
    parts = x.new_empty((axis.size, *x.shape))
    # Flat: gloo checks the first dims of both, and 0-d or empty tensors have none.
    _gather_into(parts.flatten(), x.contiguous().flatten(), axis)
    return parts.movedim(0, dim).flatten(dim, dim + 1)


def reduce_scatter_raw(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's part along `dim` of the ranks' sum, without gradient."""
    parts = x.unflatten(dim, (axis.size, -1)).movedim(dim, 0).contiguous()
    out = parts.new_empty(parts.shape[1:])
    _scatter_from(out.flatten(), parts.flatten(), axis)
    return out


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return all_gather_raw(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return reduce_scatter_raw(gradient, ctx.axis, ctx.dim), None, None


class _Scatter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis, dim: int) -> Tensor:
        ctx.axis, ctx.dim = axis, dim
        return reduce_scatter_raw(x, axis, dim)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return all_gather_raw(gradient, ctx.axis, ctx.dim), None, None


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, axis: Axis) -> Tensor:
        ctx.axis = axis
        return all_reduce_raw(x, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return all_reduce_raw(gradient, ctx.axis), None


class _AllToAll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, sends: list[int] | None, receives: list[int] | None, axis: Axis
    ) -> Tensor:
        ctx.sends, ctx.receives, ctx.axis = sends, receives, axis
        return all_to_all_raw(x, sends, receives, axis)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        return all_to_all_raw(gradient, ctx.receives, ctx.sends, ctx.axis), None, None, None


def all_reduce_raw(x: Tensor, axis: Axis) -> Tensor:
    """The ranks' sum, without gradient."""
    total = x.contiguous().clone()
    dist.all_reduce(total, group=axis.process_group)
    return total


def all_reduce_packed(parts: Sequence[Tensor], axis: Axis) -> list[Tensor]:
    """The ranks' sums of several tensors in fp32, each of its part's shape, without gradient.

    By one cast and one collective: hundreds of small launches take longer than what they do.
    """
    if not parts:
        return []
    total = torch.cat([part.flatten() for part in parts]).float()
    if axis.size > 1:
        dist.all_reduce(total, group=axis.process_group)
    split = total.split([part.numel() for part in parts])
    return [one.view_as(part) for one, part in zip(split, parts, strict=True)]


def all_to_all_raw(x: Tensor, sends: list[int] | None, receives: list[int] | None, axis: Axis) -> Tensor:
    """Rows to and from every rank, without gradient; None: equally many of all."""
    rows = x.shape[0] if receives is None else sum(receives)
    out = x.new_empty((rows, *x.shape[1:]))
    dist.all_to_all_single(out, x.contiguous(), receives, sends, group=axis.process_group)
    return out


def all_gather(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """The ranks' parts side by side along `dim`; its gradient is summed over the ranks and split."""
    return _Gather.apply(x, axis, dim)


def reduce_scatter(x: Tensor, axis: Axis, dim: int) -> Tensor:
    """This rank's part along `dim` of the ranks' sum; its gradient is gathered."""
    return _Scatter.apply(x, axis, dim)


def all_reduce(x: Tensor, axis: Axis) -> Tensor:
    """The ranks' sum on all of them; its gradient is the sum of the ranks' gradients."""
    return _Sum.apply(x, axis)


def all_to_all(x: Tensor, sends: list[int] | None, receives: list[int] | None, axis: Axis) -> Tensor:
    """Rows of dim 0 to and from every rank; its gradient goes the way back."""
    return _AllToAll.apply(x, sends, receives, axis)


# ---- collectives under way while other work is done ----


class AsyncCollective:
    """A collective along dim 0 that is under way, and in the backward pass the one that undoes it.

    `launch` and `wait` are two nodes of the graph. What is computed between them runs beside the collective, and what
    computes its gradients runs beside the collective of the backward pass: the engine of autograd takes the nodes that were
    made last first.
    """

    def __init__(self, axis: Axis, start: _Start, back: _Start) -> None:
        self._axis, self._start, self._back = axis, start, back
        self._work: dist.Work | None = None
        self._result: Tensor | None = None

    def launch(self, x: Tensor) -> Tensor:
        """The result, which nothing may read before `wait`."""
        return _Launch.apply(x, self)

    def wait(self, result: Tensor) -> Tensor:
        """What `launch` gave, from now on to be read."""
        return _Wait.apply(result, self)

    def begin(self, x: Tensor, back: bool) -> Tensor:
        """Start the collective without gradient; `end` gives its result where it goes back.

        The result of the way there belongs to the graph, which holds this object: kept here, the two would hold each other,
        for good where nothing lands, as when a forward pass is computed again and stopped before.
        """
        result, self._work = (self._back if back else self._start)(x.contiguous(), self._axis)
        self._result = result if back else None
        return result

    def end(self) -> Tensor | None:
        """Have what follows wait for the collective; its result, where it went back. None where it ended before, as it has
        when a forward pass is computed again."""
        if self._work is not None:
            self._work.wait()
        result, self._work, self._result = self._result, None, None
        return result


class _Launch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, collective: AsyncCollective) -> Tensor:
        ctx.collective = collective
        return collective.begin(x, back=False)

    @staticmethod
    def backward(ctx: Any, _gradient: Tensor) -> tuple[Tensor | None, None]:
        return ctx.collective.end(), None


class _Wait(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, result: Tensor, collective: AsyncCollective) -> Tensor:
        ctx.collective = collective
        collective.end()
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        # `_Launch` takes the result of the collective that starts here, and not this gradient.
        ctx.collective.begin(gradient, back=True)
        return gradient, None


def _alias(out: Tensor) -> Tensor:
    """The same memory for the collective, which keeps the tensor that it gets: `out` becomes part of the graph (see
    `AsyncCollective.begin`)."""
    return out.detach()


def _start_gather(x: Tensor, axis: Axis) -> tuple[Tensor, dist.Work]:
    out = x.new_empty((axis.size * x.shape[0], *x.shape[1:]))
    return out, _gather_into(_alias(out), x, axis, later=True)


def _start_scatter(x: Tensor, axis: Axis) -> tuple[Tensor, dist.Work]:
    out = x.new_empty((x.shape[0] // axis.size, *x.shape[1:]))
    return out, _scatter_from(_alias(out), x, axis, later=True)


def async_all_gather(axis: Axis) -> AsyncCollective:
    """The ranks' parts one after the other; its gradient is summed over the ranks and split."""
    return AsyncCollective(axis, _start_gather, _start_scatter)


def async_reduce_scatter(axis: Axis) -> AsyncCollective:
    """This rank's part of the ranks' sum; its gradient is gathered."""
    return AsyncCollective(axis, _start_scatter, _start_gather)
