"""What a file is by its content: packed or not, text, rows or neither. A name alone proves nothing."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from typing import IO, Any, Literal, cast

from configs.errors import UserError

Kind = Literal["text", "jsonl", "parquet"]

HEAD_BYTES = 1 << 16
"""Bytes at the beginning of a file by which its format is detected."""

_COMPRESSIONS = (
    ("gzip", (b"\x1f\x8b",), (".gz",)),
    ("zstd", (b"\x28\xb5\x2f\xfd",), (".zst", ".zstd")),
    ("xz", (b"\xfd7zXZ\x00",), (".xz",)),
    ("bz2", tuple(b"BZh%d" % n + end for n in range(1, 10) for end in (b"1AY&SY", b"\x17rE8P\x90")), (".bz2",)),
)  # fmt: skip
"""Name, first bytes and suffixes of what can be unpacked."""
_JSONL = (".jsonl", ".ndjson", ".json")
_PARQUET = (".parquet",)
_BYTE_ORDER_MARKS = (
    (0, b"\xff\xfe\x00\x00", "UTF-32 text"),
    (0, b"\x00\x00\xfe\xff", "UTF-32 text"),
    (0, b"\xff\xfe", "UTF-16 text (little-endian, by its byte-order mark)"),
    (0, b"\xfe\xff", "UTF-16 text (big-endian, by its byte-order mark)"),
)
_BINARY = (
    (0, b"\x89PNG\r\n", "a PNG image"),
    (0, b"\xff\xd8\xff", "a JPEG image"),
    (0, b"GIF87a", "a GIF image"),
    (0, b"GIF89a", "a GIF image"),
    (8, b"WEBP", "a WebP image"),
    (0, b"\x7fELF", "an ELF program"),
    (0, b"\x93NUMPY", "a NumPy array"),
)
"""Magic bytes of formats that hold no text in any form."""
_UNSUPPORTED = (
    (0, b"%PDF-", "a PDF document"),
    (0, b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document"),
    (0, b"PK\x03\x04", "a zip archive"),
    (0, b"PK\x05\x06", "an empty zip archive"),
    (0, b"7z\xbc\xaf\x27\x1c", "a 7z archive"),
    (0, b"Rar!\x1a\x07", "a RAR archive"),
    (257, b"ustar", "a tar archive"),
    (0, b"\x04\x22\x4d\x18", "an lz4 file"),
    (0, b"SQLite format 3", "an SQLite database"),
    (0, b"ARROW1", "an Arrow IPC file"),
    (0, b"ORC", "an ORC file"),
    (0, b"Obj\x01", "an Avro file"),
    (0, b"\x89HDF\r\n", "an HDF5 file"),
    (0, b"MMIDIDX", "the index of a token file"),
)
"""Magic bytes of formats that may hold text but aren't supported."""
_TEXT = (
    ".txt", ".text", ".md", ".rst", ".tex", ".html", ".htm", ".xml", ".csv", ".tsv", ".srt", ".py", ".c", ".h", ".cc",
    ".cpp", ".java", ".js", ".go", ".rs", ".sh",
)  # fmt: skip
"""Suffixes that promise text; others prove nothing until the file has been looked at."""
_NOT_TEXT = bytes(set(range(1, 32)) - {8, 9, 10, 12, 13, 27})
"""Control characters that text has no use for."""
_RARE = 20
"""Text holds fewer than one of them in so many bytes."""
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)
"""Errors of decompressors and file systems for a damaged or truncated file."""


class BinaryFile(UserError):
    """A file that holds no text in any form: a program, an image, a cache. In a folder it may be left out."""


def base_name(path: str) -> str:
    """A path in lower case without the suffix of a packer, where it has one."""
    name = path.lower()
    for _, _, suffixes in _COMPRESSIONS:
        for suffix in suffixes:
            if name.endswith(suffix):
                return name.removesuffix(suffix)
    return name


def kind_by_name(path: str) -> Kind | None:
    """What a name says that a file is; None for a name without a suffix, which says nothing."""
    name = base_name(path)
    if name.endswith(_JSONL):
        return "jsonl"
    if name.endswith(_PARQUET):
        return "parquet"
    return "text" if "." in name.rsplit("/", 1)[-1].lstrip(".") else None


def has_text_suffix(path: str) -> bool:
    """Whether a name promises text, so that anything else in the file is a fault of it."""
    return base_name(path).endswith(_TEXT)


def unreadable(path: str, error: BaseException) -> UserError:
    """What is said of a file that can't be read or unpacked."""
    return UserError(f"{path} can't be read: {error}; repair it or leave it out of data.path")


def inspect(path: str, file: IO[bytes]) -> tuple[str | None, Kind]:
    """How a file is compressed (None: it isn't) and what is in it, by its first bytes.

    Raises:
        BinaryFile: for what holds no text in any form, with what it is.
        UserError: for what is neither text nor rows of text, with what it is.
        OSError, EOFError, zlib.error, lzma.LZMAError: where it can't be read or unpacked.
    """
    head = file.read(HEAD_BYTES)
    compression = next((name for name, marks, _ in _COMPRESSIONS if head.startswith(marks)), None)
    said = next((name for name, _, ends in _COMPRESSIONS if path.lower().endswith(ends)), None)
    if said and head and compression != said:
        raise OSError(f"its name says {said}, its content {compression or 'is not packed'}")
    if compression:
        file.seek(0)
        head = decompress(file, compression).read(HEAD_BYTES)
        if inner := next((name for name, marks, _ in _COMPRESSIONS if head.startswith(marks)), None):
            raise _refusal(path, f"{inner} inside {compression}")
    by_name = kind_by_name(path)
    if head.startswith(b"PAR1"):
        if compression:
            raise _refusal(path, f"parquet inside {compression}")
        return None, "parquet"
    if by_name == "parquet":
        raise UserError(f"{path} is not parquet; repair it or leave it out of data.path")
    _refuse_foreign(path, head)
    kind = by_name or ("jsonl" if head.lstrip().startswith(b'{"') else "text")
    if kind == "jsonl" and head.removeprefix(b"\xef\xbb\xbf").lstrip()[:1] == b"[":
        raise UserError(
            f"{path}:1 is an array, not an object; write one object a line: jq -c '.[]' {path.rsplit('/', 1)[-1]}"
        )
    return compression, kind


def decompress(file: IO[bytes], compression: str | None) -> IO[bytes]:
    """`file` as its unpacked bytes, to be read forward."""
    if compression == "gzip":
        return cast("IO[bytes]", gzip.open(file))
    if compression == "xz":
        return cast("IO[bytes]", lzma.open(file))
    if compression == "bz2":
        return cast("IO[bytes]", bz2.open(file))
    if compression == "zstd":
        import pyarrow  # heavy, and for this packer only

        return cast(
            "IO[bytes]", _FullReads(pyarrow.CompressedInputStream(pyarrow.PythonFile(file, mode="r"), "zstd"))
        )
    return file


class _FullReads(io.RawIOBase):
    """Arrow's stream as a file: its `read` may give less than was asked before the end."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def read(self, size: int = -1) -> bytes:
        """Up to `size` bytes; fewer only at the end."""
        if size < 0:
            return bytes(self._stream.read())
        parts = []
        while size > 0 and (part := self._stream.read(size)):
            parts.append(part)
            size -= len(part)
        return b"".join(parts)


def _refuse_foreign(path: str, head: bytes) -> None:
    for at, mark, what in (*_BYTE_ORDER_MARKS, *_UNSUPPORTED):
        if head[at : at + len(mark)] == mark:
            raise _refusal(path, what)
    for at, mark, what in _BINARY:
        if head[at : at + len(mark)] == mark:
            raise _wordless(path, what)
    if b"\0" in head:
        what = _zeros(head)
        raise _refusal(path, what) if what.startswith("UTF") else _wordless(path, what)
    odd = len(head) - len(head.translate(None, _NOT_TEXT))
    if odd * _RARE > len(head):
        raise _wordless(path, f"binary ({odd} control characters in {len(head)} bytes)")


def _zeros(head: bytes) -> str:
    """What a text with zero bytes most likely is."""
    pairs = len(head) // 2
    for start, order in ((1, "little"), (0, "big")):
        if pairs and head[start::2].count(0) * 2 > pairs and head[1 - start :: 2].count(0) * 10 < pairs:
            return f"UTF-16 text ({order}-endian, without a byte-order mark)"
    return "binary (it holds zero bytes)"


def zero_refusal(path: str) -> UserError:
    """What is said of a text file that turns out to hold zero bytes behind its beginning."""
    return _refusal(path, "binary (it holds zero bytes)")


def _wordless(path: str, what: str) -> BinaryFile:
    return BinaryFile(f"{path} is {what}, not text, jsonl or parquet; leave it out of data.path")


def _refusal(path: str, what: str) -> UserError:
    mend = (
        f"convert it: iconv -f {what[:6]} -t UTF-8"
        if what.startswith("UTF")
        else "unpack it first, or leave it out of data.path"
        if "archive" in what or "inside" in what or "lz4" in what
        else "leave it out of data.path"
    )
    return UserError(f"{path} is {what}, not text, jsonl or parquet; {mend}")
