"""What is begun beside the build and the load: on a GPU alone, and each part of it does run."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from configs.compose import compose
from configs.schema import RunConfig
from trainer import warming

pytestmark = [pytest.mark.unit, pytest.mark.timeout(120)]
CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def config() -> RunConfig:
    return compose(["hardware=h100", "model=olmoe_1b_7b", "train.precision=bf16"])


def test_a_rank_on_cores_waits_for_nothing_of_the_kind(config: RunConfig) -> None:
    assert warming.begin(config, CPU) is None


@pytest.mark.parametrize("touch", [warming._product, warming._attention, warming._grouped])
def test_what_libraries_are_asked_for_can_be_had(touch: object, config: RunConfig) -> None:
    """An error of theirs is passed over, so a call that was wrong would warm nothing and say nothing."""
    failure: Exception | None = None
    try:
        touch(config.model, torch.bfloat16, CPU)  # type: ignore[operator]
    except Exception as error:
        failure = error
    assert failure is None


def test_kernels_are_those_of_the_model(config: RunConfig) -> None:
    names = warming.modules(config.model)
    assert "trainer.kernels.loss" in names and "trainer.kernels.compressed" not in names
    zaya = warming.modules(compose(["model=zaya1_base"]).model)
    assert set(names) < set(zaya) and "trainer.kernels.compressed" in zaya
    assert all(importlib.util.find_spec(name) for name in zaya)


def test_what_cannot_be_had_is_passed_over(config: RunConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    begun: list[str] = []

    def fail(*_: object) -> None:
        begun.append("a touch")
        raise RuntimeError("no kernel image is available")

    monkeypatch.setattr(torch.cuda, "set_device", lambda _: begun.append("the device"))
    for name in ("_product", "_attention", "_grouped"):
        monkeypatch.setattr(warming, name, fail)
    monkeypatch.setattr(warming, "usable", lambda _: True)
    monkeypatch.setattr(warming.importlib, "import_module", lambda name: begun.append(name))
    thread = warming.begin(config, torch.device("cuda", 0))
    assert thread is not None
    thread.join()
    assert begun == ["the device", *["a touch"] * 3, *warming.modules(config.model)]
