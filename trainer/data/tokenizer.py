"""Text to token ids: UTF-8 bytes as they are, or a Hugging Face `tokenizer.json`."""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from configs.errors import UserError, from_json, nearest

BYTE_SEPARATOR = 0
"""Token between documents under `data.tokenizer=bytes`; no text holds a zero byte."""
KNOWN_END_TOKENS = (
    "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|eos|>", "[EOS]", "<｜end▁of▁sentence｜>",
    "<|end▁of▁sentence|>", "<|endofdocument|>",
)  # fmt: skip
"""Tokens between documents as tokenizers name them, where no `tokenizer_config.json` beside says which."""


class Tokenizer(Protocol):
    """Turns texts into ids. Can be sent to another process."""

    size: int
    """Ids are below it."""
    separator: int
    """Id between documents; no text gives it."""
    digest: str
    """Of all that the ids depend on."""
    notes: list[str]
    """What was changed or chosen, one line each."""

    def encode(self, texts: Sequence[bytes], counts: Counter[str]) -> list[np.ndarray]:
        """Ids of each text, without the separator; what was mended in the texts is added to `counts`."""


def load(name: str, end_token: str | None) -> Tokenizer:
    """The tokenizer that `data.tokenizer` and `data.end_token` name.

    Raises:
        UserError: where it isn't there, is none, or has no known token between documents.
    """
    if name == "bytes":
        if end_token is not None:
            raise UserError(
                f"data.end_token='{end_token}' goes with a tokenizer.json; under data.tokenizer=bytes a zero byte "
                "ends a document: leave data.end_token out"
            )
        return ByteTokenizer()
    name = str(Path(name).expanduser())
    if Path(name).is_dir() and Path(name, "tokenizer.json").is_file():
        raise UserError(f"data.tokenizer='{name}' is a folder; type {Path(name, 'tokenizer.json')}")
    if not Path(name).is_file():
        raise UserError(
            f"data.tokenizer='{name}' is not a file; type `bytes` or the path of a tokenizer.json"
        )
    return HuggingFaceTokenizer(name, end_token)


class ByteTokenizer:
    """UTF-8 bytes are their own ids."""

    size, separator, digest = 256, BYTE_SEPARATOR, "bytes"

    def __init__(self) -> None:
        self.notes: list[str] = []

    def encode(self, texts: Sequence[bytes], counts: Counter[str]) -> list[np.ndarray]:
        """The bytes of each text; a zero byte, which jsonl can spell, is left out and counted."""
        encoded = []
        for text in texts:
            if b"\0" in text:
                counts["zeros"] += text.count(b"\0")
                text = text.replace(b"\0", b"")
            encoded.append(np.frombuffer(text, dtype=np.uint8))
        return encoded


class HuggingFaceTokenizer:
    """A `tokenizer.json`, with what would change a corpus unseen switched off.

    Truncation, padding and dropout are for other uses than preparing. Special tokens that are written in a text
    stay text: they are split like any other word, so that no text ends a document or opens a turn.

    Args:
        name: path of the file.
        end_token: text of the token between documents; None: what `tokenizer_config.json` beside it declares,
            or the first of `KNOWN_END_TOKENS` that it has.

    Raises:
        UserError: where it can't be read, or no token between documents is known.
    """

    def __init__(self, name: str, end_token: str | None) -> None:
        self._name = name
        self.notes: list[str] = []
        _package(name)
        try:
            tree = from_json(Path(name).read_bytes())
            self._switch_off(tree)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            reason = error.strerror if isinstance(error, OSError) else "it isn't JSON with a model in it"
            raise UserError(
                f"data.tokenizer='{name}' is not a tokenizer.json: {reason}; type the path of one"
            ) from None
        self._json = json.dumps(tree)
        self._open()
        vocabulary: dict[str, int] = self._tokenizer.get_vocab(with_added_tokens=True)
        self.size = max(vocabulary.values(), default=-1) + 1
        self.separator = self._find_separator(vocabulary, end_token)
        added = {
            item["content"]: item["id"] for item in tree.get("added_tokens") or [] if item.get("special")
        }
        added[self._tokenizer.id_to_token(self.separator)] = self.separator
        unknown = tree["model"].get("unk_token")
        unknown = tree["model"].get("unk_id") if unknown is None else vocabulary.get(unknown)
        self._special = {text: i for text, i in added.items() if i != unknown or i == self.separator}
        self._is_special = np.zeros(self.size, dtype=bool)
        self._is_special[list(self._special.values())] = True
        self.digest = hashlib.blake2b(f"{self.separator}\0{self._json}".encode(), digest_size=16).hexdigest()

    def _switch_off(self, tree: dict[str, Any]) -> None:
        model = tree["model"]
        for where, key in ((tree, "truncation"), (tree, "padding"), (model, "dropout")):
            if where.get(key):
                value = where[key]
                shown = value.get("max_length") or value.get("strategy") if isinstance(value, dict) else value
                self.notes.append(f"data.tokenizer: {key} ({json.dumps(shown)}) switched off while preparing")
                where[key] = None

    def _open(self) -> None:
        # Cores are used by processes; threads beside them would only contend, and none may live through a fork.
        os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
        tokenizers = _package(self._name)
        try:
            self._tokenizer = tokenizers.Tokenizer.from_str(self._json)
        except Exception as error:  # the package raises plain exceptions for a malformed file
            reason = str(error).splitlines()[0]
            raise UserError(
                f"data.tokenizer='{self._name}' is not a tokenizer.json: {reason}; type the path of one"
            ) from None
        self._tokenizer.encode_special_tokens = True
        self._batch = getattr(self._tokenizer, "encode_batch_fast", self._tokenizer.encode_batch)

    def _find_separator(self, vocabulary: dict[str, int], end_token: str | None) -> int:
        if end_token is not None:
            if end_token not in vocabulary:
                raise UserError(
                    f"data.end_token='{end_token}' is not a token of data.tokenizer='{self._name}'"
                    f"{nearest(end_token, vocabulary)}; type one that it has"
                )
            return vocabulary[end_token]
        declared = _declared(Path(self._name).with_name("tokenizer_config.json"))
        for token in (declared, *KNOWN_END_TOKENS):
            if token is not None and token in vocabulary:
                why = "as tokenizer_config.json declares" if token == declared else "a known name"
                self.notes.append(f"data.end_token: '{token}' (id {vocabulary[token]}), {why}")
                return vocabulary[token]
        raise UserError(
            f"data.tokenizer='{self._name}' has no known token between documents; set data.end_token to the text "
            "of one of its tokens, such as '<|endoftext|>'"
        )

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_tokenizer", "_batch")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._open()

    def encode(self, texts: Sequence[bytes], counts: Counter[str]) -> list[np.ndarray]:
        """Ids of each text; bytes that aren't UTF-8 become U+FFFD and are counted.

        Raises:
            UserError: where a text gives a special token however it is split.
        """
        words = [self._decoded(text, counts) for text in texts]
        encoded = [
            np.asarray(one.ids, dtype=np.int64) for one in self._batch(words, add_special_tokens=False)
        ]
        for i, ids in enumerate(encoded):
            if self._is_special[ids].any():
                counts["special"] += 1
                encoded[i] = self._encode_split(words[i])
        return encoded

    @staticmethod
    def _decoded(text: bytes, counts: Counter[str]) -> str:
        try:
            return text.decode()
        except UnicodeDecodeError:
            counts["replaced"] += 1
            return text.decode(errors="replace")

    def _encode_split(self, text: str) -> np.ndarray:
        """Ids of a text whose special tokens are also words of the model: each is encoded in two parts."""
        spelled = "|".join(re.escape(one) for one in sorted(self._special, key=len, reverse=True))
        cuts = [0, *(hit.start() + 1 for hit in re.finditer(spelled, text)), len(text)]
        parts = [text[a:b] for a, b in zip(cuts, cuts[1:], strict=False)]
        ids = [i for one in self._batch(parts, add_special_tokens=False) for i in one.ids]
        tokens = np.asarray(ids, dtype=np.int64)
        left = tokens[self._is_special[tokens]]
        if len(left):
            raise UserError(
                f"data.tokenizer='{self._name}' turns plain text into its special token "
                f"'{self._tokenizer.id_to_token(int(left[0]))}'; choose another data.end_token, or a "
                "tokenizer that keeps them apart"
            )
        return tokens


def _package(name: str) -> Any:
    """The optional package."""
    try:
        import tokenizers
    except ImportError:
        raise UserError(
            f"data.tokenizer='{name}' needs the package tokenizers; type `pip install tokenizers`"
        ) from None
    return tokenizers


def _declared(path: Path) -> str | None:
    """The end-of-text token in a `tokenizer_config.json`, where there is one."""
    try:
        token = from_json(path.read_bytes()).get("eos_token")
    except (OSError, ValueError, AttributeError):
        return None
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None
