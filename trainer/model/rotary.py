"""Rotary position embedding (Su et al. 2021), stretched by YaRN (Peng et al. 2023) where asked.

Shape letters: B samples, N heads, S tokens, H head width, R rotated width, P = R/2 rotated pairs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from configs.model import ModelConfig, YarnConfig


@dataclass(frozen=True)
class RotaryAngles:
    """Cosines and sines of the angles that a micro-batch's tokens are turned by.

    An object and not a pair of tensors, so that mixed precision, which casts a module's tensor arguments, leaves it alone.
    """

    cos_SP: Tensor
    sin_SP: Tensor

    def rotate(self, x_BNSH: Tensor) -> Tensor:
        """Turn the first R of each head's H: element i of its first half with element i of its second half, as in Llama.

        Computed in the angles' fp32; the result has `x_BNSH`'s dtype.
        """
        pairs = self.cos_SP.shape[-1]
        first, second, rest = x_BNSH.split((pairs, pairs, x_BNSH.shape[-1] - 2 * pairs), dim=-1)
        turned = (first * self.cos_SP - second * self.sin_SP, second * self.cos_SP + first * self.sin_SP)
        return torch.cat((*(part.to(x_BNSH.dtype) for part in turned), rest), dim=-1)


class Rotary:
    """Angles of a model's positions. No module: it has no state, so nothing is lost on the meta device."""

    def __init__(self, model: ModelConfig) -> None:
        mla = model.attention == "mla"
        self.width = model.rope_head_dim if mla else round(model.head_dim * model.rope_fraction)
        self.theta, self.yarn = model.rope_theta, model.yarn
        # Under MLA the rotary part is only some of a head, and DeepSeek scales the scores of the whole head instead.
        self.scale = 1.0 if mla else attention_factor(model.yarn)

    def __call__(self, positions_S: Tensor, dtype: torch.dtype) -> RotaryAngles:
        """The turns of `positions_S`, in `dtype`.

        The angles are worked out in fp64: at place 100,000 one of fp32 is off by up to 0.004.
        """
        angle_SP = positions_S.double()[:, None] * self.frequencies(positions_S.device)[None, :]
        return RotaryAngles((angle_SP.cos() * self.scale).to(dtype), (angle_SP.sin() * self.scale).to(dtype))

    def frequencies(self, device: torch.device) -> Tensor:
        """Radians per place of each pair, [P] fp64."""
        exponent_P = torch.arange(0, self.width, 2, dtype=torch.float64, device=device) / self.width
        plain_P = self.theta**-exponent_P
        if self.yarn.factor == 1:
            return plain_P
        low, high = (self._pair(turns) for turns in (self.yarn.beta_fast, self.yarn.beta_slow))
        low, high = max(math.floor(low), 0), min(math.ceil(high), self.width - 1)
        index_P = torch.arange(self.width // 2, dtype=torch.float64, device=device)
        # 0 for the fast pairs, which stay as they are; 1 for the slow ones, which are stretched.
        ramp_P = ((index_P - low) / (high - low if high > low else 0.001)).clamp(0, 1)
        return plain_P / self.yarn.factor * ramp_P + plain_P * (1 - ramp_P)

    def _pair(self, turns: float) -> float:
        """Index of the pair that turns so many times within the original context."""
        wave = self.yarn.original / (turns * 2 * math.pi)
        return self.width * math.log(wave) / (2 * math.log(self.theta))


def attention_factor(yarn: YarnConfig) -> float:
    """0.1 ln(factor) + 1, which makes up for YaRN's flatter scores: on cosines and sines, or squared on scores."""
    return 0.1 * math.log(yarn.factor) + 1.0 if yarn.factor > 1 else 1.0
