"""The timeout lattice: one dial, every timeout derived from it, and an order that is enforced.

A run dies of timeouts that fire in the wrong order: a collective that gives up before the hang detector has
named the culprit, a restart that begins while the old ranks still hold the device (torchtitan#2899 is such a
bill). So there is one model: `patience` scales everything, a single value may be overridden, and an order
that cannot work is refused with the two values and the reason.
"""

from __future__ import annotations

from typing import Annotated, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator

Seconds = Annotated[float, Field(gt=0)]

#: field -> seconds per second of `patience`; the derived value of a field that isn't set.
FACTORS: dict[str, float] = {
    "heartbeat": 1 / 30,
    "agent": 1 / 3,
    "node": 2 / 3,
    "hang": 1.0,
    "stop": 2.0,
    "rendezvous": 3.0,
    "start": 6.0,
    "collective": 10.0,
}

#: (shorter, longer, why): the order that must hold.
ORDER: list[tuple[str, str, str]] = [
    ("heartbeat", "agent", "an agent must be missed for several polls before it counts as lost"),
    ("agent", "node", "an agent is asked again before its node is given up"),
    ("node", "hang", "a lost node must be distinguished from a hung rank, so it is found first"),
    ("hang", "collective", "the hang detector must name the culprit before the collective gives up"),
    (
        "stop",
        "collective",
        "ranks that are stopped must be gone before a collective of theirs looks like a fault",
    ),
    ("rendezvous", "start", "ranks that cannot meet must fail before the start as a whole is given up"),
    ("hang", "start", "the first step may compile and warm up, so a start is allowed longer than a step"),
]


class Timeouts(BaseModel):
    """Timeouts in seconds; a field left out is `patience` times its factor.

    Raises:
        ValueError: naming both values and the reason, where the order cannot work.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True)

    patience: Seconds = 30.0
    """The dial: longest silence of a training rank that is still taken for work."""
    heartbeat: Seconds | None = None
    """Between two polls of a node agent."""
    agent: Seconds | None = None
    """Without an answer before a node agent counts as lost."""
    node: Seconds | None = None
    """Until Ray reports a dead or silent node (its health checks are set from this)."""
    hang: Seconds | None = None
    """Without a record from any rank before the gang counts as hung."""
    stop: Seconds | None = None
    """From SIGTERM, upon which ranks finish their step and save, to SIGKILL."""
    rendezvous: Seconds | None = None
    """For all ranks to join the process group."""
    start: Seconds | None = None
    """From the start of the ranks to the first finished step."""
    collective: Seconds | None = None
    """Of one collective in torch.distributed, the last resort."""

    @model_validator(mode="before")
    @classmethod
    def _derive(cls, values: object) -> object:
        if isinstance(values, dict):
            try:
                dial = float(values.get("patience", 30.0))
            except (TypeError, ValueError):
                return values  # the field's own check says it better
            derived = {name: dial * factor for name, factor in FACTORS.items()}
            return derived | {k: v for k, v in values.items() if v is not None}
        return values

    @model_validator(mode="after")
    def _ordered(self) -> Self:
        for shorter, longer, why in ORDER:
            a, b = self.seconds(shorter), self.seconds(longer)
            if a >= b:
                raise ValueError(
                    f"resilience.timeouts.{shorter}={a:g} is not below resilience.timeouts.{longer}={b:g}: "
                    f"{why}; lower the first, raise the second, or set only resilience.timeouts.patience"
                )
        return self

    def seconds(self, name: str) -> float:
        """The value of one timeout in seconds."""
        value = getattr(self, name)
        assert isinstance(value, float), f"{name} was not derived"
        return value
