"""Prepared tokens as a trainer uses them: streams to train on and to evaluate with, and what they are for a checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.schema import DataConfig
from trainer.data.sampler import TokenSampler
from trainer.data.streams import TokenStream

_EVALUATION_SEED = 0


@dataclass(frozen=True)
class PreparedPart:
    """The prepared tokens of one path."""

    path: str | None
    """As configured; None: the standard library."""
    weight: float
    """Share of the samples, of the sum of all parts' weights."""
    folder: Path
    """Holds `meta.json` and the hashes of documents; of tokens prepared here, the token file too."""
    tokens: np.ndarray
    """[N] token ids of all documents, mapped into memory and never written."""
    documents: int
    separator: int | None
    """Id that ends a document; None where nothing does."""
    train: TokenStream
    """All documents, without those held out."""
    validation: TokenStream | None
    """Documents held out; None where `data.validation` is 0."""
    held: int
    """Number of documents held out."""
    digest: str
    """Of all token ids."""
    tokenizer: str | None
    """Digest of the tokenizer; None where it isn't known."""
    notes: tuple[str, ...]
    """What was chosen, changed or left out while preparing, one line each."""


@dataclass(frozen=True)
class TokenStore:
    """Prepared tokens of one path or of a mixture, by path."""

    parts: tuple[PreparedPart, ...]

    @property
    def tokens(self) -> np.ndarray:
        """[N] token ids; of a store of one part.

        Raises:
            ValueError: for a mixture, whose parts have tokens of their own.
        """
        (part,) = self.parts
        return part.tokens

    @property
    def folder(self) -> Path:
        """Folder of the (first) part."""
        return self.parts[0].folder

    @property
    def count(self) -> int:
        """Tokens of all parts, those held out among them."""
        return sum(len(part.tokens) for part in self.parts)

    @property
    def documents(self) -> int:
        """Documents of all parts, those held out among them."""
        return sum(part.documents for part in self.parts)

    @property
    def held(self) -> int:
        """Documents held out of training, over all parts."""
        return sum(part.held for part in self.parts)

    @property
    def separator(self) -> int | None:
        """Id that ends a document, the same in all parts; None where nothing does."""
        return self.parts[0].separator

    @property
    def notes(self) -> list[str]:
        """What was chosen, changed or left out while preparing, one line each."""
        return list(dict.fromkeys(note for part in self.parts for note in part.notes))

    def train_sampler(self, data: DataConfig, seed: int) -> TokenSampler:
        """The order in which training draws samples."""
        weights = [part.weight for part in self.parts]
        return TokenSampler([part.train for part in self.parts], data.sequence, seed, weights)

    def validation_sampler(self, data: DataConfig) -> TokenSampler | None:
        """The held-out samples, in an order that no seed changes; None where nothing is held out."""
        streams = [part.validation for part in self.parts if part.validation is not None]
        if not streams:
            return None
        return TokenSampler(streams, data.sequence, _EVALUATION_SEED, [part.weight for part in self.parts])


def fingerprint(store: TokenStore, data: DataConfig) -> dict[str, Any]:
    """What a checkpoint keeps of its data, as plain JSON: by it another corpus is distinguished from the same one."""
    return {
        "parts": [
            {
                "path": part.path, "weight": part.weight, "digest": part.digest, "tokens": len(part.tokens),
                "documents": part.documents, "tokenizer": part.tokenizer, "separator": part.separator,
            }
            for part in store.parts
        ],
        "sequence": data.sequence,
        "validation": data.validation,
        "document_mask": data.document_mask,
    }  # fmt: skip


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What isn't the same in two fingerprints, one line each with the field; nothing where samples would be the same.

    A path may change where the tokens don't: corpora move.
    """
    lines = [
        f"data.{name}: {old.get(name)} then, {new.get(name)} now"
        for name in ("sequence", "validation", "document_mask")
        if old.get(name) != new.get(name)
    ]
    before, after = list(old.get("parts", [])), list(new.get("parts", []))
    if len(before) != len(after):
        return [*lines, f"data.mixture: {len(before)} corpora then, {len(after)} now"]
    for then, now in zip(before, after, strict=True):
        lines += _changes(then, now, "data.mixture" if len(after) > 1 else "data.path", [*before], [*after])
    return lines


def _changes(
    then: Mapping[str, Any], now: Mapping[str, Any], field: str, before: list[Any], after: list[Any]
) -> list[str]:
    """Differences of one corpus."""
    corpus = f"{field}='{now.get('path')}'" if now.get("path") else "the standard library"
    lines = []
    for name, setting in (("tokenizer", "data.tokenizer"), ("separator", "data.end_token")):
        if then.get(name) != now.get(name):
            lines.append(f"{setting}: {name} {then.get(name)} then, {now.get(name)} now, for {corpus}")
    if then.get("digest") != now.get("digest") and not lines:
        was = "" if then.get("path") == now.get("path") else f" (then {field}='{then.get('path')}')"
        counts = "{tokens} tokens in {documents} documents"
        lines.append(
            f"{corpus}{was}: {counts.format(**then)} then, {counts.format(**now)} now, other content"
        )
    shares = [one["weight"] / sum(p["weight"] for p in all_) for one, all_ in ((then, before), (now, after))]
    if abs(shares[0] - shares[1]) > 1e-12:
        lines.append(f"data.mixture: share {shares[0]:.6g} then, {shares[1]:.6g} now, for {corpus}")
    return lines
