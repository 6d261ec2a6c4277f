"""Text to tokens, once: a folder of prepared tokens that all ranks of all nodes then map into memory."""

from __future__ import annotations

import fcntl
import hashlib
import json
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError, from_json
from configs.schema import DataConfig
from trainer.data import indexed, tokenizer
from trainer.data.blocks import Fields, blocks, rows
from trainer.data.build import NAME, PrepareJob, Progress, TokenScan, build
from trainer.data.sources import ResolvedPath, resolve
from trainer.data.store import PreparedPart, TokenStore
from trainer.data.streams import TokenStream, split_validation
from trainer.data.workers import cores

_VERSION = 2
"""Of what is in a folder; another one is prepared anew."""
_CHECKED_FILES = 64
"""Files whose beginning is checked before a run is queued."""
_SMALL_BYTES = 8 << 20
"""Bytes of sources that are prepared sooner than worker processes start."""


@dataclass(frozen=True)
class _Corpus:
    """A corpus: one path of the configuration, with its weight."""

    path: str | None
    weight: float
    data: DataConfig

    @property
    def field(self) -> str:
        """The configuration's name for it."""
        return "data.mixture" if self.data.mixture else "data.path"

    @property
    def setting(self) -> str:
        """Its name in messages."""
        return "the standard library" if self.path is None else f"{self.field}='{self.path}'"

    @property
    def prefix(self) -> Path | None:
        """Of a token file that is there already; None: it is text."""
        return None if self.path is None or "://" in self.path else indexed.prefix_of(self.path)

    @property
    def fields(self) -> Fields:
        """Where rows keep text and score."""
        return Fields(self.data.text_field, self.data.score_field)


def _corpora(data: DataConfig) -> list[_Corpus]:
    """The paths, sorted, so that the order in which a mixture is written doesn't matter."""
    if data.mixture:
        return [_Corpus(path, weight, data) for path, weight in sorted(data.mixture.items())]
    return [_Corpus(data.path, 1.0, data)]


def check(data: DataConfig, vocab: int) -> list[str]:
    """Find mistakes in the data settings without reading all of the data: the beginning of files tells enough.

    Returns:
        What is left out or turned off, one line each.

    Raises:
        UserError: what is missing, empty, no text, or doesn't fit.
    """
    notes: list[str] = []
    for corpus in _corpora(data):
        prefix = corpus.prefix
        if prefix is not None:
            _check_prepared(corpus, prefix, vocab)
        else:
            notes += _check_text(corpus, vocab)
    return list(dict.fromkeys(notes))


def _check_prepared(corpus: _Corpus, prefix: Path, vocab: int) -> None:
    _refuse_scores(corpus)
    index = indexed.read(prefix)
    if corpus.data.tokenizer != "bytes":
        tokenizer.load(corpus.data.tokenizer, corpus.data.end_token)
    some = index.tokens[: 1 << 16]
    if len(some):
        _refuse_unknown(corpus, int(some.max()), int(some.min()), vocab)
    _refuse_short(corpus, len(index.tokens))


def _check_text(corpus: _Corpus, vocab: int) -> list[str]:
    words = tokenizer.load(corpus.data.tokenizer, corpus.data.end_token)
    _refuse_small(corpus, words.size, vocab)
    files = resolve(corpus.path, corpus.field)
    needed, have = corpus.data.sequence + 1, 0
    for i, source in enumerate(files.sources):
        if i >= _CHECKED_FILES and have >= needed:
            break
        for block in blocks(source, corpus.fields):
            for row in rows(block, corpus.fields):
                if have < needed and row.text:
                    ids = words.encode([row.text[: 64 * needed]], Counter())[0]
                    have += needed if len(row.text) > 64 * needed else len(ids) + (row.ends and len(ids) > 0)
            if have >= needed:
                break
    _refuse_short(corpus, have)
    return [*files.notes, *words.notes]


def prepare(
    data: DataConfig,
    vocab: int | None,
    default_cache: Path,
    workers: int | None = None,
    progress: Progress = lambda *_: None,
    out: Path | None = None,
) -> TokenStore:
    """The tokens of `data`, from the cache where they were prepared before.

    Any number of processes may call this at once: one prepares, the others wait. A call that is killed is continued
    with by the next.

    Args:
        vocab: ids of the model; None: not compared.
        default_cache: folder to use where `data.cache` is None.
        workers: processes to encode with; None: one for each core, where there is enough to do.
        progress: gets how far it is.
        out: folder for the prepared tokens themselves, instead of one in the cache.

    Raises:
        UserError: for data that is missing, malformed, empty or shorter than one sample.
    """
    parts = []
    for corpus in _corpora(data):
        prefix = corpus.prefix
        cache = Path(data.cache or default_cache)
        if prefix is None:
            folder, meta = _prepare_text(corpus, vocab, out, cache, (workers, progress))
            prefix = folder / NAME
        else:
            folder, meta = _adopt_token_file(corpus, prefix, cache, progress)
        parts.append(_part(corpus, prefix, folder, meta, vocab))
    separators = {part.separator for part in parts}
    if len(separators) > 1:
        raise UserError(
            f"data.mixture: its corpora end documents with different ids ({', '.join(map(str, separators))}); prepare "
            "them with one data.tokenizer and data.end_token"
        )
    return TokenStore(tuple(parts))


def _part(
    corpus: _Corpus, prefix: Path, folder: Path, meta: dict[str, Any], vocab: int | None
) -> PreparedPart:
    _refuse_unknown(corpus, meta["largest"], meta["smallest"], vocab)
    _refuse_short(corpus, meta["tokens"])
    index = indexed.read(prefix, checked=True)
    train, validation, held = TokenStream(index.tokens), None, 0
    if corpus.data.validation:
        share, hashes = corpus.data.validation, folder / f"{NAME}.hash"
        train, validation, held = split_validation(index.tokens, index.ends(), hashes, share, corpus.setting)
        for stream, side in ((train, "trained on"), (validation, "held out")):
            if len(stream) <= corpus.data.sequence:
                raise UserError(
                    f"data.validation={share}: the documents {side} of {corpus.setting} are {len(stream)} tokens, less "
                    f"than one sample of data.sequence={corpus.data.sequence}; change either"
                )
    return PreparedPart(
        corpus.path, corpus.weight, folder, index.tokens, meta["documents"], meta["separator"], train, validation,
        held, meta["digest"], meta["tokenizer"], tuple(meta["notes"]),
    )  # fmt: skip


def _prepare_text(
    corpus: _Corpus, vocab: int | None, out: Path | None, cache: Path, how: tuple[int | None, Progress]
) -> tuple[Path, dict[str, Any]]:
    """The folder of a text corpus, which is prepared first if it isn't yet, and its metadata."""
    data, (workers, progress) = corpus.data, how
    words = tokenizer.load(data.tokenizer, data.end_token)
    _refuse_small(corpus, words.size, vocab)
    files = resolve(corpus.path, corpus.field)
    key = _key(corpus, words, files)
    folder = out or cache / key
    with _lock(folder, "--out" if out else "data.cache"):
        meta = _read_meta(folder, folder / NAME)
        if meta is not None and meta["key"] != key:
            raise UserError(f"--out {folder} holds another prepared corpus; name a new folder")
        if meta is None:
            total = sum(source.size for source in files.sources)
            if workers is None:  # bytes need no encoding, and a small corpus no company
                workers = 1 if data.tokenizer == "bytes" or 0 < total < _SMALL_BYTES else cores()
            keep = data.keep_fraction
            build(PrepareJob(folder, key, files.sources, words, corpus.fields, keep, workers, progress))
    meta = from_json((folder / "meta.json").read_text())
    return folder, meta | {"notes": [*files.notes, *words.notes, *meta["notes"]]}


def _adopt_token_file(
    corpus: _Corpus, prefix: Path, cache: Path, progress: Progress
) -> tuple[Path, dict[str, Any]]:
    """The folder with the statistics of an existing token file, ours or Megatron's, after one pass over it."""
    _refuse_scores(corpus)
    data, index = corpus.data, indexed.read(prefix)
    words = tokenizer.load(data.tokenizer, data.end_token) if data.tokenizer != "bytes" else None
    own = _read_meta(prefix.parent, prefix) if prefix.name == NAME else None
    if own is not None:
        if words is not None and words.digest != own["tokenizer"]:
            raise UserError(
                f"data.tokenizer='{data.tokenizer}' is not the one that {corpus.setting} was prepared with; leave it out, "
                "or prepare the text again"
            )
        return prefix.parent, own
    stamps = [prefix.with_name(prefix.name + end).stat() for end in (".bin", ".idx")]
    identity = f"{_VERSION}/{prefix.resolve()}/" + "/".join(
        f"{one.st_size}/{one.st_mtime_ns}" for one in stamps
    )
    folder = cache / hashlib.blake2b(identity.encode(), digest_size=12).hexdigest()
    with _lock(folder):
        if not (folder / "meta.json").is_file():
            scan = TokenScan(folder / f"{NAME}.hash", index.tokens.dtype)
            for done in indexed.scan(index, scan.feed):
                progress("verify", done, len(index.tokens), done)
            from faulttol.checkpoint.store import CheckpointStore

            CheckpointStore(str(folder)).write("meta.json", [json.dumps(scan.close()).encode()])
    meta = from_json((folder / "meta.json").read_text())
    notes = [] if words is None else list(words.notes)
    separator = meta["closing"] if words is None else words.separator
    if separator is None or separator != meta["closing"]:
        if data.document_mask:
            raise UserError(
                f"{corpus.setting}: not every document ends with the same id ({separator}), so nothing separates them; set "
                "data.end_token and data.tokenizer to what they end with, or data.document_mask=false, or make the "
                "file again with --append-eod"
            )
        separator = None
        notes.append(f"{corpus.setting}: documents have no common end; attention crosses them")
    elif words is None:
        notes.append(
            f"{corpus.setting}: every document ends with id {separator}, taken as what separates them"
        )
    digest = None if words is None else words.digest
    return folder, meta | {"separator": separator, "tokenizer": digest, "notes": notes}


def _read_meta(folder: Path, prefix: Path) -> dict[str, Any] | None:
    """What `meta.json` says of a token file beside it; None where they don't fit."""
    try:
        meta: dict[str, Any] = from_json((folder / "meta.json").read_text())
        index = indexed.read(prefix)
        hashes = (folder / f"{NAME}.hash").stat().st_size
        sizes = (len(index.tokens), index.documents, index.tokens.dtype.name, hashes)
        fits = sizes == (meta["tokens"], meta["documents"], meta["dtype"], 8 * meta["documents"])
        return meta if fits and "key" in meta else None
    except (OSError, ValueError, KeyError, TypeError, UserError):
        return None


def _refuse_scores(corpus: _Corpus) -> None:
    if corpus.data.score_field is not None:
        raise UserError(
            f"data.score_field='{corpus.data.score_field}': {corpus.setting} is prepared already and has no scores; "
            "prepare the text with it, or leave it out"
        )


def _refuse_short(corpus: _Corpus, have: int) -> None:
    if have <= 1:
        raise UserError(f"{corpus.setting} is empty; type a path with text in it")
    if have <= corpus.data.sequence:
        raise UserError(
            f"data.sequence={corpus.data.sequence} is longer than the data ({have} tokens in {corpus.setting}); "
            f"set data.sequence to at most {have - 1}"
        )


def _refuse_small(corpus: _Corpus, size: int, vocab: int | None) -> None:
    if vocab is not None and size > vocab:
        name = "bytes" if corpus.data.tokenizer == "bytes" else f"'{corpus.data.tokenizer}'"
        raise UserError(
            f"model.vocab={vocab} is below the {size} ids of data.tokenizer={name}; set model.vocab={size}"
        )


def _refuse_unknown(corpus: _Corpus, largest: int, smallest: int, vocab: int | None) -> None:
    if vocab is not None and largest >= vocab:
        raise UserError(
            f"model.vocab={vocab} is too small for {corpus.setting}, which holds the id {largest}; set "
            f"model.vocab={largest + 1} or more"
        )
    if smallest < 0:
        raise UserError(
            f"{corpus.setting} holds the id {smallest}; tokens are 0 or above: make the file again"
        )


def _key(corpus: _Corpus, words: tokenizer.Tokenizer, files: ResolvedPath) -> str:
    """Of all that the tokens depend on."""
    data = corpus.data
    digest = hashlib.blake2b(digest_size=12)
    settings = [_VERSION, words.digest, data.text_field, data.score_field, data.keep_fraction]
    digest.update(json.dumps(settings).encode())
    for source in files.sources:
        digest.update(f"{source.path}\0{source.stamp}\0".encode())
    return digest.hexdigest()


@contextmanager
def _lock(folder: Path, setting: str = "data.cache") -> Iterator[None]:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / "lock").open("a")
    except OSError as error:
        raise UserError(
            f"{setting}: can't write {folder} ({error.strerror}); set {setting} to a folder you may write"
        ) from None
    with file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
