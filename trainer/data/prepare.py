"""Text to tokens, once: a folder of prepared tokens that all ranks of all nodes then map into memory."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.errors import UserError
from configs.schema import DataConfig
from faulttol.checkpoint.store import Store
from trainer.data.sources import Source, documents, find

SEPARATOR = 0
"""Token between documents under `tokenizer=bytes`; text holds no zero byte."""

Encode = Callable[[bytes], np.ndarray]


@dataclass(frozen=True)
class TokenStore:
    """Prepared tokens, mapped into memory and never written."""

    tokens: np.ndarray
    """[N], unsigned, of the smallest width that holds the vocabulary."""
    documents: int
    folder: Path


def check(data: DataConfig, vocab: int) -> None:
    """Find mistakes in the data settings without reading all of the data.

    Raises:
        UserError: what is missing, empty or doesn't fit.
    """
    sources = find(data)
    encode, _ = _tokenizer(data.tokenizer, vocab)
    needed, have = data.sequence + 1, 0
    for source in sources:
        for part, ends in documents(source, data.text_field):
            # The beginning of a long part tells enough; the whole is tokenised by the ranks.
            ids = encode(part[: 64 * needed])
            have += len(ids) + (ends and len(ids) > 0)
            if have >= needed or len(part) > 64 * needed:
                return
    _refuse_short(data, have)


def prepare(data: DataConfig, vocab: int, default_cache: Path) -> TokenStore:
    """The tokens of `data`, from the cache where they were prepared before.

    Any number of processes may call this at once: one prepares, the others wait.

    Args:
        default_cache: folder to use where `data.cache` is None.

    Raises:
        UserError: for data that is missing, malformed, empty or shorter than one sample.
    """
    sources = find(data)
    encode, separator = _tokenizer(data.tokenizer, vocab)
    folder = Path(data.cache or default_cache) / _digest(data, sources)
    with _lock(folder):
        if not _is_whole(folder):
            _write(folder, data, sources, encode, separator, vocab)
    meta = json.loads((folder / "meta.json").read_text())
    if meta["tokens"] <= data.sequence:
        _refuse_short(data, meta["tokens"])
    tokens = np.memmap(folder / "tokens.bin", dtype=meta["dtype"], mode="r", shape=(meta["tokens"],))
    return TokenStore(tokens, meta["documents"], folder)


def _is_whole(folder: Path) -> bool:
    try:
        meta = json.loads((folder / "meta.json").read_text())
        size: int = meta["tokens"] * np.dtype(meta["dtype"]).itemsize
        return (folder / "tokens.bin").stat().st_size == size
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _refuse_short(data: DataConfig, have: int) -> None:
    place = "the standard library" if data.path is None else f"data.path='{data.path}'"
    if have <= 1:
        raise UserError(f"{place} is empty; type a path with text in it")
    raise UserError(
        f"data.sequence={data.sequence} is longer than the data ({have} tokens in {place}); "
        f"set data.sequence to at most {have - 1}"
    )


def _write(
    folder: Path, data: DataConfig, sources: list[Source], encode: Encode, separator: int, vocab: int
) -> None:
    """Stream all texts through the tokenizer into `tokens.bin`, and say last, in `meta.json`, that it's whole."""
    kind = np.dtype(np.uint8 if vocab <= 1 << 8 else np.uint16 if vocab <= 1 << 16 else np.uint32)
    between = np.array([separator], dtype=kind).tobytes()
    texts = 0

    def chunks() -> Iterator[bytes]:
        nonlocal texts
        begun = False
        for part, ends in (d for source in sources for d in documents(source, data.text_field)):
            ids = encode(part)
            if len(ids):
                _refuse_unknown(data, int(ids.max()), vocab)
                begun = True
                yield ids.astype(kind).tobytes()
            if ends and begun:
                begun, texts = False, texts + 1
                yield between

    for left in folder.glob(".*.tmp"):  # by a process that was killed in here
        left.unlink()
    store = Store(str(folder))
    try:
        size = store.write("tokens.bin", chunks())
        meta = {
            "tokens": size // kind.itemsize,
            "documents": texts,
            "dtype": kind.name,
            "sources": len(sources),
        }
        store.write("meta.json", [json.dumps(meta).encode()])
    except OSError as error:
        raise UserError(
            f"data.cache: can't write {folder} ({error.strerror}); set data.cache to a folder with room"
        ) from None


def _refuse_unknown(data: DataConfig, largest: int, vocab: int) -> None:
    if largest >= vocab:
        raise UserError(
            f"model.vocab={vocab} is too small for data.tokenizer='{data.tokenizer}', which gives the id "
            f"{largest}; set model.vocab={largest + 1} or more"
        )


def _tokenizer(name: str, vocab: int) -> tuple[Encode, int]:
    """Function from UTF-8 text to token ids, and the id between documents."""
    if name == "bytes":
        if vocab < 256:
            raise UserError(
                f"model.vocab={vocab} is below the 256 ids of data.tokenizer=bytes; set model.vocab=256"
            )
        return lambda text: np.frombuffer(text.replace(b"\0", b""), dtype=np.uint8), SEPARATOR
    if not Path(name).is_file():
        raise UserError(f"data.tokenizer='{name}' is no file; type `bytes` or the path of a tokenizer.json")
    try:
        from tokenizers import Tokenizer  # an optional package
    except ImportError:
        raise UserError(
            f"data.tokenizer='{name}' needs the package tokenizers; type `pip install tokenizers`"
        ) from None
    try:
        tokenizer = Tokenizer.from_file(name)
    except Exception as error:  # the package raises plain exceptions for a malformed file
        raise UserError(f"data.tokenizer='{name}' is no tokenizer.json: {error}") from None
    size = tokenizer.get_vocab_size()
    if size > vocab:
        raise UserError(
            f"model.vocab={vocab} is below the {size} ids of data.tokenizer='{name}'; set model.vocab={size}"
        )
    ends = ("<|endoftext|>", "</s>", "<eos>", "<|end_of_text|>")
    separator = next((i for i in map(tokenizer.token_to_id, ends) if i is not None), 0)

    def encode(text: bytes) -> np.ndarray:
        return np.asarray(tokenizer.encode(text.decode(errors="replace"), add_special_tokens=False).ids)

    return encode, separator


def _digest(data: DataConfig, sources: list[Source]) -> str:
    told = hashlib.blake2b(digest_size=12)
    tokenizer = data.tokenizer
    if tokenizer != "bytes":
        tokenizer = hashlib.blake2b(Path(tokenizer).read_bytes()).hexdigest()
    told.update(json.dumps([tokenizer, data.text_field]).encode())
    for source in sources:
        told.update(f"{source.path}\0{source.stamp}\0".encode())
    return told.hexdigest()


@contextmanager
def _lock(folder: Path) -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a")
    except OSError as error:
        raise UserError(
            f"data.cache: can't write {folder} ({error.strerror}); set data.cache to a folder you may write"
        ) from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
