"""The study of expert traffic: whose time counts."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

from collectives.ops.groups import AXES
from collectives.studies.moe import Layer, MoeStudy
from collectives.timing.measure import Raw
from configs.compose import compose

pytestmark = pytest.mark.unit

EXCHANGE = [[300.0, 300.0]] * 4
STEPS = [[200.0, 100.0], [100.0, 200.0], [400.0, 100.0], [100.0, 400.0]]
"""Microseconds of experts [rank, call]: another rank of each pair is hot in each step."""


class Bench:
    """Returns the times of four ranks, in the order in which a layer is timed."""

    def __init__(self, *tables: list[list[float]]) -> None:
        self.team = SimpleNamespace(
            nodes=[0] * 4,
            membership=lambda _: None,
            rank=SimpleNamespace(rank=0),
            device=SimpleNamespace(type="cpu"),
        )
        self.settings = CONFIG.collectives
        self._tables = iter(tables)

    def time(self, call: Any, group: Any, capturable: bool = True) -> Raw:
        """Stamps of calls one after the other."""
        ends = (np.array(next(self._tables)) * 1e3).astype(np.int64).cumsum(axis=1)
        stamps = np.stack([np.pad(ends, ((0, 0), (1, 0)))[:, :-1], ends], axis=2)
        return Raw(stamps, True, 1.0, 0, np.ones(4, bool))


CONFIG = compose(
    ["workload=collectives", "hardware=cpu", "collectives=moe", "collectives.patterns=rotating", "parallel.ep=2",
     "collectives.imbalances=1"]
)  # fmt: skip


def layer(*tables: list[list[float]]) -> Layer:
    layers = list[dict[str, Any]]()
    journal = SimpleNamespace(
        note=lambda _: None, step=lambda _, tree, __: layers.append(tree), store=SimpleNamespace(write_json=lambda *_: None)
    )  # fmt: skip
    layout = dict.fromkeys(AXES, 1) | {"dp": 4, "ep": 2}
    study = MoeStudy(cast(Any, Bench(*tables, *tables)), cast(Any, journal), CONFIG, layout)
    study.run(frozenset())
    return Layer(**layers[0])


def test_experts_take_as_long_as_on_the_hottest_rank_of_each_step() -> None:
    """They took the mean over the ranks, which is the same whatever the imbalance: what is hidden was too small a share."""
    timed = layer(EXCHANGE, STEPS, [[500.0, 500.0], [500.0, 500.0], [700.0, 700.0], [700.0, 700.0]], EXCHANGE)
    assert timed.experts_us == pytest.approx((200 + 400) / 2), "of each group's hottest, over the groups"
    assert (timed.dispatch_us, timed.sequential_us) == pytest.approx((300, 600))
    assert timed.hidden == pytest.approx((600 - 300) / (600 - 300))


def test_even_experts_take_what_each_rank_takes() -> None:
    assert layer(EXCHANGE, [[150.0, 150.0]] * 4, EXCHANGE, EXCHANGE).experts_us == pytest.approx(150)
