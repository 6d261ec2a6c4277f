"""Grouped-query attention with rotary positions.

Shape letters: B samples, S tokens of a sample, D model width, N query heads, G key/value heads, H head width. Under tensor
parallelism N and G are those of this rank: a module never knows them but takes them from a projection's width.
"""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor, nn

from configs.model import ModelConfig
from trainer.kernels.choice import use_kernels
from trainer.model.deferred import DeferredWeight
from trainer.model.joint_linear import joint_linear
from trainer.model.norm import RMSNorm, SplitNorm
from trainer.model.rotary import RotaryAngles
from trainer.model.seams import AttentionSeam, MicroBatch, SoloSeams, TensorSeam


def heads(x_BSD: Tensor, width: int) -> Tensor:
    """[B, S, heads * width] to [B, heads, S, width]."""
    return x_BSD.unflatten(-1, (-1, width)).transpose(1, 2)


class Attention(nn.Module):
    """Causal attention; each key/value head serves N/G query heads.

    Parameters: `query.weight` [N*H, D], `key.weight` and `value.weight` [G*H, D], `output.weight` [D, N*H]. With
    `qk_norm=head` `query_norm.weight` and `key_norm.weight` are [H] and act on each head; with `projection` they are [N*H]
    and [G*H] and act on the whole projection. The norms come before the rotation.

    Under tensor parallelism x is entered; query, key and value are split by heads, output by its columns.
    """

    def __init__(self, model: ModelConfig) -> None:
        super().__init__()
        self.head_dim, self.window = model.head_dim, model.window
        query, key = model.heads * model.head_dim, model.kv_heads * model.head_dim
        self.query = nn.Linear(model.hidden, query, bias=False)
        self.key = nn.Linear(model.hidden, key, bias=False)
        self.value = nn.Linear(model.hidden, key, bias=False)
        self.output = nn.Linear(query, model.hidden, bias=False)
        self.norm = model.qk_norm
        if self.norm == "head":
            self.query_norm = RMSNorm(model.head_dim, model.norm_eps)
            self.key_norm = RMSNorm(model.head_dim, model.norm_eps)
        elif self.norm == "projection":
            self.query_norm = SplitNorm(query, model.norm_eps)
            self.key_norm = SplitNorm(key, model.norm_eps)
        self.single_output = False
        """As in `RMSNorm`."""
        self.tensors: TensorSeam = SoloSeams()
        self.core: AttentionSeam = SoloSeams()

    def splits(self) -> dict[str, int | None]:
        """Dim of each parameter that tensor parallelism splits."""
        return {"query.weight": 0, "key.weight": 0, "value.weight": 0, "output.weight": 1}

    def deferred_weights(self) -> list[DeferredWeight]:
        """The weights of query, key and value, for `forward`, with their gradients deferred to where this was called."""
        layers = () if self.single_output else (self.query, self.key, self.value)
        return [DeferredWeight(layer.weight) for layer in layers]

    def forward(
        self, x_BSD: Tensor, micro: MicroBatch, angles: RotaryAngles, deferred: Sequence[DeferredWeight] = ()
    ) -> Tensor:
        """[B, S, D] to [B, S, D]."""
        x_BSD = self.tensors.enter(x_BSD)
        layers = (self.query, self.key, self.value)
        if self.single_output:
            q, k, v = (layer(x_BSD) for layer in layers)
        else:
            q, k, v = joint_linear(x_BSD, layers, deferred)
        v_BGSH = heads(v, self.head_dim)
        if use_kernels(q) and 2 * angles.cos_SP.shape[-1] == self.head_dim:
            q_BNSH = self._norm_rotary(q, "query_norm", angles)
            k_BGSH = self._norm_rotary(k, "key_norm", angles)
            out_BNSH = self.core.attend(q_BNSH, k_BGSH, v_BGSH, micro, window=self.window, scale=None)
            return self.tensors.leave(self.output(out_BNSH.transpose(1, 2).flatten(2)))
        if self.norm == "projection":
            q, k = self.query_norm(q), self.key_norm(k)
        q_BNSH, k_BGSH = heads(q, self.head_dim), heads(k, self.head_dim)
        if self.norm == "head":
            q_BNSH, k_BGSH = self.query_norm(q_BNSH), self.key_norm(k_BGSH)
        q_BNSH, k_BGSH = angles.rotate(q_BNSH), angles.rotate(k_BGSH)
        out_BNSH = self.core.attend(q_BNSH, k_BGSH, v_BGSH, micro, self.window, None)
        return self.tensors.leave(self.output(out_BNSH.transpose(1, 2).flatten(2)))

    def _norm_rotary(self, x_BSC: Tensor, norm: str, angles: RotaryAngles) -> Tensor:
        """Norm and rotation in one pass, [B, heads, S, H]."""
        from trainer.kernels.norm import Rotation, norm_rotary

        layer: RMSNorm | None = getattr(self, norm, None)
        per_token, weight, eps = 1, None, 0.0
        if isinstance(layer, SplitNorm) and layer.tensors.size > 1:
            x_BSC = layer(x_BSC)  # its mean is that of all ranks' parts
        elif layer is not None:
            weight, eps = layer.weight, layer.eps
            if self.norm == "head":
                per_token = x_BSC.shape[-1] // self.head_dim
        rows = x_BSC.unflatten(-1, (per_token, -1))
        rotation = Rotation(angles.cos_SP, angles.sin_SP, per_token, self.head_dim)
        return heads(norm_rotary(rows, weight, eps, rotation).flatten(-2), self.head_dim)
