"""The model's precision under bf16: what must stay fp32."""

from __future__ import annotations

import pytest
import torch

from configs.model import RouterConfig
from tests.trainer.model.small_models import micro, shape, stage, tokens
from trainer.model.seams import SoloSeams

pytestmark = pytest.mark.dist


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_routers_choose_in_fp32(kind: str) -> None:
    """Under bf16 the weights and inputs are rounded, and nothing after them."""
    model = shape(router=RouterConfig(kind=kind, hidden=16))  # type: ignore[arg-type]
    router = stage(model).routers()[0].to(torch.bfloat16)
    x = torch.randn(4, 12, 32, generator=torch.Generator().manual_seed(0)).to(torch.bfloat16)
    found, _ = router.logits(x, None)
    exact, _ = router.double().logits(x.double(), None)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), exact, rtol=1e-5, atol=1e-5)
    router.to(torch.bfloat16)
    choice = router(x, None, micro(tokens(4)), SoloSeams())
    assert choice.weights_BSK.dtype == torch.float32
