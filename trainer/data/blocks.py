"""Files cut into blocks of bounded size, the same ones whoever reads them, and the texts of a block."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any

from configs.errors import UserError, from_json, nearest
from trainer.data import content
from trainer.data.sources import SourceFile

BLOCK_BYTES = 1 << 20
"""Bytes of text that a block holds; one row that is longer makes a longer block."""
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
"""UTF-8's byte-order mark, which isn't text."""


@dataclass(frozen=True)
class Fields:
    """Where a row keeps what is asked for."""

    text: str
    score: str | None
    """None: nobody asks."""


@dataclass(frozen=True)
class FileBlock:
    """A part of one file: whole rows, or a piece of the one document that a text file is."""

    path: str
    kind: content.Kind
    data: Any
    """Bytes; of parquet the columns, texts as bytes or None and scores."""
    first: int
    """Number of its first row, from 1."""
    ends: bool
    """Whether the file ends with it."""
    read: int
    """Bytes of the file, as stored, that have been read by now; at times a little more than the block needed."""


@dataclass(frozen=True)
class TextRow:
    """One text of a block."""

    text: bytes | None
    """UTF-8; None where the row has none."""
    score: float | None
    ends: bool
    """Whether the document ends with it; a text file continues in the next block."""


def blocks(source: SourceFile, fields: Fields) -> Iterator[FileBlock]:
    """One file in blocks.

    Raises:
        UserError: for a file that can't be read, is not text, or lacks a column.
    """
    try:
        compression, kind = source.inspect()
        with source.open() as file:  # anew: a decompressor may have closed the first one
            if kind == "parquet":
                yield from _parquet_blocks(source, file, fields)
            else:
                cut = _jsonl_blocks if kind == "jsonl" else _text_blocks
                yield from cut(source.path, file, content.decompress(file, compression))
    except content.READ_ERRORS as error:
        raise content.unreadable(source.path, error) from None


def rows(block: FileBlock, fields: Fields) -> Iterator[TextRow]:
    """The texts of a block, in order.

    Raises:
        UserError: for a malformed row, a missing field or one of another type, with file and row.
    """
    if block.kind == "text":
        if fields.score is not None:
            raise UserError(
                f"data.score_field='{fields.score}': {block.path} is text and has no rows; name jsonl or parquet, or "
                "leave data.score_field out"
            )
        yield TextRow(block.data, None, block.ends)
    elif block.kind == "parquet":
        texts, scores = block.data
        for i, text in enumerate(texts):
            score = None
            if fields.score is not None:
                score = _score(scores[i], f"{block.path}, row {block.first + i}", fields.score)
            yield TextRow(text, score, True)
    else:
        for number, line in enumerate(block.data.split(b"\n"), block.first):
            if line.strip():
                yield _row(line, f"{block.path}:{number}", fields)


def _text_blocks(path: str, stored: IO[bytes], file: IO[bytes]) -> Iterator[FileBlock]:
    """Of a text file, cut where a line ends or else a word, so that a tokenizer sees whole words; never in a character."""
    number, part = 1, file.read(BLOCK_BYTES).removeprefix(_BYTE_ORDER_MARK)
    while following := file.read(BLOCK_BYTES):
        _refuse_zeros(path, part)
        cut = part.rfind(b"\n") + 1 or max(0, part.rfind(b" ")) or _character_start(part)
        yield FileBlock(path, "text", part[:cut], number, False, stored.tell())
        number, part = number + 1, part[cut:] + following
    _refuse_zeros(path, part)
    yield FileBlock(path, "text", part, number, True, stored.tell())


def _refuse_zeros(path: str, part: bytes) -> None:
    if b"\0" in part:
        raise content.zero_refusal(path)


def _character_start(part: bytes) -> int:
    """The last place where a UTF-8 character begins."""
    cut = len(part) - 1
    while cut > len(part) - 4 and part[cut] & 0xC0 == 0x80:
        cut -= 1
    return cut


def _jsonl_blocks(path: str, stored: IO[bytes], file: IO[bytes]) -> Iterator[FileBlock]:
    number, part = 1, file.read(BLOCK_BYTES).removeprefix(_BYTE_ORDER_MARK)
    # Reads double with the part, or a long line were copied once a block.
    while following := file.read(max(BLOCK_BYTES, len(part))):
        cut = part.rfind(b"\n") + 1
        if cut:
            yield FileBlock(path, "jsonl", part[:cut], number, False, stored.tell())
            number += part.count(b"\n", 0, cut)
        part = part[cut:] + following
    yield FileBlock(path, "jsonl", part, number, True, stored.tell())


def _row(line: bytes, place: str, fields: Fields) -> TextRow:
    try:
        tree = from_json(line)
    except ValueError as error:
        reason = "not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error)
        raise UserError(f"{place} is not JSON: {reason}; each line must be one object") from None
    if not isinstance(tree, dict):
        raise UserError(
            f"{place} has no text: the row is {_type(tree)}, not an object; each line must be one such as "
            f'{{"{fields.text}": "..."}}'
        )
    text = tree.get(fields.text)
    if not isinstance(text, str):
        raise _no_field(place, "data.text_field", fields.text, tree)
    score = None
    if fields.score is not None:
        if fields.score not in tree:
            raise _no_field(place, "data.score_field", fields.score, tree)
        score = _score(tree[fields.score], place, fields.score)
    return TextRow(text.encode(errors="replace"), score, True)


def _score(value: Any, place: str, field: str) -> float:
    """A number that can be ordered."""
    if isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value):
        return float(value)
    reason = "it is not finite" if isinstance(value, float) else f"it is {_type(value)}"
    raise UserError(
        f"{place} has no score under data.score_field='{field}': {reason}; each row needs a number there"
    )


def _type(value: Any) -> str:
    """A JSON value's type in JSON's words."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return "a truth value"
    if isinstance(value, int | float):
        return "a number"
    if isinstance(value, list):
        messages = value and isinstance(value[0], dict) and "content" in value[0]
        return "a list of messages" if messages else "a list"
    return "an object" if isinstance(value, dict) else "a string"


def _no_field(place: str, setting: str, field: str, tree: dict[str, Any] | Iterable[str]) -> UserError:
    names = [str(name) for name in tree]
    what = "text" if setting == "data.text_field" else "score"
    if isinstance(tree, dict) and field in tree:
        kind = _type(tree[field])
        mend = {
            "null": "give it a text or leave the row out",
            "a list of messages": "write each conversation as one text",
        }.get(kind, "name the field that holds a string")
        return UserError(
            f"{place} has no {what} under {setting}='{field}': it is {kind}; {mend}; it has: {', '.join(names)}"
        )
    return UserError(
        f"{place} has no {what} under {setting}='{field}'{nearest(field, names)}; "
        f"it has: {', '.join(names) or 'no keys'}"
    )


def _parquet_blocks(source: SourceFile, file: IO[bytes], fields: Fields) -> Iterator[FileBlock]:
    import pyarrow  # heavy, and for parquet only
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(file)
        names, columns = table.schema_arrow.names, [fields.text, *([fields.score] if fields.score else [])]
        for setting, field in zip(("data.text_field", "data.score_field"), columns, strict=False):
            if field not in names:
                raise _no_field(source.path, setting, field, names)
        _check_text(source.path, table.schema_arrow, fields.text)
        total, first = table.metadata.num_rows, 1
        texts: list[bytes | None] = []
        scores: list[Any] = []
        size = 0
        for batch in table.iter_batches(batch_size=256, columns=columns):
            column = batch.column(batch.schema.get_field_index(fields.text))
            if pyarrow.types.is_dictionary(column.type):
                column = column.dictionary_decode()
            of_batch = (
                batch.column(batch.schema.get_field_index(fields.score)).to_pylist() if fields.score else []
            )
            for i, text in enumerate(column.cast(pyarrow.large_binary()).to_pylist()):
                texts.append(text)
                scores += of_batch[i : i + 1]
                size += len(text or b"")
                if size >= BLOCK_BYTES:
                    done = first + len(texts) - 1
                    yield FileBlock(
                        source.path, "parquet", (texts, scores), first, False, source.size * done // total
                    )
                    texts, scores, size, first = [], [], 0, done + 1
        yield FileBlock(source.path, "parquet", (texts, scores), first, True, source.size)
    except pyarrow.ArrowException as error:
        raise UserError(
            f"{source.path} is not parquet that can be read: {str(error).splitlines()[0]}; repair it or leave it "
            "out of data.path"
        ) from None


def _check_text(path: str, schema: Any, field: str) -> None:
    """Refuse a column that holds no text, whatever form text has in it."""
    import pyarrow

    kind = schema.field(field).type
    if pyarrow.types.is_dictionary(kind):
        kind = kind.value_type
    tests = (
        "is_string",
        "is_large_string",
        "is_string_view",
        "is_binary",
        "is_large_binary",
        "is_binary_view",
    )
    known = [getattr(pyarrow.types, name) for name in tests if hasattr(pyarrow.types, name)]
    if not any(test(kind) for test in known):
        raise UserError(
            f"{path}: column data.text_field='{field}' is {kind}, not text; name the column that holds it; "
            f"it has: {', '.join(schema.names)}"
        )
