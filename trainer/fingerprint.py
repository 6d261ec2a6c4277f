"""What a checkpoint remembers of the run that wrote it, and what of it another start may change. Without torch: the
command line compares before anything is queued."""

from __future__ import annotations

from typing import Any

from configs.schema import ModelConfig, RunConfig
from faulttol.checkpoint.manifest import flat
from trainer.data.store import differences

#: Settings of the model that change what is learned next but not what a weight means; a resumed run may change them.
_FREE = {
    "name", "init_std", "mtp_coefficient", "router.bias_update_rate", "router.aux_coefficient",
    "router.z_coefficient", "router.losses_over_layers", "router.capacity_factor",
}  # fmt: skip
_OPTIM_FIXED = ("kind", "moments")
"""Settings of the optimizer that say which moments its state has."""


def _defaults() -> dict[str, Any]:
    """The model's fields that have a default."""
    nothing: dict[str, Any] = {}
    return flat(ModelConfig.model_construct(**nothing).model_dump(mode="json"))


def fingerprint(config: RunConfig, data: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint remembers of the run that wrote it, as plain JSON."""
    return {
        "model": flat(config.model.model_dump(mode="json")),
        "optim": {name: getattr(config.optim, name) for name in _OPTIM_FIXED},
        "seed": config.train.seed,
        "data": data,
    }


def refusals(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What differs between two fingerprints: what forbids to resume, and what only has to be said.

    A field that an older checkpoint lacks was added by a later version and had its default: of the model that is compared,
    of all else it doesn't count. Weights that came from elsewhere may have neither model nor data: no samples are consumed
    yet.
    """
    refused: list[str] = []
    said: list[str] = []
    for section in ("model", "optim"):
        before, now = old.get(section, {}), new[section]
        if section == "model" and before:
            before = _defaults() | before
        for name in sorted(before.keys() & now.keys()):
            if before[name] != now[name]:
                line = f"{section}.{name} was {before[name]} and is {now[name]}"
                (said if section == "model" and name in _FREE else refused).append(line)
    if old.get("seed", new["seed"]) != new["seed"]:
        refused.append(f"train.seed was {old['seed']} and is {new['seed']}")
    return refused + (differences(old["data"], new["data"]) if old.get("data") else []), said
