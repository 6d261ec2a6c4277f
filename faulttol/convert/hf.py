"""Export to and import from Hugging Face's files, for the families that families.py knows."""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from typing import Any

from configs.errors import UserError, from_json
from configs.model import ModelConfig
from faulttol.checkpoint.folder import CheckpointCommit
from faulttol.checkpoint.hashes import CheckpointSource
from faulttol.checkpoint.manifest import flat
from faulttol.checkpoint.store import StoreLike
from faulttol.convert import families, hf_config
from faulttol.convert.assemble import ImportDestination, imported
from faulttol.convert.facts import Kind, Moments, facts, fingerprint, model_of, opened
from faulttol.convert.job import (
    THREADS,
    WORK,
    ConversionJob,
    ConversionProgress,
    ConversionResult,
    Estimate,
    Progress,
    at_once,
)
from faulttol.convert.placed import PlacedTensor, export_bytes
from faulttol.convert.placed import cost as placed_cost
from faulttol.convert.safetensors import INDEX, OutputTensor, SafetensorsFolder, file_names, header, shards
from faulttol.convert.values import FLOATS

DTYPES = {"bf16": "bfloat16", "fp32": "float32"}
_KEPT = ("max_position_embeddings", "bos_token_id", "eos_token_id", "pad_token_id")
"""Settings of an imported `config.json` that lineage remembers, for the way back."""
_LOOSE = {
    "name", "init_std", "mtp_coefficient", "router.balance", "router.bias_rule", "router.bias_update_rate",
    "router.aux_coefficient", "router.z_coefficient", "router.losses_over_layers", "router.capacity_factor",
}  # fmt: skip
"""Settings that say how a model is trained on, which its published files don't fix."""


# ---- export ----


def export_hf(
    store: StoreLike,
    out: StoreLike,
    commit: CheckpointCommit | None = None,
    dtype: str = "bf16",
    max_shard_bytes: int = 5 << 30,
) -> ConversionJob:
    """A checkpoint's parameters as the files that `AutoModelForCausalLM.from_pretrained` loads.

    Args:
        out: an empty folder.
        commit: the newest where none is named.
        dtype: `bf16` or `fp32`; balancing biases stay fp32.
        max_shard_bytes: of a file, but where one tensor is larger.

    Raises:
        UserError: where no family computes what the model does, the checkpoint isn't the model's, or the folder has a
            model already.
        Incomplete: where the checkpoint is damaged.
    """
    if dtype not in DTYPES:
        raise UserError(f"dtype={dtype} isn't known; type {' or '.join(DTYPES)}")
    if max_shard_bytes < 1:
        raise UserError(f"max_shard_bytes={max_shard_bytes} is below 1; type e.g. {5 << 30}")
    there = sorted(name for name in out.names() if name.endswith((".safetensors", ".json")))
    if there:
        raise UserError(f"--out={out.url} holds a model already ({there[0]}); name an empty folder")
    source = opened(store, commit)
    model = model_of(source)
    listed = {placed.foreign: placed for placed in families.tensors(model)}
    _whole(source, listed)
    wanted = DTYPES[dtype]
    tensors = [OutputTensor(p.foreign, p.dtype or wanted, p.shape) for p in listed.values()]
    files = list(shards(tensors, max_shard_bytes))
    config = hf_config.config_of(model, wanted, _remembered(source))
    notes = _left(source, listed)
    read = sum(placed_cost(source, placed) for placed in listed.values())
    indexes = sum(file.index for file in source.manifest.files)
    written = sum(tensor.bytes for tensor in tensors) + sum(len(header(file)) for file in files)
    peak = min(THREADS, len(files)) * WORK + indexes
    cost = Estimate(read + indexes, written, sum(tensor.bytes for tensor in tensors), peak)
    return ConversionJob(cost, notes, partial(_export, source, listed, files, config, out, notes))


def _export(
    source: CheckpointSource,
    listed: dict[str, PlacedTensor],
    files: list[list[OutputTensor]],
    config: dict[str, Any],
    out: StoreLike,
    notes: tuple[str, ...],
    progress: Progress,
) -> ConversionResult:
    total = sum(tensor.bytes for file in files for tensor in file)
    tell, before = ConversionProgress(progress, total), source.bytes
    names = file_names(len(files))
    try:
        work = [
            partial(out.write, name, _chunks(source, listed, file, tell))
            for name, file in zip(names, files, strict=True)
        ]
        size = sum(at_once(work))
        if len(files) > 1:
            map_ = {t.name: name for name, file in zip(names, files, strict=True) for t in file}
            index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(map_.items()))}
            out.write(INDEX, [_json(index)])
        # Last: a folder without it is not a model.
        out.write("config.json", [_json(config)])
    except BaseException:
        for name in (*names, INDEX, "config.json"):
            with suppress(OSError):  # what is being raised says more, and the others go all the same
                out.remove(name)
        raise
    return ConversionResult(out.url, len(listed), source.bytes - before, size, notes)


def _chunks(
    source: CheckpointSource,
    listed: dict[str, PlacedTensor],
    file: list[OutputTensor],
    tell: ConversionProgress,
) -> Iterator[bytes | memoryview]:
    yield header(file)
    for tensor in file:
        for chunk in export_bytes(source, listed[tensor.name], tensor.dtype):
            yield chunk
            tell(len(chunk))


def _json(tree: dict[str, Any]) -> bytes:
    return (json.dumps(tree, indent=2) + "\n").encode()


def _whole(source: CheckpointSource, listed: dict[str, PlacedTensor]) -> None:
    """Refuse a checkpoint that lacks a tensor of its model, or has it in another shape."""
    where = f"{source.store.url.rstrip('/')}/{source.commit.manifest}"
    for placed in listed.values():
        tensor = source.tensors.get(placed.name)
        if tensor is None:
            raise UserError(f"{where} has no {placed.name}, which its model has; name another checkpoint")
        if tensor.shape != placed.box.whole:
            raise UserError(
                f"{where}: {placed.name} is {list(tensor.shape)} and its model has {list(placed.box.whole)}; name another "
                "checkpoint"
            )


def _left(source: CheckpointSource, listed: dict[str, PlacedTensor]) -> tuple[str, ...]:
    """What stays behind, but for the optimizer's slots."""
    taken = {placed.name for placed in listed.values()}
    left = sorted(name for name in source.tensors if name not in taken and "/" not in name)
    kinds = sorted({name.split(".feed.")[-1] for name in left})
    notes = ["the optimizer's state stays behind"] if any("/" in name for name in source.tensors) else []
    return (*notes, f"no part of the files: {', '.join(kinds)}") if kinds else tuple(notes)


def _remembered(source: CheckpointSource) -> dict[str, Any]:
    """What `config.json` had when the weights were imported, and the longest context that was trained on."""
    settings: dict[str, Any] = {}
    data = source.manifest.facts.get("fingerprint", {}).get("data", {})
    for entry in source.manifest.facts.get("lineage", []):
        settings |= entry.get("config", {}) if isinstance(entry, dict) else {}
    sequence = data.get("sequence", 0) if isinstance(data, dict) else 0
    if sequence > settings.get("max_position_embeddings", 4096):
        settings["max_position_embeddings"] = sequence
    return settings


# ---- import ----


def import_hf(
    path: StoreLike,
    out: StoreLike,
    run: str,
    kind: Kind = "adamw",
    moments: Moments = "fp32",
    model: ModelConfig | None = None,
) -> ConversionJob:
    """A model's published files as a checkpoint of step 0, from which training continues.

    Parameters are fp32, as masters are; the optimizer's slots are zeros, as before its first step.

    Args:
        path: folder with `config.json` and `.safetensors` files.
        out: folder of the checkpoint, which belongs to `run`.
        kind: optimizer that training continues with, by which its slots are made.
        moments: their precision.
        model: that training continues with, where it isn't as the files say: what they don't fix, as the balancing of
            experts, is taken from it.

    Raises:
        UserError: where the family or a setting isn't known, a tensor is missing, of another shape or unknown, or `model`
            isn't the files'.
    """
    where = f"{path.url.rstrip('/')}/config.json"
    try:
        tree = from_json(path.read("config.json"))
        if not isinstance(tree, dict):
            raise ValueError("no object")
    except FileNotFoundError:
        raise UserError(f"{where} isn't there; name the folder of a Hugging Face model") from None
    except ValueError as error:
        raise UserError(f"{where} is not a JSON: {error}; copy it again") from None
    hf_config.family_in(tree, where)
    files = SafetensorsFolder(path)
    name = str(tree.get("_name_or_path") or path.url.rstrip("/").rsplit("/", 1)[-1])
    described = hf_config.model_in(tree, where, name, _predictions(tree, files))
    model = described if model is None else _same(model, described, where)
    interleaved = tree.get("rope_interleave") is not False
    placed = families.tensors(described, interleaved)
    extra = _unknown(files, placed, described, path.url)
    lineage = {
        "how": "import", "format": "hugging face", "from": path.url,
        "config": {key: tree[key] for key in _KEPT if tree.get(key) is not None},
    }  # fmt: skip
    small = facts(fingerprint(model, kind, moments), [lineage])
    notes = [f"no part of the model: {', '.join(extra[:3])}"] if extra else []
    return imported(
        files, placed, ImportDestination(out, run, 0, small), notes=notes, fill=(model, kind, moments)
    )


def _predictions(tree: dict[str, Any], files: SafetensorsFolder) -> int:
    """Layers of multi-token prediction that are in the files: some are published without."""
    layers, count = tree.get("num_hidden_layers"), 0
    if not isinstance(layers, int):
        return 0
    there = set(files.names())
    while f"model.layers.{layers + count}.eh_proj.weight" in there:
        count += 1
    return count


def _same(model: ModelConfig, described: ModelConfig, where: str) -> ModelConfig:
    """The model that was asked for, which must compute what the files' does."""
    wanted, theirs = (flat(one.model_dump(mode="json")) for one in (model, described))
    for name in wanted:
        if wanted[name] != theirs[name] and name not in _LOOSE:
            raise UserError(
                f"model.{name}={wanted[name]} isn't that of {where}, {theirs[name]}; type model.{name}={theirs[name]}"
            )
    return model


def _unknown(files: SafetensorsFolder, placed: list[PlacedTensor], model: ModelConfig, url: str) -> list[str]:
    """Names in the files that are not part of the model, but harmless; what isn't harmless is refused."""
    known = {one.foreign for one in placed}
    for name in files.names():
        if name in known and files.dtype(name) not in FLOATS:
            raise UserError(
                f"{url}: {name} is {files.dtype(name)}, and quantised weights aren't read; convert them to bf16 first"
            )
    extra = [name for name in files.names() if name not in known]
    copies = ("rotary_emb.inv_freq", "shared_head.head.weight", "embed_tokens.weight")
    odd = [
        name
        for name in extra
        if not name.endswith(copies) and not (model.tie_embeddings and name == "lm_head.weight")
    ]
    if odd:
        raise UserError(
            f"{url} holds {odd[0]}, which a model of its config.json hasn't ({len(odd)} such tensors); it would be lost: "
            "correct config.json"
        )
    return extra
