"""One dial, every timeout, and an order that can work."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from configs.timeouts import FACTORS, ORDER, Timeouts

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("patience", [0.5, 5.0, 30.0, 600.0])
def test_every_timeout_follows_the_dial_in_order(patience: float) -> None:
    timeouts = Timeouts(patience=patience)
    assert timeouts.seconds("hang") == patience
    for shorter, longer, _ in ORDER:
        assert timeouts.seconds(shorter) < timeouts.seconds(longer)


def test_every_timeout_stands_in_the_order() -> None:
    assert {name for pair in ORDER for name in pair[:2]} == set(FACTORS)


@pytest.mark.parametrize(("shorter", "longer", "why"), ORDER)
def test_an_order_that_cannot_work_is_refused(shorter: str, longer: str, why: str) -> None:
    with pytest.raises(ValidationError) as error:
        Timeouts(**{shorter: 1000.0, longer: 999.0})
    assert "is not below" in str(error.value)


def test_one_value_may_be_set_alone() -> None:
    timeouts = Timeouts(patience=10, start=500)
    assert (timeouts.seconds("start"), timeouts.seconds("agent")) == (500, pytest.approx(10 / 3))


def test_derived_values_survive_being_saved() -> None:
    timeouts = Timeouts(patience=7)
    assert Timeouts.model_validate(timeouts.model_dump()) == timeouts
