"""The fingerprint of a run in its checkpoints, and which settings a resumed run may change. Without torch: the command line
compares fingerprints before anything is queued."""

from __future__ import annotations

from typing import Any

from configs.schema import ModelConfig, RunConfig
from faulttol.checkpoint.manifest import flat
from trainer.data.store import differences

#: Settings of the model that change what is learned next but not what a weight means; a resumed run may change them.
_CHANGEABLE = {
    "name", "init_std", "mtp_coefficient", "router.bias_update_rate", "router.aux_coefficient",
    "router.z_coefficient", "router.losses_over_layers", "router.capacity_factor",
}  # fmt: skip
_FIXED_OPTIM = ("kind", "moments")
"""Settings of the optimizer that say which moments its state has."""


def _defaults() -> dict[str, Any]:
    """The model's fields that have a default."""
    nothing: dict[str, Any] = {}
    return flat(ModelConfig.model_construct(**nothing).model_dump(mode="json"))


def fingerprint(config: RunConfig, data: dict[str, Any]) -> dict[str, Any]:
    """The settings and data that a checkpoint records of its run, as plain JSON."""
    return {
        "model": flat(config.model.model_dump(mode="json")),
        "optim": {name: getattr(config.optim, name) for name in _FIXED_OPTIM},
        "seed": config.train.seed,
        "data": data,
    }


def compare_fingerprints(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], list[str]]:
    """Differences between two fingerprints: those that forbid to resume, and those that are only reported.

    A field that an older checkpoint lacks was added by a later version and had its default: of the model that is compared,
    of all else it doesn't count. Weights that came from elsewhere may have neither model nor data: no samples are consumed
    yet.
    """
    refusals: list[str] = []
    notes: list[str] = []
    for section in ("model", "optim"):
        before, now = old.get(section, {}), new[section]
        if section == "model" and before:
            before = _defaults() | before
        for name in sorted(before.keys() & now.keys()):
            if before[name] != now[name]:
                line = f"{section}.{name} was {before[name]} and is {now[name]}"
                (notes if section == "model" and name in _CHANGEABLE else refusals).append(line)
    if old.get("seed", new["seed"]) != new["seed"]:
        refusals.append(f"train.seed was {old['seed']} and is {new['seed']}")
    return refusals + (differences(old["data"], new["data"]) if old.get("data") else []), notes
