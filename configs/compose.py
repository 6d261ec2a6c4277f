"""From presets, a user's file and overrides to one validated `RunConfig`.

Hydra composes experiments, nothing else: no working directory, no logging, no `hydra.main`. Values (`train.steps=200`)
are set here, since Hydra's override grammar refuses globs, commas and URLs that are not quoted. Later wins: presets,
experiment, the user's file, the command line.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from configs import wording
from configs.errors import UserError, nearest
from configs.hugging_face.read import is_path, looks_like_one, model_section
from configs.schema import RunConfig
from configs.timeouts import Timeouts

ROOT = Path(__file__).resolve().parent
Tree = dict[str, Any]

_SECRET = re.compile(r"(key|token|secret|password)s?$", re.IGNORECASE)
_CREDENTIALS = re.compile(r"://[^/@\s]+:[^/@\s]+@")
# The C parser is ten times as fast, where it is built.
_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


def choices(group: str) -> list[str]:
    """Names of the presets in one group (`model`, `hardware`, …), sorted."""
    return sorted(path.stem for path in (ROOT / group).glob("*.yaml"))


def groups() -> list[str]:
    """Names of the preset groups, sorted."""
    return sorted({path.parent.name for path in ROOT.glob("*/*.yaml")})


def compose(overrides: Sequence[str], file: Path | None = None) -> RunConfig:
    """The configuration that `overrides` (`group=preset` or `dotted.field=value`) and `file` describe.

    `file` is YAML with any part of the tree; a preset's name in place of a section chooses that preset.

    Raises:
        UserError: for the first unknown key, preset or unreadable file, or all invalid values, in one line.
    """
    chosen: dict[str, str | Tree] = {}
    tree: Tree = {}
    known = groups()
    if file is not None:
        tree = _read(file)
        if looks_like_one(tree):
            tree = {"model": model_section(file)}
        for group in [name for name, value in tree.items() if name in known and isinstance(value, str)]:
            chosen[group] = _choice(group, tree.pop(group))
        _check_keys(tree, file)
    values: list[tuple[str, str]] = []
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise UserError(
                f"'{override}' is not an override; type field=value, for example train.steps=200 or model=demo"
            )
        if key in known:
            chosen[key] = _choice(key, value)
        else:
            values.append((key, value))
    composed = _presets(chosen)
    _merge(composed, tree)
    for key, value in values:
        _assign(composed, key, value)
    return validated(composed)


def amend(config: RunConfig, overrides: Sequence[str]) -> RunConfig:
    """A whole configuration with `overrides` set in it, as in `compose`; a preset replaces its section.

    Timeouts that follow from `resilience.timeouts.patience` follow the new one.

    Raises:
        UserError: as `compose`.
    """
    tree = config.model_dump(mode="json")
    timeouts = tree["resilience"]["timeouts"]
    derived = Timeouts(patience=timeouts["patience"]).model_dump()
    known, values, chosen = groups(), list[tuple[str, str]](), dict[str, str | Tree]()
    for override in overrides:
        key, separator, value = override.partition("=")
        if not separator:
            raise UserError(f"'{override}' is not an override; type field=value, for example parallel.ep=4")
        if key in known:
            chosen[key] = _choice(key, value)
        else:
            values.append((key, value))
    if chosen:
        composed = _presets(chosen)
        tree |= {group: composed[group] for group in chosen if group in composed}
    for key, value in values:
        if key == "resilience.timeouts.patience":
            tree["resilience"]["timeouts"] = {k: v for k, v in timeouts.items() if v != derived[k]}
        _assign(tree, key, value)
    return validated(tree)


def load(path: Path) -> RunConfig:
    """A configuration that `dump` wrote.

    Raises:
        UserError: where the file is missing, malformed or not a whole configuration.
    """
    tree = _read(path)
    if isinstance(hardware := tree.get("hardware"), dict):
        hardware.pop("source", None)  # of runs that were saved while a device had one for all its numbers
    _check_keys(tree, path)
    return validated(tree)


def dump(config: RunConfig) -> str:
    """The whole configuration as YAML; `load` gives an equal one back."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False, allow_unicode=True, width=110)


def validated(tree: Tree) -> RunConfig:
    """`tree` as a `RunConfig`.

    Raises:
        UserError: every invalid field in one line, each with its value, the reason and what to type.
    """
    try:
        return RunConfig.model_validate(tree)
    except ValidationError as error:
        raise UserError(wording.explain(error)) from None


def _presets(chosen: dict[str, str | Tree]) -> Tree:
    """The tree of the chosen presets, with sections that were read from elsewhere in their place.

    Without an experiment it is one file for each group, side by side; an experiment, which overrides other groups' choices,
    is Hydra's to compose. Hydra takes half a `plan`'s time, so it is loaded for experiments alone.
    """
    if "experiment" in chosen:
        return _composed(chosen)
    root = _read(ROOT / "config.yaml")
    tree: Tree = {}
    for entry in root.pop("defaults"):
        for group, preset in entry.items() if isinstance(entry, dict) else ():
            taken = chosen.get(group, preset)
            if taken is not None:
                tree[group] = _read(ROOT / group / f"{taken}.yaml") if isinstance(taken, str) else taken
    return tree | root


def _composed(chosen: dict[str, str | Tree]) -> Tree:
    """The same by Hydra."""
    from hydra import compose as hydra_compose
    from hydra import initialize_config_dir
    from omegaconf import OmegaConf

    words = [f"{group}={name}" for group, name in chosen.items() if isinstance(name, str)]
    with initialize_config_dir(config_dir=str(ROOT), version_base="1.3"):
        tree = hydra_compose("config", words)
    plain = OmegaConf.to_container(tree, resolve=True)
    assert isinstance(plain, dict)
    read = {group: value for group, value in chosen.items() if not isinstance(value, str)}
    return {str(key): value for key, value in plain.items()} | read


def _choice(group: str, name: str) -> str | Tree:
    """A preset's name, or the section that a model's `config.json` gives."""
    if group == "model" and name and is_path(name):
        return model_section(Path(name).expanduser())
    known = choices(group)
    if not name:
        raise UserError(f"{group}= has no value; use one of {', '.join(known)}, or leave it out")
    if name not in known:
        more = ", or the path of a Hugging Face config.json" if group == "model" else ""
        raise UserError(
            f"{group}={name} is not a preset{nearest(name, known)}; use one of {', '.join(known)}{more}"
        )
    return name


def _read(path: Path) -> Tree:
    """The mapping in a YAML file; an empty file is an empty mapping."""
    try:
        tree = yaml.load(path.read_text(encoding="utf-8"), Loader=_LOADER)
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "not UTF-8 text"
        raise UserError(f"cannot read configuration {path}: {reason}; name an existing YAML file") from None
    except yaml.MarkedYAMLError as error:
        line = error.problem_mark.line + 1 if error.problem_mark else 1
        raise UserError(
            f"{path}:{line}: not valid YAML: {error.problem or error}; correct that line"
        ) from None
    except yaml.YAMLError as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: not valid YAML: {reason}; save it as plain UTF-8 text") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds a {type(tree).__name__}, not sections; write 'train: {{steps: 200}}'")
    return tree


def _check_keys(tree: Tree, source: Path) -> None:
    """Refuse unknown keys, secrets and truth values given for numbers anywhere in a user's tree."""
    for path, value in _leaves(tree):
        try:
            _check_key(path, str(value))
        except UserError as error:
            raise UserError(f"{source}: {error}") from None
        if isinstance(value, bool) and not wording.takes_bool(path):
            raise UserError(f"{source}: {wording.wrong_type(path, str(value).lower())}")


def _check_key(path: str, value: str) -> None:
    """Refuse a key that the schema lacks, and anything that looks like a secret, without repeating it."""
    if wording.known(path):
        if _CREDENTIALS.search(value):
            raise UserError(
                f"{path} holds a password in its URL, and configurations are saved and shared; "
                "leave it out of the URL and set the storage's own environment variables"
            )
        return
    if _SECRET.search(path):
        raise UserError(
            f"{path} looks like a secret, and configurations are saved and shared; "
            "set it in the environment instead: export WANDB_API_KEY=..."
        )
    raise UserError(wording.unknown(path, groups()))


def _leaves(tree: Tree, prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{path}.")
        else:
            yield path, value


def _merge(base: Tree, over: Tree) -> None:
    """Set the values of `over` in `base`, section by section."""
    for key, value in over.items():
        if isinstance(value, dict) and isinstance(base.get(key), dict):
            _merge(base[key], value)
        elif value is not None or not isinstance(base.get(key), dict):  # an empty section changes nothing
            base[key] = value


def _assign(tree: Tree, path: str, text: str) -> None:
    """Set one dotted field to the value that `text` spells."""
    _check_key(path, text)
    if wording.is_section(path):
        raise UserError(
            f"{path}={text} gives a value to a section; set one of its fields: {wording.fields(path)}"
        )
    if not text:
        raise UserError(f"{path}= has no value; type e.g. {wording.example(path)}, or leave it out")
    *sections, field = path.split(".")
    for section in sections:
        tree = tree.setdefault(section, {})
    tree[field] = _value(path, text)


def _value(path: str, text: str) -> Any:
    """Text as the schema wants it: as typed, but `null`, and YAML where the field is not a plain scalar."""
    if text in ("null", "None", "~"):
        return None
    if not wording.is_structured(path):
        return text
    try:
        return yaml.load(text, Loader=_LOADER)
    except yaml.YAMLError:
        return text  # the schema's own check says what is wrong
