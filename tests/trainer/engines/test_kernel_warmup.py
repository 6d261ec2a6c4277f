"""What is begun beside the build and the load: on a GPU alone, and each part of it does run."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from configs.compose import compose
from configs.schema import RunConfig
from trainer import kernel_warmup

pytestmark = [pytest.mark.unit, pytest.mark.timeout(120)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return compose(["hardware=h100", "model=olmoe_1b_7b", "train.precision=bf16"])


def test_a_rank_on_cores_waits_for_nothing_of_the_kind(config: RunConfig) -> None:
    assert kernel_warmup.start(config, CPU) is None


@pytest.mark.parametrize("launch", [kernel_warmup._matmul, kernel_warmup._attention, kernel_warmup._grouped])
def test_what_libraries_are_asked_for_can_be_had(launch: object, config: RunConfig) -> None:
    """An error of theirs is passed over, so a call that was wrong would warm nothing and say nothing."""
    failure: Exception | None = None
    try:
        launch(config.model, torch.bfloat16, CPU)  # type: ignore[operator]
    except Exception as error:
        failure = error
    assert failure is None


def test_kernels_are_those_of_the_model(config: RunConfig) -> None:
    names = kernel_warmup.kernel_modules(config.model)
    assert "trainer.kernels.loss" in names and "trainer.kernels.compressed" not in names
    zaya = kernel_warmup.kernel_modules(compose(["model=zaya1_base"]).model)
    assert set(names) < set(zaya) and "trainer.kernels.compressed" in zaya
    assert all(importlib.util.find_spec(name) for name in zaya)


def test_what_cannot_be_had_is_passed_over(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def fail(*_: object) -> None:
        begun.append("a launch")
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(torch.cuda, "set_device", lambda _: begun.append("the device"))
    for name in ("_matmul", "_attention", "_grouped"):
        monkeypatch.setattr(kernel_warmup, name, fail)
    monkeypatch.setattr(kernel_warmup, "usable", lambda _: True)
    monkeypatch.setattr(kernel_warmup.importlib, "import_module", lambda name: begun.append(name))
    thread = kernel_warmup.start(config, torch.device("cuda", 0))
    assert thread is not None
    thread.join()
    assert begun == ["the device", *["a launch"] * 3, *kernel_warmup.kernel_modules(config.model)]
