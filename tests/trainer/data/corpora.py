"""Small texts, what becomes of them, and how the tests of data write and prepare them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from configs.schema import DataConfig
from trainer.data.prepare import check, prepare
from trainer.data.store import TokenStore

TEXTS = ["The first one.", "Zweitens: ä, ö, ü.", "And a third,\nof two lines."]
WHOLE = ["lock", "meta.json", "tokens.bin", "tokens.hash", "tokens.idx"]
WANTED = b"".join(text.encode() + b"\0" for text in TEXTS)


def data_config(path: Path | str | None, **settings: Any) -> DataConfig:
    return DataConfig(path=None if path is None else str(path), **{"sequence": 8, **settings})


def prepared(path: Path | str | None, home: Path, vocab: int = 256, **settings: Any) -> TokenStore:
    check(data_config(path, **settings), vocab)
    return prepare(data_config(path, **settings), vocab, home / "cache")


def jsonl(texts: list[str], field: str = "text") -> str:
    return "".join(json.dumps({"id": i, field: text}) + "\n" for i, text in enumerate(texts))
