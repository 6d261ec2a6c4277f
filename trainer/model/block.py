"""One block of the decoder: attention and feed-forward layer, each behind a norm and a residual.

Shape letters: B samples, S tokens of a sample on this rank, D model width, R router width.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from configs.model import ModelConfig
from trainer.kernels.choice import use_kernels
from trainer.model.attention import Attention
from trainer.model.compressed import CompressedAttention
from trainer.model.deferred import DeferredWeight
from trainer.model.latent import LatentAttention
from trainer.model.moe import FeedForward, MoELayer
from trainer.model.norm import RMSNorm
from trainer.model.rotary import RotaryAngles
from trainer.model.seams import MicroBatch, PendingOutput, complete


class Scaling(nn.Module):
    """(x + bias) * scale, with a vector each; begins as x."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(width))
        self.bias = nn.Parameter(torch.zeros(width))

    def forward(self, x: Tensor) -> Tensor:
        """Same shape and dtype as `x`."""
        return (x + self.bias) * self.scale


class Residual(nn.Module):
    """ZAYA1's scaled residual: (x + bias) * scale of the residual, and the same with other vectors of the layer's output.

    Parameters, all [D]: `stream.scale`, `stream.bias`, `output.scale`, `output.bias`.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.stream, self.output = Scaling(width), Scaling(width)
        self.single_output = False
        """As in `RMSNorm`: torch 2.11 can't begin a backward pass at a function that isn't its own."""

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """The residual stream `x` with a layer's output `y` added."""
        if use_kernels(x) and not self.single_output:
            from trainer.kernels.residual import scaled_sum

            stream, output = self.stream, self.output
            return scaled_sum(x, y, (stream.scale, stream.bias), (output.scale, output.bias))
        return self.stream(x) + self.output(y)


class DecoderBlock(nn.Module):
    """x += attention(attention_norm(x)); x += feed(feed_norm(x)).

    With `parallel_block` there is no `feed_norm`: h = attention_norm(x); x += attention(h) + feed(h). With
    `residual_scaling` each `+=` is a `Residual`: `attention_residual` and `feed_residual`, of which the parallel block has
    the first alone.

    Args:
        layer: of the whole model; those of multi-token prediction count on from the last.
        moe: whether `feed` is a mixture of experts.
        carried: whether a `mlp` router takes the state of the layer before.
    """

    def __init__(self, model: ModelConfig, layer: int, moe: bool, carried: bool) -> None:
        super().__init__()
        self.attention_norm = RMSNorm(model.hidden, model.norm_eps)
        self.attention = _attention(model)
        self.feed_norm = None if model.parallel_block else RMSNorm(model.hidden, model.norm_eps)
        dense = FeedForward(model.hidden, model.dense_width, model.gated) if not moe else None
        self.feed: FeedForward | MoELayer = MoELayer(model, layer, carried) if dense is None else dense
        scaled = model.residual_scaling
        self.attention_residual = Residual(model.hidden) if scaled else None
        self.feed_residual = Residual(model.hidden) if scaled and not model.parallel_block else None

    def forward(
        self,
        x_BSD: Tensor,
        state_BSR: Tensor | None,
        micro: MicroBatch,
        angles: RotaryAngles,
        pending: PendingOutput | None = None,
    ) -> tuple[Tensor, Tensor | None, PendingOutput | None]:
        """The hidden state after the block, the router's state for the next one (None but for `mlp` routers), and what is
        still to be added to the hidden state, since the exchange that brings it back from the experts may still run.

        Args:
            pending: what the block before has left to be added.
        """
        # Made before the exchange is waited for, so that in the backward pass their matmuls overlap with it.
        deferred: tuple[list[DeferredWeight], ...] = ()
        if pending is not None and use_kernels(x_BSD) and isinstance(self.attention, Attention):
            deferred = (self.attention.deferred_weights(),)
        x_BSD, h_BSD = self.attention_norm.add_norm(x_BSD, result_of(pending))
        y_BSD = self.attention(h_BSD, micro, angles, *deferred)
        # Recomputation puts its own call in place of `feed_forward`, and takes the norm with it.
        whole = self.attention_residual is not None or "feed_forward" in vars(self)
        if self.feed_norm is not None and not whole:
            x_BSD, h_BSD = self.feed_norm.add_norm(x_BSD, y_BSD)
            if isinstance(self.feed, MoELayer):
                fed, state_BSR = self.feed.forward_async(h_BSD, state_BSR, micro)
                # FSDP doesn't find a shared expert's part in a pending output.
                return (
                    (x_BSD + fed.result(), state_BSR, None) if self.feed.shared else (x_BSD, state_BSR, fed)
                )
            return x_BSD, state_BSR, complete(self.feed(h_BSD))
        if self.feed_norm is None:
            fed_BSD, state_BSR = self.feed_forward(h_BSD, state_BSR, micro)
            return _add(self.attention_residual, x_BSD, y_BSD + fed_BSD), state_BSR, None
        x_BSD = _add(self.attention_residual, x_BSD, y_BSD)
        if "feed_forward" in vars(self):
            y_BSD, state_BSR = self.feed_forward(x_BSD, state_BSR, micro)
        else:
            x_BSD, h_BSD = self.feed_norm.add_norm(x_BSD)
            y_BSD, state_BSR = self._fed(h_BSD, state_BSR, micro)
        return _add(self.feed_residual, x_BSD, y_BSD), state_BSR, None

    def feed_forward(
        self, x_BSD: Tensor, state_BSR: Tensor | None, micro: MicroBatch
    ) -> tuple[Tensor, Tensor | None]:
        """Norm (but in a parallel block) and feed-forward layer, without the residual.

        What selective recomputation runs again.
        """
        return self._fed(x_BSD if self.feed_norm is None else self.feed_norm(x_BSD), state_BSR, micro)

    def _fed(
        self, h_BSD: Tensor, state_BSR: Tensor | None, micro: MicroBatch
    ) -> tuple[Tensor, Tensor | None]:
        if isinstance(self.feed, MoELayer):
            return self.feed(h_BSD, state_BSR, micro)
        return self.feed(h_BSD), state_BSR


def _attention(model: ModelConfig) -> Attention | LatentAttention | CompressedAttention:
    if model.attention == "mla":
        return LatentAttention(model)
    return CompressedAttention(model) if model.attention == "cca" else Attention(model)


def result_of(pending: PendingOutput | None) -> Tensor | None:
    """What is to be added, once the exchange is over."""
    return None if pending is None else pending.result()


def _add(residual: Residual | None, x: Tensor, y: Tensor) -> Tensor:
    return x + y if residual is None else residual(x, y)
