"""Attention by fused kernels that only a GPU has, against the same with a mask in fp32."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from trainer.model.seams import MicroBatch, PackedDocuments, Tally, attention, masked_attention
from trainer.parallel.context import token_positions, two_pieces

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]
if not torch.cuda.is_available():
    pytest.skip(f"torch {torch.__version__} sees no GPU", allow_module_level=True)

GPU = torch.device("cuda", 0)
SEQUENCE = 512
LIMIT = 8e-3
"""Relative error of what is computed in bf16."""


def _drawn() -> list[Tensor]:
    """Grouped queries, keys, values and a gradient, [2, heads, SEQUENCE, 64]."""
    torch.manual_seed(1)
    return [torch.randn(2, heads, SEQUENCE, 64, device=GPU) for heads in (8, 2, 2, 8)]


def _off(found: Tensor, expected: Tensor) -> float:
    return float((found.float() - expected).norm() / expected.norm())


@pytest.mark.parametrize("window", [1, 100, SEQUENCE])
def test_a_window_slides_without_a_mask(window: int) -> None:
    *given, grad = _drawn()
    at = torch.arange(SEQUENCE, device=GPU)
    wide = [x.clone().requires_grad_() for x in given]
    expected = masked_attention(*wide, at, at.clone(), None, window, None)
    narrow = [x.bfloat16().requires_grad_() for x in given]
    found = masked_attention(*narrow, at, at, None, window, None)
    assert _off(found, expected) < LIMIT
    theirs = torch.autograd.grad((expected * grad).sum(), wide)
    for one, other in zip(torch.autograd.grad((found * grad).sum(), narrow), theirs, strict=True):
        # A window of one token leaves no gradient of queries and keys.
        assert _off(one, other) < LIMIT if other.norm() > 1e-3 else one.float().norm() < 0.2


@pytest.mark.parametrize("window", [0, 100])
def test_documents_have_their_own_attention_without_a_mask(window: int) -> None:
    """Lengths of one token, of a tile, and beyond it."""
    *given, grad = _drawn()
    at = torch.arange(SEQUENCE, device=GPU)
    documents = torch.zeros(2, SEQUENCE, dtype=torch.int32, device=GPU)
    for row, starts in ((0, (1, 129, 130)), (1, (300,))):
        for start in starts:
            documents[row, start:] += 1
    bounds = torch.tensor([0, 1, 129, 130, 512, 812, 1024], dtype=torch.int32, device=GPU)
    wide = [x.clone().requires_grad_() for x in given]
    batch = MicroBatch(
        torch.zeros(2, SEQUENCE + 1, device=GPU), at, documents, 1.0, Tally(), PackedDocuments(bounds, 382)
    )
    expected = masked_attention(*wide, at, at, documents, window, None)
    theirs = torch.autograd.grad((expected * grad).sum(), wide)
    narrow = [x.bfloat16().requires_grad_() for x in given]
    q, k, v = narrow
    found = attention(q, k, v, at, batch, window, None)
    assert _off(found, expected) < LIMIT
    for one, other in zip(torch.autograd.grad((found * grad).sum(), narrow), theirs, strict=True):
        assert _off(one, other) < LIMIT


@pytest.mark.parametrize("size", [2, 4])
def test_two_pieces_of_a_sample_see_what_is_before_them(size: int) -> None:
    *given, grad = _drawn()
    at = torch.arange(SEQUENCE, device=GPU)
    wide = [x.clone().requires_grad_() for x in given]
    expected = masked_attention(*wide, at, at.clone(), None, 0, None)
    theirs = torch.autograd.grad((expected * grad).sum(), wide)
    own = [token_positions(SEQUENCE, "gather", size, index, GPU) for index in range(size)]
    sums = [torch.zeros_like(x) for x in given]
    for index, mine in enumerate(own):
        q, k, v = (x.bfloat16().requires_grad_() for x in given)
        order = torch.cat(own)
        found = two_pieces(q[:, :, mine], k[:, :, order], v[:, :, order], (index, size), None)
        assert _off(found, expected[:, :, mine]) < LIMIT
        for total, part in zip(
            sums, torch.autograd.grad((found * grad[:, :, mine]).sum(), (q, k, v)), strict=True
        ):
            total += part
    for one, other in zip(sums, theirs, strict=True):
        assert _off(one, other) < LIMIT
