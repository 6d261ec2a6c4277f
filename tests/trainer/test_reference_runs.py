"""Whole runs of an engine on one rank against the fp64 reference: every optimizer, schedule and kind of recomputation."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from configs.compose import compose
from configs.model import ModelConfig
from configs.schema import RunConfig
from configs.training import OptimConfig
from tests.trainer.reference import Reference, ReferenceLine, learning_rate, random_state
from tests.trainer.reference.names import is_buffer
from tests.trainer.test_reference import SEPARATOR, SEQUENCE, documents, family, tokens

pytestmark = pytest.mark.dist


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    """A process group of this process."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


class Trained:
    """An engine on one rank, fed and read like the reference."""

    def __init__(self, config: RunConfig, state: dict[str, Tensor]) -> None:
        from configs.library_environment import Applied
        from trainer.engines.native import NativeEngine
        from trainer.parallel.mesh import assemble

        assert dist.group.WORLD is not None
        mesh = assemble(config, 0, 1, torch.device("cpu"), dist.group.WORLD, Applied())
        self.config, self.engine = config, NativeEngine(config, mesh)
        for piece in self.engine.state():
            if piece.name in state:
                piece.tensor.copy_(state[piece.name])
        self.engine.after_load()

    def run(self, steps: int, samples: Tensor, spoiled: int | None) -> list[dict[str, Any]]:
        """The first steps; the gradients of step `spoiled` are made infinite."""
        from trainer.engines.base import Batch
        from trainer.optim.schedule import global_batch_size

        lines, taken, train = [], 0, self.config.train
        for step in range(steps):
            size = global_batch_size(train, step)
            parts = samples[taken : taken + size].split(train.micro_batch)
            taken += size
            batches = [Batch(part, documents(part)) for part in parts]
            hooks = [
                parameter.register_hook(lambda grad: grad * math.inf)
                for stage in self.engine._stages
                for parameter in stage.parameters()
                if step == spoiled
            ]
            rate = learning_rate(self.config.optim, step, train.steps)
            result = self.engine.step(batches, size, rate, lambda _name: nullcontext())
            for hook in hooks:
                hook.remove()
            lines.append(
                {
                    "loss": result.loss.item(), "aux": result.aux_loss.item(), "norm": result.grad_norm.item(),
                    "skipped": bool(result.skipped), "load": result.expert_load.tolist(), "dropped": int(result.dropped),
                }
            )  # fmt: skip
        return lines

    def state(self) -> dict[str, Tensor]:
        return {piece.name: piece.tensor.detach().double().clone() for piece in self.engine.state()}


def config_of(model: ModelConfig, optim: OptimConfig, train: dict[str, Any]) -> RunConfig:
    plain = compose(["model=demo", "hardware=cpu"])
    tree = plain.model_dump() | {
        "model": model.model_dump(),
        "optim": optim.model_dump(),
        "parallel": plain.parallel.model_dump() | {"dp": 1},
        "train": plain.train.model_dump() | {"steps": 12, "precision": "fp32", "engine": "native"} | train,
        "data": plain.data.model_dump() | {"sequence": SEQUENCE},
    }
    return RunConfig.model_validate(tree)


_RUNS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "adamw": ("plain", {"kind": "adamw"}, {}),
    "adamw-clipped": ("latent", {"kind": "adamw", "clip": 0.1}, {}),
    "adamw-not-clipped": ("mtp-tied", {"kind": "adamw", "clip": 0.0}, {}),
    "adamw-full": ("mtp", {"kind": "adamw"}, {"recompute": "full"}),
    "adamw-selective": ("dropping", {"kind": "adamw"}, {"recompute": "selective"}),
    "adamw-full-zaya": ("zaya-mtp", {"kind": "adamw"}, {"recompute": "full"}),
    "adamw-interleaved": ("interleaved-late", {"kind": "adamw"}, {"recompute": "full"}),
    "muon-interleaved": ("zaya-interleaved", {"kind": "muon"}, {"recompute": "selective"}),
    "adamw-ramp": ("aux-mean-mtp", {"kind": "adamw", "schedule": "wsd"}, {"ramp_batch": 2, "ramp_steps": 3}),
    "adamw-transfer": ("tied", {"kind": "adamw", "base_width": 8, "schedule": "linear"}, {}),
    "muon": ("plain", {"kind": "muon"}, {}),
    "muon-zaya": ("zaya", {"kind": "muon", "base_width": 8}, {}),
    "lamb": ("no-gate", {"kind": "lamb", "schedule": "constant"}, {}),
}


@pytest.mark.parametrize("name", _RUNS)
def test_a_run(name: str, alone: None) -> None:
    """Five steps, one of them with gradients that aren't finite: losses, norms, loads, and all state at the end."""
    of_family, of_optim, of_train = _RUNS[name]
    model, steps, spoiled = family(of_family), 5, 2
    optim = OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=2, **of_optim)
    config = config_of(model, optim, {"global_batch": 4, "micro_batch": 2, **of_train})
    samples, state = tokens(steps * 4, seed=8), random_state(model)
    lines, end = Reference(model, optim, config.train, SEPARATOR).run(
        steps, state, samples.tolist(), {spoiled}
    )
    trained = Trained(config, state)
    for step, (found, expected) in enumerate(zip(trained.run(steps, samples, spoiled), lines, strict=True)):
        _assert_line(step, found, expected)
    found_state = trained.state()
    assert sorted(found_state) == sorted(end)
    for key, tensor in end.items():
        close = 2e-4 * max(1.0, tensor.abs().max().item()) if not is_buffer(key) else 2e-5
        torch.testing.assert_close(
            found_state[key], tensor, rtol=2e-3, atol=close, msg=lambda text, k=key: f"{k}: {text}"
        )


def _assert_line(step: int, found: dict[str, Any], expected: ReferenceLine) -> None:
    assert found["skipped"] == expected.skipped, step
    assert found["loss"] == pytest.approx(expected.loss, rel=2e-5), step
    assert found["aux"] == pytest.approx(expected.aux, rel=2e-5), step
    assert found["load"] == list(expected.load.values()), step
    assert found["dropped"] == expected.dropped, step
    if not expected.skipped:
        assert found["norm"] == pytest.approx(expected.norm, rel=2e-4), step


@pytest.mark.parametrize("name", ["plain", pytest.param("zaya", marks=pytest.mark.long)])
def test_fifty_steps_end_where_the_reference_does(name: str, alone: None) -> None:
    """In fp32 a token between two experts may fall otherwise after many steps; the loss stays within 0.02 all the same."""
    model, steps = family(name), 50
    optim = OptimConfig(lr=1e-2, min_lr=1e-3, warmup_steps=5)
    config = config_of(model, optim, {"global_batch": 2, "micro_batch": 1, "steps": steps})
    few, state = tokens(4, seed=8), random_state(model)
    # The same few samples again and again, so that there is much to learn.
    samples = few.repeat(steps * 2 // len(few), 1)
    lines, _ = Reference(model, optim, config.train, SEPARATOR).run(steps, state, samples.tolist(), set())
    found = Trained(config, state).run(steps, samples, None)
    assert lines[-1].loss < lines[0].loss - 0.5, "it must have learned something to be compared"
    assert [line["loss"] for line in found] == pytest.approx([line.loss for line in lines], abs=0.02)
