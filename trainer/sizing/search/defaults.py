"""Fields of a run that follow from others where the user leaves them open: batch, precision, engine, bias step. Pure."""

from __future__ import annotations

from typing import Any

from configs.errors import UserError
from configs.schema import RunConfig
from trainer.sizing.model import flops
from trainer.sizing.search import runnable
from trainer.sizing.search.auto import AutoValue


def training(config: RunConfig, dp: int, choices: list[AutoValue]) -> dict[str, Any]:
    """The auto fields of `train`, filled in; what is chosen goes to `choices`.

    Raises:
        UserError: where the batch isn't a multiple of what all replicas take at once.
    """
    return {
        "global_batch": _batch(config, dp, choices),
        "precision": _precision(config, choices),
        "engine": _engine(config, choices),
    }


def _batch(config: RunConfig, dp: int, choices: list[AutoValue]) -> int:
    train, pp = config.train, config.parallel.size("pp")
    unit = train.micro_batch * dp
    if train.global_batch is None:
        count = runnable.FILLING * pp if pp > 1 else 1
        how = f"{count} each for {pp} pipeline stages" if pp > 1 else "no accumulation"
        reason = f"train.micro_batch={train.micro_batch} on {dp} data-parallel ranks, {how}"
        choices.append(AutoValue("train.global_batch", str(unit * count), reason))
        return unit * count
    if train.global_batch % unit:
        raise UserError(
            f"train.global_batch={train.global_batch} is not a multiple of train.micro_batch*dp={unit}; "
            f"set it to a multiple of {unit}"
        )
    return train.global_batch


def _engine(config: RunConfig, choices: list[AutoValue]) -> str:
    if config.train.engine is not None:
        return config.train.engine
    reason = (
        "it runs every layout; deepspeed, of dp and ep at ZeRO 1 and 2 alone, is used where it is asked for"
    )
    choices.append(AutoValue("train.engine", "native", reason))
    return "native"


def balancing(config: RunConfig, choices: list[AutoValue]) -> dict[str, Any]:
    """The model with its router's automatic bias step."""
    model, router = config.model, config.model.router
    tree = model.model_dump()
    if router.balance not in ("bias", "both") or router.bias_update_rate is not None:
        return tree
    rate = router.bias_rate(model.experts)
    if router.bias_rule == "load_error":
        reason = "a step of AdamW on the load error, as ZAYA1"
    elif router.score == "sigmoid":
        reason = "0.2 % of a sigmoid score's mean of a half, as DeepSeek-V3"
    else:
        reason = f"0.2 % of the mean softmax score, 1/{model.experts}"
    choices.append(AutoValue("model.router.bias_update_rate", f"{rate:g}", reason))
    tree["router"]["bias_update_rate"] = rate
    return tree


def _precision(config: RunConfig, choices: list[AutoValue]) -> str:
    if config.train.precision is not None:
        return config.train.precision
    name = config.hardware.name
    if flops.peak(config.hardware, "bf16") is not None:
        precision, reason = "bf16", f"{name} has a bf16 peak; master weights stay fp32"
    else:
        precision, reason = "fp32", f"{name} has no bf16 peak on record"
    choices.append(AutoValue("train.precision", precision, reason))
    return precision
