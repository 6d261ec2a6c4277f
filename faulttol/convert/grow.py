"""A deeper model from a trained one: its layers, stacked.

G_stack (Du et al. 2024, "Stacking Your Transformers", arXiv 2405.15319): the layers of a model, all of them, one copy upon
the other, which trains on faster than a deep model from scratch.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import partial
from typing import Any, Literal

from configs.errors import UserError
from configs.model import ModelConfig
from faulttol.checkpoint.boxes import Box
from faulttol.checkpoint.folder import CheckpointCommit
from faulttol.checkpoint.hashes import CheckpointSource
from faulttol.checkpoint.manifest import Tensor
from faulttol.checkpoint.store import StoreLike
from faulttol.convert.facts import is_parameter, model_of, opened
from faulttol.convert.job import WORK, ConversionJob, Estimate
from faulttol.convert.target import ConversionTarget, Value, filled, zeros

_BLOCK = re.compile(r"blocks\.(\d+)\.(.*)")
_ONE = {"float32": b"\0\0\x80\x3f", "bfloat16": b"\x80\x3f", "float16": b"\0\x3c"}
Policy = Literal["reset", "copy"]


def grow(
    store: StoreLike,
    out: StoreLike,
    run: str,
    layers: int,
    commit: CheckpointCommit | None = None,
    method: str = "stack",
    optimizer: Policy = "reset",
) -> ConversionJob:
    """A checkpoint of the same model with more layers, at the same step and sample.

    Leading dense layers stay as they are; the others are stacked whole, so their number is multiplied; where dense layers
    lie between those with experts, each copy has the kind of its layer. Embeddings, the last norm, the head and multi-token
    prediction stay. Routers' balancing biases go with their layers.

    Args:
        run: that the new checkpoint belongs to.
        layers: of the new model.
        commit: the newest where none is named.
        optimizer: `reset`: all slots and the count of steps begin at zero, since the moments of a layer aren't those that
            it will have at another depth; `copy`: each layer takes those of the layer that it is a copy of.

    Raises:
        UserError: where the number of layers is not a multiple, or the method isn't known.
        Incomplete: where the checkpoint is damaged.
    """
    if method != "stack":
        raise UserError(f"method={method} isn't known; type method=stack")
    if optimizer not in ("reset", "copy"):
        raise UserError(f"optimizer={optimizer} isn't known; type optimizer=reset or optimizer=copy")
    source = opened(store, commit)
    model = model_of(source)
    fixed, unit = model.dense_layers, model.layers - model.dense_layers
    if unit % model.moe_every:
        raise UserError(
            f"the model's {unit} layers after model.dense_layers={fixed} can't be stacked: that is not a multiple of "
            f"model.moe_every={model.moe_every}, so dense layers would be copied to where experts belong; train a new model"
        )
    if layers <= model.layers or not unit or (layers - fixed) % unit:
        fits = ", ".join(str(fixed + unit * times) for times in (2, 3, 4)) if unit else "none"
        raise UserError(
            f"layers={layers} can't be stacked from {model.layers}"
            + (f" of which the first {fixed} are dense and stay" if fixed else "")
            + f"; type layers= one of {fits}, …"
        )
    values, notes = _values(source, model, layers, optimizer)
    target = ConversionTarget(out, run, source.commit.step, values)
    meaning = {
        "reset": "the optimizer's slots and its count of steps begin at zero",
        "copy": "each layer has the optimizer's slots of the layer that it is a copy of",
    }
    notes = [meaning[optimizer], *notes]
    entry = {
        "how": "grow", "method": method, "run": source.manifest.run, "attempt": source.manifest.attempt,
        "step": source.commit.step, "from": store.url, "layers": [model.layers, layers], "optimizer": optimizer,
    }  # fmt: skip
    small = _facts(source, layers, entry)
    return ConversionJob(
        _cost(source, target), tuple(notes), partial(target.run, source, small, tuple(notes))
    )


def _facts(source: CheckpointSource, layers: int, entry: dict[str, Any]) -> dict[str, Any]:
    old = source.manifest.facts
    prints = old["fingerprint"]
    return {
        **old,
        "fingerprint": {**prints, "model": {**prints["model"], "layers": layers}},
        "lineage": [*old.get("lineage", []), entry],
    }


def _cost(source: CheckpointSource, target: ConversionTarget) -> Estimate:
    indexes = sum(file.index for file in source.manifest.files)
    read = moved = 0
    for value in target.values:
        if isinstance(value.read, partial):
            name = value.read.args[1]
            read += sum(source.cost(name, box) for box in value.boxes())
            moved += value.bytes
    return Estimate(read + indexes, target.size, moved, target.at_once * WORK + indexes)


def _origins(name: str, fixed: int, unit: int, layers: int) -> Iterator[str]:
    """The names that a tensor has in the new model."""
    match = _BLOCK.fullmatch(name)
    layer = int(match[1]) if match else -1
    if match is None or layer < fixed:
        yield name
        return
    for copy in range(layer, layers, unit):
        yield f"blocks.{copy}.{match[2]}"


def _values(
    source: CheckpointSource, model: ModelConfig, layers: int, optimizer: Policy
) -> tuple[list[Value], list[str]]:
    fixed, unit = model.dense_layers, model.layers - model.dense_layers
    values: list[Value] = []
    for name, tensor in source.tensors.items():
        for new in _origins(name, fixed, unit, layers):
            values.append(_value(source, name, tensor, new, optimizer))
    made = list(_first_layers(source, model.moe_layers, unit, layers))
    notes = (
        [f"the first MoE layer has no {made[0].name.split('.', 2)[2]}, so its copies begin with ones"]
        if made
        else []
    )
    return values + made, notes


def _value(source: CheckpointSource, name: str, tensor: Tensor, new: str, optimizer: Policy) -> Value:
    """A tensor of the new model, from one of the old."""
    kept = is_parameter(name) or name.endswith(".router.bias")
    if optimizer == "reset" and not kept:
        return zeros(new, tensor.dtype, tensor.shape)
    return Value(new, tensor.dtype, tensor.shape, partial(_read, source, name))


def _read(source: CheckpointSource, name: str, box: Box) -> Iterator[memoryview]:
    return source.chunks(name, box)


def _first_layers(source: CheckpointSource, moe: tuple[int, ...], unit: int, layers: int) -> Iterator[Value]:
    """What the copies of the first MoE layer have and it hasn't: the scale of the router's state from the layer before
    (ZAYA1), which begins at one, with slots of zero."""
    if len(moe) < 2:
        return
    first = {m[2] for name in source.tensors if (m := _BLOCK.fullmatch(name)) and int(m[1]) == moe[0]}
    for name, tensor in source.tensors.items():
        match = _BLOCK.fullmatch(name)
        if match is None or int(match[1]) != moe[1] or match[2] in first:
            continue
        for copy in range(moe[0] + unit, layers, unit):
            new = f"blocks.{copy}.{match[2]}"
            if "/" in new:
                yield zeros(new, tensor.dtype, tensor.shape)
            else:
                yield filled(new, tensor.dtype, tensor.shape, _ONE[tensor.dtype])
