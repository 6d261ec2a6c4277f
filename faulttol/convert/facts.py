"""What a checkpoint says of its model, and what of a training state follows from the parameters."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, Literal

from configs.errors import UserError
from configs.model import ModelConfig
from faulttol.checkpoint.folder import CheckpointCommit, CheckpointFolder
from faulttol.checkpoint.hashes import CheckpointSource
from faulttol.checkpoint.manifest import flat
from faulttol.checkpoint.store import StoreLike
from faulttol.convert.target import Value, zeros

Kind = Literal["adamw", "muon", "lamb"]
Moments = Literal["fp32", "bf16"]
COUNT = "optimizer/step"
"""The count of steps that have moved the weights, a number in fp32."""
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
"""A precision as the configuration names it -> as torch does."""
_BUFFERS = (".router.bias", ".router.bias_avg", ".router.bias_avg_sq")


def opened(store: StoreLike, commit: CheckpointCommit | None = None) -> CheckpointSource:
    """A committed checkpoint; the newest where none is named.

    Raises:
        UserError: where none is committed.
        Incomplete: where its manifest is damaged or a file is missing.
    """
    if commit is None:
        folder = CheckpointFolder(store)
        folder.refuse_others()
        if not folder.commits:
            raise UserError(f"{store.url} holds no committed checkpoint: name a folder that does")
        commit = folder.commits[-1]
    return CheckpointSource(store, commit)


def nested(settings: dict[str, Any]) -> dict[str, Any]:
    """The inverse of `faulttol.checkpoint.manifest.flat`."""
    tree: dict[str, Any] = {}
    for name, value in settings.items():
        *way, last = name.split(".")
        inner = tree
        for step in way:
            inner = inner.setdefault(step, {})
        inner[last] = value
    return tree


def model_of(source: CheckpointSource) -> ModelConfig:
    """The model that a checkpoint is of, from its facts.

    Raises:
        UserError: where they don't tell.
    """
    model = source.manifest.facts.get("fingerprint", {}).get("model")
    where = f"{source.store.url.rstrip('/')}/{source.commit.manifest}"
    if not model:
        raise UserError(f"{where} doesn't tell its model: name a checkpoint that training has saved")
    try:
        return ModelConfig(**nested(model))
    except ValueError as error:
        line = " ".join(str(error).split())
        raise UserError(
            f"{where}: its model isn't one of this version's: {line}; use the version that saved it"
        ) from None


def fingerprint(
    model: ModelConfig | None, kind: Kind | None = None, moments: Moments = "fp32"
) -> dict[str, Any]:
    """What an imported checkpoint says of itself, as far as it is known; what isn't there may be anything.

    No data and no seed: no sample was consumed. See `trainer.fingerprint`.
    """
    facts: dict[str, Any] = {}
    if model is not None:
        facts["model"] = flat(model.model_dump(mode="json"))
    if kind is not None:
        facts["optim"] = {"kind": kind, "moments": moments}
    return facts


def facts(
    prints: dict[str, Any], lineage: list[dict[str, Any]], samples: int = 0, tokens: int = 0
) -> dict[str, Any]:
    """The small state of a checkpoint that wasn't trained here: it has no loss."""
    return {
        "fingerprint": prints,
        "samples": samples,
        "tokens": tokens,
        "loss": None,
        "lineage": lineage,
    }


def is_parameter(name: str) -> bool:
    """Whether a tensor is learned by gradient: neither a slot of an optimizer nor a router's balance."""
    return "/" not in name and not name.endswith(_BUFFERS)


def slots(name: str, kind: Kind) -> tuple[str, ...]:
    """What an optimizer keeps beside a parameter, as trainer/optim names it."""
    owner, _, last = name.rpartition(".")
    vector = last.endswith(("bias", "scale")) or owner.endswith(("norm", "_conv", "_mix"))
    matrix = name not in ("embedding.weight", "head.weight") and not vector
    return ("momentum",) if kind == "muon" and matrix else ("exp_avg", "exp_avg_sq")


def fresh(
    parameters: Iterable[tuple[str, tuple[int, ...]]], kind: Kind, moments: Moments, there: set[str]
) -> Iterator[Value]:
    """An optimizer's state before its first step, but for what is `there` already."""
    for name, shape in parameters:
        for slot in slots(name, kind):
            if f"{name}/{slot}" not in there:
                yield zeros(f"{name}/{slot}", DTYPES[moments], shape)
    if COUNT not in there:
        yield zeros(COUNT, "float32", ())


def balances(model: ModelConfig, there: set[str]) -> Iterator[Value]:
    """Routers' balancing biases before the first step, but for what is `there` already."""
    blocks = [f"blocks.{layer}" for layer in model.moe_layers]
    blocks += [f"mtp.{depth}.block" for depth in range(model.mtp_layers)]
    rule = model.router.bias_rule == "load_error"
    for block in blocks:
        for slot in ("bias", "bias_avg", "bias_avg_sq") if rule else ("bias",):
            name = f"{block}.feed.router.{slot}"
            if name not in there:
                yield zeros(name, "float32", (model.experts,))
