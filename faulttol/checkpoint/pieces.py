"""What a checkpoint is made of and what it fills: boxes of named tensors. Only this edge of the package knows torch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol

from faulttol.checkpoint.boxes import Box

if TYPE_CHECKING:
    import torch

BLOCK = 1 << 20
"""Bytes that one digest covers. A part of a piece is read in whole blocks, so that whatever is read is verified."""
_CHUNK = 16 * BLOCK
"""Bytes that are copied from a device at once."""
DTYPES = {
    "float64": ("F64", 8), "int64": ("I64", 8), "uint64": ("U64", 8), "complex64": ("C64", 8),
    "float32": ("F32", 4), "int32": ("I32", 4), "uint32": ("U32", 4),
    "bfloat16": ("BF16", 2), "float16": ("F16", 2), "int16": ("I16", 2), "uint16": ("U16", 2),
    "int8": ("I8", 1), "uint8": ("U8", 1), "bool": ("BOOL", 1),
    "float8_e4m3fn": ("F8_E4M3", 1), "float8_e4m3fnuz": ("F8_E4M3FNUZ", 1),
    "float8_e5m2": ("F8_E5M2", 1), "float8_e5m2fnuz": ("F8_E5M2FNUZ", 1),
}  # fmt: skip
"""torch's name of a dtype -> that of safetensors, and its bytes."""


def check_dtype(name: str, dtype: str) -> None:
    """Raise `ValueError` where a dtype can't be saved."""
    if dtype not in DTYPES:
        raise ValueError(f"{name} is {dtype}, which can't be saved; the dtypes are {', '.join(DTYPES)}")


@dataclass(frozen=True)
class TensorPiece:
    """A box of a named tensor with its values, to be saved."""

    name: str
    """Of the global tensor."""
    dtype: str
    """As torch names it: `float32`, `bfloat16`, …"""
    box: Box
    source: torch.Tensor | memoryview
    """The live values, row-major: read when the piece is written, so they mustn't change until `save` returns."""

    @classmethod
    def from_slice(cls, name: str, tensor: torch.Tensor, box: Box | None = None) -> TensorPiece:
        """A piece of a live tensor, the whole where no box is given; nothing is copied yet.

        Raises:
            ValueError: where the tensor hasn't the shape of its box, or the box isn't in the whole.
        """
        box = Box.full(tuple(tensor.shape)) if box is None else box
        _matches(name, tensor, box)
        return cls(name, str(tensor.dtype).removeprefix("torch."), box, tensor)

    @property
    def bytes(self) -> int:
        """Of its values.

        Raises:
            ValueError: where the dtype isn't one that can be saved.
        """
        check_dtype(self.name, self.dtype)
        return self.box.elements * DTYPES[self.dtype][1]

    def chunks(self) -> Iterator[memoryview]:
        """Its bytes in order; on a CPU they aren't copied where the tensor is contiguous.

        Every chunk but the last has a whole number of blocks.
        """
        if isinstance(self.source, memoryview):
            yield self.source
            return
        import torch

        flat = self.source.detach().contiguous().view(-1)
        step = _CHUNK // flat.element_size()
        for at in range(0, flat.numel(), step):
            yield flat[at : at + step].to("cpu").view(torch.uint8).numpy().data


@dataclass(frozen=True)
class LoadTarget:
    """A box of a named tensor that a rank needs, and where it goes."""

    name: str
    dtype: str
    box: Box
    tensor: torch.Tensor
    """Live, of the box's shape and the dtype, on any device; filled in place."""

    def __post_init__(self) -> None:
        _matches(self.name, self.tensor, self.box)
        if str(self.tensor.dtype) != f"torch.{self.dtype}":
            raise ValueError(f"{self.name} is wanted as {self.dtype}, and its tensor is {self.tensor.dtype}")

    @classmethod
    def from_slice(cls, name: str, tensor: torch.Tensor, box: Box | None = None) -> LoadTarget:
        """What fills a live tensor, the whole where no box is given.

        Raises:
            ValueError: where the tensor hasn't the shape of its box, or the box isn't in the whole.
        """
        box = Box.full(tuple(tensor.shape)) if box is None else box
        return cls(name, str(tensor.dtype).removeprefix("torch."), box, tensor)

    @property
    def on_device(self) -> bool:
        """Whether it lives on a GPU."""
        return self.tensor.is_cuda

    def fill(self, values: memoryview, source: Box) -> None:
        """Take over what this and `source` share.

        Args:
            values: bytes of `source`, row-major.
        """
        common = self.box.overlap(source)
        if common is None:
            return
        import torch

        given = torch.frombuffer(values, dtype=getattr(torch, self.dtype)).view(source.shape)
        with torch.no_grad():
            self.tensor[common.slices_within(self.box)].copy_(given[common.slices_within(source)])


def staging_buffer(size: int, on_device: bool) -> memoryview:
    """Memory that bytes are read into on their way to live tensors.

    Args:
        on_device: page-locked, so that a device takes them by itself; from other memory its driver copies them once more,
            at a fifth of the rate.
    """
    if on_device:
        import torch

        with suppress(RuntimeError):  # a limit of locked memory (`ulimit -l`)
            return torch.empty(size, dtype=torch.uint8, pin_memory=True).numpy().data
    return memoryview(bytearray(size))


class TensorPart(Protocol):
    """One rank's part of a named tensor, as a trainer tells it."""

    @property
    def name(self) -> str:
        """Of the global tensor."""

    @property
    def tensor(self) -> torch.Tensor:
        """The live part."""

    @property
    def box(self) -> Box:
        """Where it is in the global tensor."""

    @property
    def replica(self) -> int:
        """Which of `replicas` equal copies this is."""

    @property
    def replicas(self) -> int:
        """Ranks that hold this box."""


def owned(parts: Iterable[TensorPart]) -> Iterator[TensorPiece]:
    """What this rank writes of its parts, so that of all replicas each element is written once.

    A large part is cut into as many ranges of rows as it has replicas; a small one is written by the replica that a
    hash of its name chooses. So the bytes spread evenly without a word between the ranks.
    """
    for part in parts:
        whole = TensorPiece.from_slice(part.name, part.tensor, part.box)
        rows = part.box.shape[0] if part.box.shape else 0
        if part.replicas == 1:
            yield whole
        elif rows >= part.replicas and whole.bytes >= part.replicas * BLOCK:
            first, last = (rows * turn // part.replicas for turn in (part.replica, part.replica + 1))
            yield TensorPiece.from_slice(part.name, part.tensor[first:last], part.box.cut(0, first, last))
        elif _turn(part) == part.replica:
            yield whole


def _turn(part: TensorPart) -> int:
    key = f"{part.name}{part.box}".encode()
    return int.from_bytes(hashlib.sha256(key).digest()[:8]) % part.replicas


def _matches(name: str, tensor: torch.Tensor, box: Box) -> None:
    if tuple(tensor.shape) != box.shape or not box.valid:
        raise ValueError(f"{name}: a tensor of {list(tensor.shape)} isn't the box {box} of {list(box.whole)}")
