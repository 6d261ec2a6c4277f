"""Rows through weights whose gradients come later in the backward pass than those of the rows.

The engine of autograd takes the nodes that were made last first. A weight's own node, made early, so comes after all that
the rows' gradients lead to, such as the start of a collective that then runs beside the weight's matmul.

Shape letters: R rows, L experts, F and D the widths on the two sides of a weight.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Room = Callable[[int], Tensor]
"""Makes room for the gradient of one expert of a weight."""
Parts = tuple[Tensor, Tensor, Tensor | None]
"""Slopes of the rows that come out, the rows that went in, and where each expert's end where there are several."""
GiveBack = Callable[[Sequence[Tensor], Sequence[Room]], None]
"""Starts to send gradients of borrowed weights, and to fill the rooms of lent ones."""


class _Owing:
    """A gradient that is still to be worked out: what it is made of, and how.

    The weight's node in the graph holds this and not the `Later`, whose `weight` holds that node: a ring that reference
    counts never free, and while a run trains nothing else does.
    """

    def __init__(self, product: Callable[..., Tensor]) -> None:
        self._product = product
        self._parts: Parts | None = None
        self._elsewhere: list[tuple[int, Tensor]] = []
        self._ready: Callable[[], None] | None = None

    def keep(self, parts: Parts) -> None:
        """What `gradient` is made of."""
        self._parts = parts

    def elsewhere(self, number: int) -> Tensor:
        """Room for the gradient of part `number` along dim 0, which another rank works out."""
        assert self._parts is not None, "the rows' backward pass comes before"
        slope_RF, x_RD, _ = self._parts
        self._elsewhere.append((number, slope_RF.new_empty(slope_RF.shape[1], x_RD.shape[1])))
        return self._elsewhere[-1][1]

    def after(self, ready: Callable[[], None]) -> None:
        """What has those of other ranks be there."""
        self._ready = ready

    def gradient(self) -> Tensor:
        """That of the weight; once."""
        assert self._parts is not None, "the rows' backward pass comes before"
        parts, self._parts = self._parts, None
        made = self._product(*parts)
        if self._ready is not None:
            self._ready()
        for number, part in self._elsewhere:
            made[number] = part
        self._elsewhere, self._ready = [], None
        return made


class Later:
    """A weight whose gradient is worked out where this object was made."""

    def __init__(self, weight: Tensor) -> None:
        self.owing = _Owing(self.product)
        self.weight: Tensor = _Weight.apply(weight, self.owing)

    def keep(self, slope_RF: Tensor, x_RD: Tensor) -> None:
        """What the weight's gradient is made of, for `product`."""
        self.owing.keep((slope_RF, x_RD, None))

    def nothing(self) -> Tensor:
        """A gradient that nobody reads, in the shape that autograd wants."""
        return _nothing(self.weight)

    @staticmethod
    def product(slope_RF: Tensor, x_RD: Tensor, _ends_L: Tensor | None) -> Tensor:
        """The gradient of a weight [F, D] that all rows meet."""
        return torch.mm(slope_RF.t(), x_RD)


class WeightLater(Later):
    """A weight [L, F, D] of grouped matmuls."""

    def rows(self, x_RD: Tensor, ends_L: Tensor) -> Tensor:
        """Each row times the transposed weight of its expert, [R, F]; once."""
        return _Rows.apply(x_RD, self.weight, ends_L, self.owing)

    @staticmethod
    def product(slope_RF: Tensor, x_RD: Tensor, ends_L: Tensor | None) -> Tensor:
        """[L, F, D]."""
        assert ends_L is not None, "rows of experts come with their ends"
        if takes(x_RD, slope_RF):
            return F.grouped_mm(slope_RF.t(), x_RD, offs=ends_L)
        *slopes, _ = stretches(slope_RF, ends_L)
        parts = zip(slopes, stretches(x_RD, ends_L), strict=False)
        return torch.stack([torch.mm(slope.t(), rows) for slope, rows in parts])


class Returns:
    """Where in the backward pass gradients of lent weights come home: made right behind the weights, so that a rank works
    out those of borrowed weights before its own, and has its own to work out while they travel.

    Args:
        own: weights of which some experts may be lent.
    """

    def __init__(self, own: Sequence[WeightLater]) -> None:
        self._way = _Way([later.owing for later in own])
        self._token: Tensor = _Return.apply(self._way, *(later.weight for later in own))

    def along(self, rows: Tensor) -> Tensor:
        """The same; their backward pass leads here."""
        return _Pass.apply(rows, self._token)

    def expect(self, theirs: Sequence[WeightLater], give_back: GiveBack, ready: Callable[[], None]) -> None:
        """Something was lent or borrowed.

        Args:
            theirs: borrowed weights.
            give_back: starts the way of their gradients, and of those that come into the rooms of own weights.
            ready: has those be there.
        """
        self._way.borrowed = [later.owing for later in theirs]
        self._way.give_back, self._way.ready = give_back, ready


@dataclass
class _Way:
    """What `_Return` does, apart from the `Returns` that holds its node."""

    own: Sequence[_Owing]
    borrowed: Sequence[_Owing] = ()
    give_back: GiveBack | None = None
    ready: Callable[[], None] | None = None

    def go(self) -> None:
        assert self.give_back is not None and self.ready is not None, "nothing was lent"
        self.give_back([owing.gradient() for owing in self.borrowed], [owing.elsewhere for owing in self.own])
        for owing in self.own:
            owing.after(self.ready)


class _Return(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, way: _Way, *weights: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.way = way
        return weights[0].new_empty(1)

    @staticmethod
    def backward(ctx: Any, _nothing: Tensor | None) -> tuple[None, ...]:
        ctx.way.go()
        return None, *(None for _ in ctx.needs_input_grad[1:])


class _Pass(torch.autograd.Function):
    @staticmethod
    def forward(_ctx: Any, rows: Tensor, _token: Tensor) -> Tensor:
        return rows.view_as(rows)

    @staticmethod
    def backward(_ctx: Any, slope: Tensor) -> tuple[Tensor, None]:
        return slope, None


def takes(*matrices: Tensor) -> bool:
    """Whether torch's grouped matmul takes these: bf16 on a GPU, rows of whole 16 bytes."""
    right = all(one.is_cuda and one.dtype == torch.bfloat16 and one.shape[-1] % 8 == 0 for one in matrices)
    return right and hasattr(F, "grouped_mm")


def stretches(x_RD: Tensor, ends_L: Tensor) -> tuple[Tensor, ...]:
    """Each expert's rows, for which the host waits, and those beyond the last end."""
    ends = ends_L.tolist()
    return x_RD.split([end - begin for begin, end in zip((0, *ends), (*ends, len(x_RD)), strict=True)])


def _nothing(weight: Tensor) -> Tensor:
    return weight.new_empty(1).expand(weight.shape)


class _Weight(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor, owing: _Owing) -> Tensor:
        ctx.owing = owing
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, _nothing: Tensor) -> tuple[Tensor, None]:
        return ctx.owing.gradient(), None


class _Rows(torch.autograd.Function):
    # Holds no `Later`: what a rank borrowed, and computes again, would stay in memory with its `weight`.
    @staticmethod
    def forward(ctx: Any, x_RD: Tensor, weight: Tensor, ends_L: Tensor, owing: _Owing) -> Tensor:
        ctx.save_for_backward(x_RD, weight, ends_L)
        ctx.owing = owing
        return _grouped(x_RD, weight.transpose(1, 2), ends_L)

    @staticmethod
    def backward(ctx: Any, slope_RF: Tensor) -> tuple[Tensor, Tensor, None, None]:
        x_RD, weight, ends_L = ctx.saved_tensors
        slope_RF = slope_RF.contiguous()
        ctx.owing.keep((slope_RF, x_RD, ends_L))
        return _grouped(slope_RF, weight, ends_L), _nothing(weight), None, None


def _grouped(x_RD: Tensor, weight: Tensor, ends_L: Tensor) -> Tensor:
    """Rows times the matrix of their expert, [R, F], of `weight` [L, D, F].

    Of a single expert too, whose plain matmul would take the device a quarter less: the number of rows is another one each
    time, and for each new shape cuBLAS looks for a kernel, which takes the host far longer than the device gains
    (`python -m tests.trainer.gpu.shapes`).
    """
    if takes(x_RD, weight):
        return F.grouped_mm(x_RD, weight, offs=ends_L)
    *parts, beyond = stretches(x_RD, ends_L)
    out = [torch.mm(rows, one) for rows, one in zip(parts, weight, strict=True)]
    return torch.cat([*out, x_RD.new_zeros(len(beyond), weight.shape[2])])
