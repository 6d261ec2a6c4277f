"""A `config.json` of Hugging Face, and what of it has no counterpart here."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

from configs.errors import UserError, shortened
from configs.model import MOST_PARTS
from configs.section import MOST_WHOLE

Tree = dict[str, Any]

_WITHOUT_EFFECT = frozenset({
    "architectures", "model_type", "auto_map", "_name_or_path", "name_or_path", "transformers_version", "dtype",
    "torch_dtype", "use_cache", "return_dict", "output_attentions", "output_hidden_states", "output_router_logits",
    "is_encoder_decoder", "id2label", "label2id", "problem_type", "chunk_size_feed_forward", "bos_token_id",
    "eos_token_id", "pad_token_id", "max_position_embeddings", "original_max_position_embeddings",
    "initial_context_length", "experts_per_token", "pretraining_tp", "ep_size", "max_window_layers", "layer_types",
    "rope_interleave", "qk_head_dim", "attn_implementation", "_attn_implementation", "experts_implementation",
    "_experts_implementation", "no_rope_layer_interval", "floor_scale", "attn_scale", "rope_ratio", "seq_aux",
    "aux_loss_alpha", "for_llm_compressor", "image_token_index", "boi_token_index",
    "eoi_token_index", "vision_feature_layer", "vision_feature_select_strategy", "multimodal_projector_bias",
    "projector_hidden_act", "spatial_merge_size",
})  # fmt: skip
"""Keys that change neither shape nor arithmetic in training, or that another key repeats."""


@dataclass(frozen=True)
class LeftOut:
    """One thing that the published model has and the model that is read from its file doesn't."""

    setting: str
    """As the file has it: `attention_bias=True`."""
    here: str
    """What stands in its place."""

    def __str__(self) -> str:
        return f"{self.setting} (here: {self.here})"


class ConfigFile:
    """A `config.json` that remembers which keys were read, and complains by the key's name."""

    def __init__(self, tree: Tree, where: str) -> None:
        inner = tree.get("text_config")
        self.where = where
        self.differences: list[LeftOut] = []
        if isinstance(inner, dict):  # a model of text and images: the decoder's settings lie one level deeper
            outer = {key: value for key, value in tree.items() if key not in ("text_config", "vision_config")}
            self.tree: Tree = outer | inner
            self.differences.append(LeftOut("vision_config", "the text model alone"))
        else:
            self.tree = tree
        self._read: set[str] = set()
        self.defaults: Tree = {}
        """What the family's own class has for a key that isn't there."""

    def get(self, name: str, default: Any = None) -> Any:
        """A value, or the family's own where the key is missing; `default` where that is null or there is none."""
        self._read.add(name)
        value = self.tree.get(name, self.defaults.get(name))
        return default if value is None else value

    def whole(self, *names: str, default: int | None = None) -> int:
        """A whole number of at least 0, by the first of these names that is there."""
        for name in names:
            value = self.get(name)
            if value is not None:
                if not isinstance(value, int) or isinstance(value, bool) or value < 0:
                    raise UserError(f"{self.where}: {name}={value!r} is not a whole number; correct the file")
                self._bounded(name, value)
                return value
        if default is None:
            raise UserError(f"{self.where} has no {names[0]}; add it")
        return default

    def layers(self) -> int:
        """The number of layers, which are gone through one by one."""
        value = self.whole("num_hidden_layers")
        if value > MOST_PARTS:
            raise UserError(
                f"{self.where}: num_hidden_layers={value} is above {MOST_PARTS}; correct the file"
            )
        return value

    def part(self, name: str) -> ConfigFile:
        """What lies below a key, as a file of its own; empty where the key is missing."""
        value = self.get(name) or {}
        if not isinstance(value, dict):
            raise UserError(f"{self.where}: {name}={value!r} is not an object; correct the file")
        return ConfigFile(value, f"{self.where}: {name}")

    def period(self, name: str) -> int:
        """A whole number above 0, by default 1: every how manyth."""
        value = self.whole(name, default=1)
        if not value:
            raise UserError(f"{self.where}: {name}=0 is not above 0; correct the file")
        return value

    def numbers(self, name: str) -> list[int] | None:
        """A list of whole numbers; None where it is missing."""
        value = self.get(name)
        if value is not None and not (
            isinstance(value, list) and all(type(one) is int and one >= 0 for one in value)
        ):
            raise UserError(
                f"{self.where}: {name}={value!r} is not a list of whole numbers; correct the file"
            )
        return value

    def number(self, name: str, default: float | None = None) -> float:
        """A number; it has to be there where there is no default."""
        value = self.get(name, default)
        if value is None:
            raise UserError(f"{self.where} has no {name}; add it")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise UserError(f"{self.where}: {name}={value!r} is not a number; correct the file")
        self._bounded(name, value)
        return float(value)

    def _bounded(self, name: str, value: float) -> None:
        """Refuse a whole number that has no float, and what is infinite or not a number."""
        if not (isinstance(value, float) or abs(value) <= MOST_WHOLE) or not math.isfinite(value):
            raise UserError(
                f"{self.where}: {name}={shortened(value, 40)} is out of range; correct the file: type a number up to "
                f"{MOST_WHOLE}"
            )

    def only(self, name: str, *allowed: Any, here: str = "") -> None:
        """Note a setting that differs from what this model computes; a missing one is as good as the first."""
        value = self.get(name, allowed[0])
        if value not in allowed:
            self.differences.append(LeftOut(f"{name}={value!r}", here or " or ".join(map(repr, allowed))))

    def differs(self, what: str, here: str) -> None:
        """Note something that the family always has."""
        self.differences.append(LeftOut(what, here))

    def unread(self) -> list[str]:
        """`key=value` of what nobody read, but for what is off or has no effect."""
        rest = {k: v for k, v in self.tree.items() if v and k not in self._read and k not in _WITHOUT_EFFECT}
        texts = {k: json.dumps(v) for k, v in rest.items()}
        return [f"{key}={text if len(text) <= 60 else text[:57] + '...'}" for key, text in texts.items()]
