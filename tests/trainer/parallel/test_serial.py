"""Collectives without overlap: each waits for what was queued before it, and what is queued later waits for it."""

from __future__ import annotations

from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist

from trainer.bench.no_overlap import COLLECTIVES, without_overlap
from trainer.parallel import exchange

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


@dataclass
class _Stream:
    name: str
    log: list[str]
    device: torch.device = field(default_factory=lambda: torch.device("cuda"))

    def wait_stream(self, other: _Stream) -> None:
        self.log.append(f"{self.name} waits for {other.name}")


def test_a_collective_stands_alone_and_everything_is_as_before_afterwards(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    log: list[str] = []
    compute, side = _Stream("compute", log), _Stream("side", log)
    current = [compute]
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: current[0])
    work = SimpleNamespace(wait=lambda: log.append("waited for"))

    def collective(*_: Any, **options: Any) -> Any:
        log.append("collective")
        return [work, work] if options.get("several") else work if options.get("async_op") else None

    monkeypatch.setattr(dist, "batch_isend_irecv", collective)
    monkeypatch.setattr(dist, exchange._GATHER, collective)
    with without_overlap(torch.device("cuda")):
        current[0] = side
        # As the exchange calls it, which must not have kept the function itself.
        exchange._gather_into(torch.zeros(2), torch.zeros(1), SimpleNamespace(process_group=None), later=True)  # type: ignore[arg-type]
        around = ["side waits for compute", "collective", "waited for", "compute waits for side"]
        assert log == around
        log.clear()
        dist.batch_isend_irecv([], several=True)  # type: ignore[call-arg]
        assert log == [*around[:3], *around[2:]]
    log.clear()
    dist.batch_isend_irecv([])
    assert log == ["collective"]


def test_all_of_them_are_caught_and_given_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda _: _Stream("compute", []))
    before = {name: getattr(dist, name) for name in COLLECTIVES if hasattr(dist, name)}
    assert {
        exchange._GATHER,
        exchange._SCATTER,
        "all_reduce",
        "all_to_all_single",
        "batch_isend_irecv",
    } <= set(before)
    with pytest.raises(RuntimeError, match="a step"), without_overlap(torch.device("cuda")):
        assert all(getattr(dist, name) is not one for name, one in before.items())
        raise RuntimeError("a step")
    assert all(getattr(dist, name) is one for name, one in before.items())
    with without_overlap(torch.device("cpu")):
        assert all(getattr(dist, name) is one for name, one in before.items())
