"""Import from DeepSpeed: checkpoints of ZeRO 1 and 2, with experts of `deepspeed.moe` or without, and universal folders.

ZeRO keeps a rank's share of each group of parameters as one flat tensor; `param_slice_mappings` says which range of it
is of which parameter. The ranges of a parameter follow each other over the ranks that share it: all of them, or for an
expert those that hold it, every `ep`-th rank. Its file names the experts by their place on the rank.

Sources: DeepSpeed 0.19, runtime/zero/stage_1_and_2.py (state_dict), runtime/engine.py (_save_moe_checkpoint) and
checkpoint/ds_to_universal.py.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.errors import UserError
from faulttol.checkpoint.store import StoreLike
from faulttol.convert.assemble import Fill, ImportDestination, imported
from faulttol.convert.facts import COUNT, facts, fingerprint
from faulttol.convert.job import ConversionJob
from faulttol.convert.names import KEEP, NameRule, place
from faulttol.convert.pickles import PickledTensors, load

if TYPE_CHECKING:
    import torch

_OPTIM = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_(\d+)_optim_states\.pt")
_MODEL = re.compile(r"mp_rank_(\d+)_model_states\.pt")
_ZERO3 = re.compile(r"zero_pp_rank_\d+_mp_rank_\d+_model_states\.pt")
_EXPERT_FILE = re.compile(r"layer_(\d+)_expert_(\d+)_mp_rank_(\d+)_model_states\.pt")
_EXPERT = re.compile(r"(.*\.deepspeed_experts\.)(\d+)(\..*)")
SLOTS = ("exp_avg", "exp_avg_sq")
_COMPARED = 256
"""Elements at a parameter's beginning by which its masters are recognised as those of its weights."""


def import_zero(
    path: Path,
    out: StoreLike,
    run: str,
    rules: Sequence[NameRule] = KEEP,
    tag: str | None = None,
    trust: bool = False,
    fill: Fill | None = None,
) -> ConversionJob:
    """A checkpoint that `engine.save_checkpoint` wrote under ZeRO 1 or 2, or a universal folder made of one.

    Parameters are fp32 masters, beside them `exp_avg` and `exp_avg_sq`; buffers keep their dtype. Experts have names with
    their place in the layer (`….deepspeed_experts.5.…`), which `rules` put together as they like.

    Args:
        path: the folder that was saved to, or that of a tag in it.
        rules: names here, by names there.
        tag: None: the newest.
        trust: whether files that are pickles in earnest may be read; those that DeepSpeed itself writes aren't.
        fill: model, optimizer and moments that training continues with, for what it wants besides.

    Raises:
        UserError: where it is no such folder, is split over tensor-parallel ranks, is of ZeRO 3 or without ZeRO, or isn't
            whole.
    """
    folder = _tagged(path, tag)
    tensors = PickledTensors()
    read = _universal if (folder / "zero").is_dir() else _sharded
    try:
        step = read(folder, tensors, trust)
    except KeyError as error:
        raise UserError(
            f"{folder} has no {error.args[0]}, which DeepSpeed 0.19 writes; save with that version, or make a universal "
            "folder of it"
        ) from None
    if step is not None and rules is not KEEP and any(rule.to == COUNT for rule in rules):
        raise UserError(
            f"the map of names has a rule to {COUNT}, which is read from the optimizer; leave it out"
        )
    placed, left = place(tensors, rules, [name for name in tensors.names() if name != COUNT])
    if COUNT in tensors.names():
        placed += place(tensors, KEEP, [COUNT])[0]
    lineage = [{"how": "import", "format": "deepspeed", "from": str(folder)}]
    notes = [f"left out by the map of names: {len(left)} tensors"] if left else []
    small = facts(fingerprint(*fill) if fill is not None else {}, lineage)
    return imported(tensors, placed, ImportDestination(out, run, step or 0, small), notes=notes, fill=fill)


def _tagged(path: Path, tag: str | None) -> Path:
    latest = path / "latest"
    if tag is None and latest.is_file():
        tag = latest.read_text().strip()
    if tag is None and latest.with_name("latest_universal").is_file():
        tag = latest.with_name("latest_universal").read_text().strip()
    folder = path / tag if tag else path
    if not folder.is_dir():
        raise UserError(
            f"{folder} isn't there; name the folder that DeepSpeed saved to, or type a tag that is in it"
        )
    return folder


# ---- ZeRO's own files ----


def _sharded(folder: Path, tensors: PickledTensors, trust: bool) -> int | None:
    """Fill `tensors` from the files of a ZeRO 1 or 2 checkpoint: the count of steps."""
    names = sorted(entry.name for entry in folder.iterdir())
    _refuse_others(folder, names)
    ranks = sorted(int(match[1]) for name in names if (match := _OPTIM.fullmatch(name)))
    twice = [rank for rank, other in pairwise(ranks) if rank == other]
    if twice:
        raise UserError(
            f"{folder} has the optimizer state of rank {twice[0]} twice, as of two saves; remove one of them"
        )
    if ranks != list(range(len(ranks))):
        missing = sorted(set(range(ranks[-1])) - set(ranks))
        raise UserError(f"{folder} has no optimizer state of rank {missing[0]}; complete the files")
    states = [
        load(folder / name, trust)["optimizer_state_dict"]
        for rank in ranks
        for name in names
        if (match := _OPTIM.fullmatch(name)) and int(match[1]) == rank
    ]
    worlds = {
        _sharing(state, group) for state in states for group in range(len(state["param_slice_mappings"]))
    }
    if max(worlds, default=len(ranks)) != len(ranks):
        raise UserError(
            f"{folder} has the optimizer state of {len(ranks)} ranks of {max(worlds)}; complete the files"
        )
    module = load(folder / next(n for n in names if _MODEL.fullmatch(n)), trust)
    if module.get("ds_autoep_layers"):
        raise UserError(
            f"{folder} has experts of DeepSpeed's AutoEP, which aren't read; make a universal folder of it"
        )
    if module["module"] is None:
        raise UserError(
            f"{folder} is of a pipeline, whose layers have files of their own, which aren't read; make a universal folder "
            "of it"
        )
    weights = dict(module["module"]) | _experts(folder, names, trust)
    owners = _owners(states)
    for name, fragments in _fragments(states, owners).items():
        if name not in weights:
            raise UserError(
                f"{folder}: no file of the model has {name}, which the optimizer has; complete the files"
            )
        shape = tuple(weights[name].shape)
        for slot, values in fragments.items():
            tensors.add(f"{name}/{slot}" if slot else name, shape, values)
        _same(folder, name, tensors, weights[name])
    for name, values in weights.items():
        if name not in tensors.names():  # buffers, and what wasn't trained
            tensors.add(name, tuple(values.shape), [values])
    step = _steps(states)
    if step is not None:
        import torch

        tensors.add(COUNT, (), [torch.tensor(float(step))])
    return step


def _refuse_others(folder: Path, names: Sequence[str]) -> None:
    if any(_ZERO3.fullmatch(name) for name in names):
        raise UserError(
            f"{folder} is of ZeRO 3, which isn't read; save under ZeRO 1 or 2, or make a universal folder of it"
        )
    models = [match for name in names if (match := _MODEL.fullmatch(name))]
    if not models:
        raise UserError(
            f"{folder} holds no mp_rank_00_model_states.pt; name the folder that DeepSpeed saved to"
        )
    if len(models) > 1:
        raise UserError(
            f"{folder} is split over {len(models)} tensor-parallel ranks, which isn't read; make a universal folder of it"
        )
    if not any(_OPTIM.fullmatch(name) for name in names):
        raise UserError(
            f"{folder} has no optimizer states of ZeRO; save under ZeRO 1 or 2, whose files have fp32 masters"
        )


def _sharing(state: Any, group: int) -> int:
    """Ranks that share a group of parameters."""
    counts = state["partition_count"]
    return int(counts[group] if isinstance(counts, list) else counts)


def _experts(folder: Path, names: Sequence[str], trust: bool) -> dict[str, Any]:
    """Weights of all experts, by names with their place in the layer."""
    weights: dict[str, Any] = {}
    places: dict[int, list[int]] = {}
    for name in names:
        match = _EXPERT_FILE.fullmatch(name)
        if match:
            weights |= load(folder / name, trust)
            places.setdefault(int(match[1]), []).append(int(match[2]))
    for layer, there in places.items():
        missing = sorted(set(range(max(there) + 1)) - set(there))
        if missing:
            raise UserError(
                f"{folder} has no file of expert {missing[0]} of MoE layer {layer}; complete the files"
            )
    return weights


def _owners(states: Sequence[Any]) -> dict[str, tuple[int, int]]:
    """By prefix of a layer's experts: ranks of an expert group, and experts that each of them holds."""
    local: dict[str, int] = {}
    sharing: dict[str, int] = {}
    for state in states:
        for group, names in enumerate(state["param_slice_mappings"]):
            for name in names:
                match = _EXPERT.fullmatch(name)
                if match:
                    local[match[1]] = max(local.get(match[1], 0), int(match[2]) + 1)
                    sharing[match[1]] = _sharing(state, group)
    return {prefix: (len(states) // sharing[prefix], count) for prefix, count in local.items()}


def _fragments(
    states: Sequence[Any], owners: dict[str, tuple[int, int]]
) -> dict[str, dict[str, list[torch.Tensor]]]:
    """By parameter and slot (none: the master), the flat ranges of all ranks in their order."""
    ranges: dict[str, dict[str, list[torch.Tensor]]] = {}
    for rank, state in enumerate(states):
        base = state["base_optimizer_state"]
        slots = base["state"] if isinstance(base, dict) else dict(enumerate(base))
        for group, names in enumerate(state["param_slice_mappings"]):
            flats = {"": state["single_partition_of_fp32_groups"][group]}
            flats |= {slot: slots[group][slot] for slot in SLOTS if group in slots and slot in slots[group]}
            for local, address in names.items():
                name = local
                match = _EXPERT.fullmatch(local)
                if match:
                    size, count = owners[match[1]]
                    name = f"{match[1]}{rank % size * count + int(match[2])}{match[3]}"
                for slot, flat in flats.items():
                    part = flat[address.start : address.start + address.numel]
                    ranges.setdefault(name, {}).setdefault(slot, []).append(part)
    return ranges


def _same(folder: Path, name: str, tensors: PickledTensors, weights: torch.Tensor) -> None:
    """Refuse masters that aren't those of the weights: ranks may have been put together in another way."""
    import torch

    count = min(_COMPARED, weights.numel())
    master = torch.from_numpy(tensors.read(name, 0, count).view(np.float32))
    if not torch.equal(master.to(weights.dtype), weights.reshape(-1)[:count]):
        raise UserError(
            f"{folder}: the optimizer's {name} isn't that of the model's weights; files of two checkpoints are mixed, or "
            "the ranks' order isn't DeepSpeed's usual one"
        )


def _steps(states: Sequence[Any]) -> int | None:
    """The count of steps that have moved the weights, which all ranks and groups have alike."""
    steps: set[int] = set()
    for state in states:
        base = state["base_optimizer_state"]
        slots = list(base["state"].values()) if isinstance(base, dict) else base
        steps |= {int(slot["step"]) for slot in slots if "step" in slot}
        if isinstance(base, dict):
            steps |= {int(group["step"]) for group in base["param_groups"] if "step" in group}
        steps |= {int(state[key]) for key in ("base_optimizer_state_step",) if key in state}
    if len(steps) > 1:
        raise UserError(
            f"the ranks' optimizers count different steps ({sorted(steps)}): files of two checkpoints are mixed"
        )
    return steps.pop() if steps else None


# ---- universal folders ----


def _universal(folder: Path, tensors: PickledTensors, trust: bool) -> int | None:
    """Fill `tensors` from a universal folder: the count of steps. A folder per parameter, a file per slot."""
    import torch

    steps: set[int] = set()
    for entry in sorted(path for path in (folder / "zero").iterdir() if path.is_dir()):
        if not (entry / "fp32.pt").is_file():
            raise UserError(f"{entry} has no fp32.pt; complete the universal folder")
        for slot in ("fp32", *SLOTS):
            if (entry / f"{slot}.pt").is_file():
                values = _param(load(entry / f"{slot}.pt", trust))
                name = entry.name if slot == "fp32" else f"{entry.name}/{slot}"
                tensors.add(name, tuple(values.shape), [values])
        if (entry / "step.pt").is_file():
            steps.add(int(_param(load(entry / "step.pt", trust))))
    if len(steps) > 1:
        raise UserError(
            f"{folder}: parameters count different steps ({sorted(steps)}): two checkpoints are mixed"
        )
    if steps:
        tensors.add(COUNT, (), [torch.tensor(float(next(iter(steps))))])
    return next(iter(steps), None)


def _param(held: Any) -> Any:
    """What a file holds: the tensor itself, or with notes on how it was merged."""
    return held["param"] if isinstance(held, dict) else held
