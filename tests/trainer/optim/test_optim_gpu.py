"""On a GPU the optimizers compute what they do on a CPU, and never make the host wait."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.trainer.optim.cases import CONFIGS, OptimRank, all_cases, cases, gathered, together
from trainer.optim.muon import orthogonalize

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]


@pytest.fixture(autouse=True)
def _fp32() -> Iterator[None]:
    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no GPU")
    before = torch.backends.cuda.matmul.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = False
    yield
    torch.backends.cuda.matmul.allow_tf32 = before


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_a_gpu_takes_the_steps_of_a_cpu(kind: str, moments: str) -> None:
    optim = CONFIGS[kind].model_copy(update={"moments": moments, "beta2": 0.95})
    cpu = gathered([OptimRank.make(optim).go().saved()])
    for name, array in gathered([OptimRank.make(optim, device="cuda").go().saved()]).items():
        # A bf16 moment may round the other way for a last bit of difference before it.
        limit = 1e-5 if moments == "fp32" else 1e-3 + 1e-2 * np.abs(cpu[name]).max() * ("/" in name)
        np.testing.assert_allclose(array, cpu[name], rtol=0, atol=limit, err_msg=name)


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("moments", ["fp32", "bf16"])
def test_no_step_waits_for_the_gpu(kind: str, moments: str) -> None:
    optim = CONFIGS[kind].model_copy(update={"moments": moments, "beta2": 0.95})
    rank = OptimRank.make(optim, device="cuda").go()
    step = rank.optimizer.step
    rank.unwaiting()
    rank.optimizer.step = lambda *numbers: step(0.1, *numbers[1:]) or numbers[1].item()  # type: ignore[method-assign]
    with pytest.raises(RuntimeError, match="synchroniz"):
        rank.unwaiting()


def test_several_gpus_compute_what_one_process_does(tmp_path: Path) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip(f"{torch.cuda.device_count()} GPU; this needs 2")
    ranks = together(2, tmp_path, "nccl", all_cases, "cuda")
    for kind, cut in cases():
        alone = gathered([OptimRank.make(CONFIGS[kind]).go().saved()])
        for name, array in gathered([rank[kind, cut][0] for rank in ranks]).items():
            np.testing.assert_allclose(array, alone[name], rtol=0, atol=1e-5, err_msg=f"{kind} {cut} {name}")
        for straight, resumed in (rank[kind, cut] for rank in ranks):
            assert all(one.equal(two) for (_, _, one), (_, _, two) in zip(straight, resumed, strict=True))


def test_bf16_products_on_a_gpu_keep_muons_promise() -> None:
    torch.manual_seed(0)
    matrices = torch.randn(4, 512, 1024, device="cuda")
    exact = orthogonalize(matrices, 5)
    low = orthogonalize(matrices.bfloat16(), 5).float()
    assert (low - exact).norm() < 0.05 * exact.norm()
