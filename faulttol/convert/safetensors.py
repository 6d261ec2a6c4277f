"""Files of safetensors as Hugging Face lays them out: several with an index, or one. Read and written in chunks.

The format: eight bytes with the length of a JSON header (little endian), the header, the tensors' bytes without holes.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from configs.errors import UserError, from_json
from faulttol.checkpoint.pieces import DTYPES
from faulttol.checkpoint.store import StoreLike
from faulttol.convert.values import Bits, bits_of

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"
_LONGEST = 100 << 20
"""Bytes of a header that are believed; the `safetensors` library has the same bound."""
_TORCH = {short: name for name, (short, _) in DTYPES.items()}


@dataclass(frozen=True)
class _Place:
    file: str
    dtype: str
    shape: tuple[int, ...]
    offset: int


class SafetensorsFolder:
    """A folder of safetensors: `Foreign`.

    Raises:
        UserError: where it has none, one is missing or torn, or a dtype isn't known.
    """

    def __init__(self, store: StoreLike) -> None:
        self._store = store
        self.bytes = 0
        """Read so far."""
        self._lock = threading.Lock()
        self._places: dict[str, _Place] = {}
        names = store.names()
        files = sorted(name for name in names if name.endswith(".safetensors"))
        # Others beside it are the same under other names, or an adapter's.
        if INDEX not in names and SINGLE in names:
            files = [SINGLE]
        if INDEX in names:
            files = self._indexed()
            missing = sorted(set(files) - set(names))
            if missing:
                raise UserError(
                    f"{self._path(missing[0])} is missing, which {INDEX} names; complete the folder"
                )
        if not files:
            raise UserError(f"{store.url} holds no .safetensors files; name the folder of a model that does")
        for file in files:
            self._header(file)

    def _indexed(self) -> list[str]:
        try:
            return sorted(set(from_json(self._store.read(INDEX))["weight_map"].values()))
        except (ValueError, KeyError, TypeError, AttributeError):
            raise UserError(f"{self._path(INDEX)} is not an index of safetensors; copy it again") from None

    def _header(self, file: str) -> None:
        try:
            size = int.from_bytes(self._store.read_range(file, 0, 8), "little")
            if size > _LONGEST:
                raise ValueError(f"a header of {size} bytes")
            tree = from_json(self._store.read_range(file, 8, 8 + size))
            tree.pop("__metadata__", None)
            end = 8 + size
            for name, entry in tree.items():
                self._add(file, name, entry, 8 + size)
                end = max(end, 8 + size + entry["data_offsets"][1])
            # Now, and not when hours of others were written: a download that broke off has its header.
            if len(self._store.read_range(file, end - 1, end)) != 1:
                raise ValueError(f"it ends before byte {end}")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"{self._path(file)} is not a file of safetensors, or is torn: {error}; copy it again"
            ) from None

    def _add(self, file: str, name: str, entry: dict[str, Any], base: int) -> None:
        if entry["dtype"] not in _TORCH:
            raise UserError(
                f"{self._path(file)}: {name} is {entry['dtype']}, which isn't known here; convert it to bf16 first"
            )
        place = _Place(file, _TORCH[entry["dtype"]], tuple(entry["shape"]), base + entry["data_offsets"][0])
        size = prod(place.shape) * DTYPES[place.dtype][1]
        if entry["data_offsets"][1] - entry["data_offsets"][0] != size:
            raise ValueError(f"{name} has {entry['data_offsets']} as its place and a size of {size}")
        if name in self._places:
            raise UserError(
                f"{self._path(file)} and {self._places[name].file} both have {name}; remove one of them"
            )
        self._places[name] = place

    def names(self) -> Sequence[str]:
        """Of all tensors."""
        return list(self._places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self._places[name].shape

    def dtype(self, name: str) -> str:
        """Of a tensor, as torch names it."""
        return self._places[name].dtype

    def read(self, name: str, first: int, last: int) -> Bits:
        """Elements `[first, last)`, as bits.

        Raises:
            UserError: where the file ends before.
        """
        place = self._places[name]
        item = DTYPES[place.dtype][1]
        data = self._store.read_range(place.file, place.offset + first * item, place.offset + last * item)
        if len(data) != (last - first) * item:
            raise UserError(f"{self._path(place.file)} is truncated: it ends within {name}; copy it again")
        with self._lock:
            self.bytes += len(data)
        return np.frombuffer(data, bits_of(place.dtype))

    def _path(self, name: str) -> str:
        return f"{self._store.url.rstrip('/')}/{name}"


@dataclass(frozen=True)
class OutputTensor:
    """A tensor that is to be written."""

    name: str
    dtype: str
    shape: tuple[int, ...]

    @property
    def bytes(self) -> int:
        """Of its values."""
        return prod(self.shape) * DTYPES[self.dtype][1]


def header(tensors: Sequence[OutputTensor]) -> bytes:
    """The header of a file of these tensors, in this order."""
    tree: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for tensor in tensors:
        tree[tensor.name] = {
            "dtype": DTYPES[tensor.dtype][0],
            "shape": tensor.shape,
            "data_offsets": (at, at + tensor.bytes),
        }
        at += tensor.bytes
    text = json.dumps(tree, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def shards(tensors: Sequence[OutputTensor], most: int) -> Iterator[list[OutputTensor]]:
    """Tensors in files of at most `most` bytes, in their order; one that is larger has a file of its own."""
    file: list[OutputTensor] = []
    size = 0
    for tensor in tensors:
        if file and size + tensor.bytes > most:
            yield aligned(file)
            file, size = [], 0
        file.append(tensor)
        size += tensor.bytes
    if file:
        yield aligned(file)


def aligned(tensors: Sequence[OutputTensor]) -> list[OutputTensor]:
    """Wide dtypes first, so that each begins at a multiple of its size."""
    return sorted(tensors, key=lambda tensor: -DTYPES[tensor.dtype][1])


def file_names(count: int) -> list[str]:
    """As `transformers` names files."""
    if count == 1:
        return [SINGLE]
    return [f"model-{number:05d}-of-{count:05d}.safetensors" for number in range(1, count + 1)]
