"""What a run resumes from, and what it may not: checkpoints that know their model, data and samples."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

from configs.errors import UserError
from configs.rank import RankContext
from configs.schema import RunConfig
from faulttol.checkpoint import load as loading
from faulttol.checkpoint import save as saving
from faulttol.checkpoint.manifest import Identity, Incomplete, Superseded
from faulttol.checkpoint.pieces import Wanted, owned
from trainer.data.store import differences
from trainer.engines.base import Engine
from trainer.optim.schedule import samples_before
from trainer.parallel.mesh import Mesh

_log = logging.getLogger("megaray.trainer")

#: Settings of the model that change what is learned next but not what a weight means; a resumed run may change them.
_FREE = {
    "name", "init_std", "mtp_coefficient", "router.bias_update_rate", "router.aux_coefficient",
    "router.z_coefficient", "router.losses_over_layers", "router.capacity_factor",
}  # fmt: skip
_OPTIM_FIXED = ("kind", "moments")
"""Settings of the optimizer that say which slots its state has."""


@dataclass(frozen=True)
class Resumed:
    """What was loaded."""

    step: int
    samples: int
    """Samples consumed up to it."""
    loss: float
    path: str
    notes: list[str]
    """Newer checkpoints that were passed over, and settings that changed, a line each."""


def fingerprint(config: RunConfig, data: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint remembers of the run that wrote it, as plain JSON."""
    return {
        "model": _flat(config.model.model_dump(mode="json")),
        "optim": {name: getattr(config.optim, name) for name in _OPTIM_FIXED},
        "seed": config.train.seed,
        "data": data,
    }


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in tree.items():
        flat |= _flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {f"{prefix}{name}": value}
    return flat


def refusals(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], list[str]]:
    """What differs between two fingerprints: what forbids to resume, and what only has to be said.

    A field that one of them lacks was added by another version, whose default the other had; it doesn't count.
    """
    refused: list[str] = []
    said: list[str] = []
    for section in ("model", "optim"):
        before, now = old.get(section, {}), new[section]
        for name in sorted(before.keys() & now.keys()):
            if before[name] != now[name]:
                line = f"{section}.{name} was {before[name]} and is {now[name]}"
                (said if section == "model" and name in _FREE else refused).append(line)
    if old.get("seed", new["seed"]) != new["seed"]:
        refused.append(f"train.seed was {old['seed']} and is {new['seed']}")
    return refused + differences(old.get("data", {}), new["data"]), said


class Checkpoints:
    """The run's checkpoint folder, as one rank uses it."""

    def __init__(self, config: RunConfig, rank: RankContext, mesh: Mesh, data: dict[str, Any]) -> None:
        self._config, self._mesh = config, mesh
        self._root = config.checkpoint.path or str(rank.run.checkpoints)
        self._fingerprint = fingerprint(config, data)
        self._identity = Identity(
            run=rank.run.run_id, attempt=rank.attempt, layout=mesh.layout, rank=rank.rank, world=rank.world
        )

    def restore(self, engine: Engine) -> Resumed | None:
        """Load the newest checkpoint that every rank can read; None where there is none.

        Raises:
            UserError: where it is another model's, corpus's or run's, naming what differs.
        """
        newest = loading.newest(self._root, self._mesh)
        if newest is None:
            return None
        refused, said = refusals(newest.facts.get("fingerprint", {}), self._fingerprint)
        if refused:
            raise UserError(
                f"the checkpoint of step {newest.step} in {self._root} can't be resumed: {'; '.join(refused[:4])}; set "
                "it back, or name another checkpoint.path to start afresh"
            )
        wanted = [
            Wanted(part.name, str(part.tensor.dtype).removeprefix("torch."), part.box, part.tensor)
            for part in engine.state()
        ]
        found = loading.restore(self._root, wanted, self._mesh, self._identity)
        if found is None:
            return None
        engine.loaded()
        notes = [f"passed over a checkpoint: {why}" for why in found.passed]
        notes += [f"changed since step {found.step}: {line}" for line in said]
        samples, would = int(found.facts["samples"]), samples_before(self._config.train, found.step)
        if samples != would:
            notes.append(
                f"the batch changed: {samples} samples were consumed up to step {found.step}, where this "
                f"configuration would have taken {would}; it goes on with sample {samples}"
            )
        return Resumed(found.step, samples, float(found.facts["loss"]), found.path, notes)

    def save(self, engine: Engine, step: int, samples: int, loss: float) -> saving.Saved | None:
        """Save and commit; None where that failed and training may go on.

        Args:
            samples: consumed up to this step.

        Raises:
            Incomplete: where the last step's save failed.
        """
        facts = {
            "fingerprint": self._fingerprint,
            "samples": samples,
            "tokens": samples * self._config.data.sequence,
            "loss": loss,
        }
        try:
            return saving.save(
                self._root,
                step,
                owned(engine.state()),
                self._identity,
                facts,
                self._mesh,
                self._config.checkpoint.keep,
            )
        except Superseded:  # a newer attempt trains already; this one has nothing left to do
            raise
        except Incomplete as error:
            _log.error("checkpoint failed: %s", error)
            if step == self._config.train.steps:
                raise
            return None
