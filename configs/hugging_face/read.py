"""Reads a model from the `config.json` of a Hugging Face model, for `model=path/config.json` and for imports.

What a file holds and `ModelConfig` can't express is kept as a `LeftOut`: `plan` and `size` name it; an import
refuses it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from pydantic import ValidationError

from configs.errors import UserError, from_json, nearest
from configs.hugging_face.families import ALIASES, ARCHITECTURES, DEFAULTS, READERS, common
from configs.hugging_face.file import ConfigFile, LeftOut, Tree
from configs.model import ModelConfig


@dataclass(frozen=True)
class ReadModel:
    """A model as far as a `config.json` gives it."""

    model: ModelConfig
    differences: tuple[LeftOut, ...]
    """Known, and not computed here."""
    unknown: tuple[str, ...]
    """`key=value` of what this reader doesn't know."""

    def section(self) -> Tree:
        """The `model` section of a configuration, which names what was left out."""
        left_out = [str(left) for left in self.differences]
        left_out += [f"{text} (unknown key)" for text in self.unknown]
        return self.model.model_dump(mode="json") | {"left_out": left_out}


def is_path(value: str) -> bool:
    """Whether the value of `model=` names a file or folder rather than a preset."""
    return "/" in value or value.endswith(".json") or Path(value).is_dir()


def looks_like_one(tree: Tree) -> bool:
    """Whether a file holds a Hugging Face model rather than sections of a configuration."""
    return "model" not in tree and ("architectures" in tree or "model_type" in tree)


def is_model_file(path: Path) -> bool:
    """Whether `path` is the `config.json` of a model; false too where it can't be read as JSON."""
    try:
        tree = from_json(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return isinstance(tree, dict) and looks_like_one(tree)


def left_out(model: ModelConfig) -> list[str]:
    """A line that names what the model's `config.json` has and the model lacks; none where nothing is."""
    if not model.left_out:
        return []
    return [
        f"model {model.name} is trained without what else its config.json has: {'; '.join(model.left_out)}"
    ]


def model_section(path: Path) -> Tree:
    """The `model` section for a `config.json`, or for the folder that holds one.

    Raises:
        UserError: where it can't be read, its family isn't known, or a size is missing or can't be expressed.
    """
    file = path / "config.json" if path.is_dir() else path
    try:
        tree = from_json(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"model={file}: {error.strerror}; name a preset or a config.json") from None
    except ValueError as error:
        raise UserError(
            f"model={path}: not valid JSON: {error}; name a config.json of Hugging Face"
        ) from None
    if not isinstance(tree, dict):
        raise UserError(f"model={path}: holds a {type(tree).__name__}; a config.json holds an object")
    return read(tree, str(file), name_of(file)).section()


def name_of(file: Path) -> str:
    """A name for the model, of letters that a run id may have: the folder's for `config.json`, else the file's own."""
    name = file.resolve().parent.name if file.name == "config.json" else file.stem
    return re.sub(r"[^A-Za-z0-9._-]+", "_", name).strip("._-") or "model"


def read(tree: Tree, where: str, name: str, predictions: int | None = None) -> ReadModel:
    """The model of a `config.json`.

    Args:
        where: its path, as messages name it.
        name: of the model.
        predictions: layers of multi-token prediction; by default as many as the file says.

    Raises:
        UserError: where the family isn't known, or a size is missing, wrong or can't be expressed.
    """
    config = ConfigFile(tree, where)
    family = _family(config)
    config.defaults = DEFAULTS.get(family, {})
    fields = common(config, name)
    own = READERS[family](config)
    config.only("attention_dropout", 0.0)
    depth = config.whole("num_nextn_predict_layers", default=0)
    fields |= own | {"mtp_layers": depth if predictions is None else predictions}
    try:
        model = ModelConfig(**fields)
    except ValidationError as error:
        reasons = [
            str(detail["ctx"]["error"])
            if detail["type"] == "value_error"
            else f"model.{'.'.join(map(str, detail['loc']))}={detail['input']}: {detail['msg'].lower()}"
            for detail in error.errors(include_url=False)
        ]
        raise UserError(f"{where}: {'; '.join(reasons)}; correct the file") from None
    return ReadModel(model, tuple(config.differences), tuple(config.unread()))


def _family(config: ConfigFile) -> str:
    names = config.get("architectures") or []
    kind = config.get("model_type")
    first = names[0] if isinstance(names, list) and names else None
    for candidate in (kind, ARCHITECTURES.get(str(first))):
        candidate = ALIASES.get(str(candidate), candidate)
        if isinstance(candidate, str) and candidate in READERS:  # a file may hold anything
            return candidate
    typed = first or kind
    raise UserError(
        f"{config.where}: architecture {typed!r} is not supported{nearest(str(typed), ARCHITECTURES)}; write its shape as "
        f"YAML for --config instead, as configs/model/ has them. Supported: {', '.join(sorted(READERS))}"
    )
