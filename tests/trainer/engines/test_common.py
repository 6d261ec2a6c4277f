"""What engines share around a step, by hand."""

from __future__ import annotations

import math

import pytest
import torch

from trainer.engines.common import clip_factor_and_skip, global_norm

pytestmark = pytest.mark.dist


def test_clipping_by_hand() -> None:
    for norm, limit, factor in (
        (0.5, 1.0, 1.0),
        (4.0, 1.0, 1 / (4 + 1e-6)),
        (4.0, 0.0, 1.0),
        (0.0, 1.0, 1.0),
    ):
        found, skip = clip_factor_and_skip(torch.tensor(norm), limit)
        assert found.item() == pytest.approx(factor, rel=1e-6) and skip.item() == 0
    for norm in (math.nan, math.inf):
        assert clip_factor_and_skip(torch.tensor(norm), 1.0)[1].item() == 1


def test_the_norm_by_hand() -> None:
    parts = [
        torch.randn(5, 3),
        torch.randn(7),
        torch.zeros(2),
        torch.randn(1024),
        torch.randn(70, 30),
        torch.randn(9, 300).t(),
    ]
    whole = torch.cat([part.flatten() for part in parts]).double().norm().item()
    norm, stop_requests = global_norm(parts, 1, torch.device("cpu"))
    assert (
        stop_requests.item() == 0
        and global_norm(parts, 1, torch.device("cpu"), stop_requested=True)[1].item() == 1
    )
    assert norm.item() == pytest.approx(whole, rel=1e-6)
    large = torch.randn(8_000_001)  # squares in fp32, one after the other, are off by 2e-4
    exact = large.double().norm().item()
    assert global_norm([large], 1, torch.device("cpu"))[0].item() == pytest.approx(exact, rel=1e-7)
    assert global_norm([], 1, torch.device("cpu"))[0].item() == 0
