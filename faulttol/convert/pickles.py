"""Reading `.pt` files without running what they contain, and the tensors in them without holding one."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.errors import UserError
from faulttol.convert.values import Bits, bits_of

if TYPE_CHECKING:
    import torch

_LOCK = threading.Lock()
"""torch keeps one list of what may be unpickled for the whole process."""


def refuse_pickles(trust: bool, what: str) -> None:
    """Refuse to read a pickle that nobody vouched for.

    Raises:
        UserError: without trust.
    """
    if not trust:
        raise UserError(
            f"{what} is a pickle, and reading it runs whatever its writer put there; type --trust if you know where it is "
            "from"
        )


class _Stub:
    """Stands for an object of another library: keeps what it was given, does nothing."""

    def __init__(self, *given: Any, **named: Any) -> None:
        self.given, self.named = given, named


class _Address(_Stub):
    """DeepSpeed's `fragment_address`: where a parameter lies in a partition."""

    numel: int
    start: int


def _member(kind: Any, name: str) -> _Stub:
    """Stands for `getattr`, by which Python before 3.11.4 pickles members of an enumeration; looks nothing up."""
    return _Stub(kind, name)


_KNOWN: dict[str, Callable[..., Any]] = {
    "builtins.getattr": _member,
    "deepspeed.utils.tensor_fragment.fragment_address": _Address,
    "deepspeed.runtime.zero.config.ZeroStageEnum": _Stub,
    "deepspeed.runtime.fp16.loss_scaler.LossScaler": _Stub,
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler": _Stub,
}
"""What DeepSpeed's own files contain beside tensors and plain data, with what stands for it here."""


def load(path: Path, trust: bool) -> Any:
    """What a `.pt` file holds; tensors are mapped into memory and read when they are used.

    Objects of DeepSpeed are replaced by ones that do nothing. A file with anything else is a pickle in earnest.

    Raises:
        UserError: where it can't be read, or not without trust.
    """
    import torch

    with _LOCK:
        try:
            unknown = set(torch.serialization.get_unsafe_globals_in_checkpoint(str(path))) - _KNOWN.keys()
        except Exception as error:
            raise UserError(f"{path} is not a file of torch.save: {error}; copy it again") from None
        if unknown:
            refuse_pickles(trust, f"{path} with {', '.join(sorted(unknown)[:3])}")
        try:
            if unknown:
                return torch.load(path, map_location="cpu", mmap=True, weights_only=False)
            with torch.serialization.safe_globals([(kind, name) for name, kind in _KNOWN.items()]):
                return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
        except Exception as error:
            lines = str(error).strip().splitlines() or [type(error).__name__]
            raise UserError(f"{path} can't be read: {lines[0]}; copy it again") from None


@dataclass(frozen=True)
class _FlatRange:
    """Elements of a parameter that lie together."""

    first: int
    """Counted in the parameter."""
    values: torch.Tensor
    """Flat."""


class PickledTensors:
    """Tensors in memory-mapped files, whole or in ranges: `Foreign`."""

    def __init__(self) -> None:
        self._shapes: dict[str, tuple[int, ...]] = {}
        self._ranges: dict[str, list[_FlatRange]] = {}
        self.bytes = 0
        """Read so far."""
        self._lock = threading.Lock()

    def add(self, name: str, shape: tuple[int, ...], ranges: Iterable[torch.Tensor]) -> None:
        """A tensor, whose flat ranges follow each other.

        Raises:
            UserError: where they are more or fewer than its elements.
        """
        pieces, at = [], 0
        for values in ranges:
            pieces.append(_FlatRange(at, values.detach().reshape(-1)))
            at += values.numel()
        if at != prod(shape):
            raise UserError(f"{name} is {list(shape)}, and its ranges have {at} elements; complete the files")
        self._shapes[name], self._ranges[name] = shape, pieces

    def names(self) -> Sequence[str]:
        """Of all tensors."""
        return list(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return self._shapes[name]

    def dtype(self, name: str) -> str:
        """Of a tensor."""
        pieces = self._ranges[name]
        return str(pieces[0].values.dtype).removeprefix("torch.") if pieces else "float32"

    def read(self, name: str, first: int, last: int) -> Bits:
        """Elements `[first, last)`, as bits."""
        import torch

        values = np.empty(last - first, bits_of(self.dtype(name)))
        for flat in self._ranges[name]:
            begin = max(first, flat.first)
            end = min(last, flat.first + flat.values.numel())
            if begin < end:
                part = flat.values[begin - flat.first : end - flat.first].contiguous()
                values[begin - first : end - first] = part.view(torch.uint8).numpy().view(values.dtype)
        with self._lock:
            self.bytes += values.nbytes
        return values
