"""What only a GPU shows: grouped matrix products, bf16, event timing."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from configs.metrics import StepLine
from tests.trainer.test_training import steps, train

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(240)]


@pytest.fixture
def hardware() -> str:
    """The preset of this machine's GPU kind."""
    import torch  # only here: collecting the tests must not load it

    if not torch.cuda.is_available():
        pytest.skip(f"torch {torch.__version__} sees no GPU")
    return "mi300x" if torch.version.hip else "h100"


def test_a_gpu_learns_in_bf16_and_has_an_mfu(hardware: str, tmp_path: Path) -> None:
    home = tmp_path / "home"
    lines: list[StepLine] = steps(
        train(home, tmp_path / "run", 1, f"hardware={hardware}", "train.micro_batch=8")
    )
    assert lines[-1].loss < lines[0].loss
    assert all(line.mfu is not None and 0 < line.mfu < 1 for line in lines)
    assert lines[-1].memory_bytes > 0 and lines[-1].phase_seconds["backward"] > 0


def test_a_gpu_sums_the_bits_of_a_state_as_a_cpu_does(hardware: str) -> None:
    import torch

    from trainer.parallel.replicas import checksums

    made = torch.Generator().manual_seed(1)
    tensors = [torch.randn(n, generator=made) for n in (1, 3000, (1 << 21) + 5, 64)]
    tensors += [tensors[1].bfloat16(), torch.tensor(7), torch.tensor([float("nan"), float("-inf"), -0.0])]
    expected = checksums(tensors)
    assert checksums([tensor.cuda() for tensor in tensors]) == expected
    # Some of a state may lie on the host.
    assert checksums([tensors[0], *(tensor.cuda() for tensor in tensors[1:])]) == expected


def test_a_gpu_resumes_the_same_run(hardware: str, tmp_path: Path) -> None:
    words = (f"hardware={hardware}", "train.micro_batch=8")
    whole = {line.step: line.loss for line in steps(train(tmp_path / "home", tmp_path / "run", 1, *words))}
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-0000000012")
    again = steps(train(tmp_path / "home", tmp_path / "run", 1, *words, attempt=2))
    assert {line.step: line.loss for line in again} == {step: whole[step] for step in range(7, 13)}
