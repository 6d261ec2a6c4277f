"""torch's distributed checkpoint (DCP), in and out; names are kept.

Its `.metadata` is a pickle, and to read a pickle is to run what its writer put there: an import asks for trust in so many
words. The tensors themselves are read with torch's restricted loader.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from functools import partial
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from configs.errors import UserError, from_json
from configs.model import ModelConfig
from faulttol.checkpoint.boxes import Box
from faulttol.checkpoint.folder import CheckpointCommit
from faulttol.checkpoint.hashes import MAX_READ, CheckpointSource, parts_of
from faulttol.checkpoint.pieces import DTYPES
from faulttol.checkpoint.store import CheckpointStore, StoreLike
from faulttol.convert.assemble import ImportDestination, imported
from faulttol.convert.facts import Kind, Moments, facts, fingerprint, opened
from faulttol.convert.job import (
    THREADS,
    WORK,
    ConversionJob,
    ConversionProgress,
    ConversionResult,
    Estimate,
    Progress,
    at_once,
)
from faulttol.convert.names import KEEP, NameRule, place
from faulttol.convert.pickles import refuse_pickles
from faulttol.convert.values import Bits, bits_of

if TYPE_CHECKING:
    import torch
    from torch.distributed.checkpoint import FileSystemReader
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

FACTS = "megaray.json"
"""What DCP has no place for: step and facts, beside its files."""
_FILE = 4 << 30
"""Bytes of a file, about."""


# ---- export ----


def export_dcp(store: StoreLike, out: Path, commit: CheckpointCommit | None = None) -> ConversionJob:
    """A checkpoint as one of DCP, with all tensors under their names, slots among them.

    `torch.distributed.checkpoint.load` fills any sharding from it.

    Args:
        out: a local folder, empty or not there.
        commit: the newest where none is named.

    Raises:
        UserError: where the folder isn't empty.
        Incomplete: where the checkpoint is damaged.
    """
    _refuse_full(out)
    source = opened(store, commit)
    boxes = [
        (name, box)
        for name, tensor in source.tensors.items()
        for box in parts_of(Box.full(tensor.shape), MAX_READ // DTYPES[tensor.dtype][1])
    ]
    size = sum(map(source.size, source.tensors))
    count = max(-(-size // _FILE), 1)
    read = sum(source.cost(name, box) for name, box in boxes)
    indexes = sum(file.index for file in source.manifest.files)
    cost = Estimate(read + indexes, size, size, min(THREADS, count) * WORK + indexes)
    return ConversionJob(cost, (), partial(_export, source, out, boxes, count))


def _refuse_full(out: Path) -> None:
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"--out={out} isn't an empty folder; name one that is, or that isn't there yet")


def _export(
    source: CheckpointSource, out: Path, boxes: list[tuple[str, Box]], count: int, progress: Progress
) -> ConversionResult:
    from torch.distributed.checkpoint import FileSystemWriter, Metadata
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorStorageMetadata
    from torch.distributed.checkpoint.planner import SavePlan

    total = sum(box.elements * DTYPES[source.tensors[name].dtype][1] for name, box in boxes)
    planner = _planner(source, ConversionProgress(progress, total))
    before = source.bytes
    # Nothing ahead: with a GPU, torch would take several tensors at once.
    writer = FileSystemWriter(str(out), thread_count=1, per_thread_copy_ahead=0, overwrite=False)
    writer.set_up_storage_writer(is_coordinator=True)
    items = [planner.item(name, box) for name, box in boxes]
    plans = [SavePlan(items[at::count]) for at in range(count)]
    plans = writer.prepare_global_plan([writer.prepare_local_plan(plan) for plan in plans])
    results = at_once([partial(_write, writer, plan, planner) for plan in plans])
    described: dict[str, Any] = {}
    for item in items:
        data = item.tensor_data
        assert data is not None
        chunk = ChunkStorageMetadata(data.chunk.offsets, data.chunk.sizes)
        name = item.index.fqn
        described.setdefault(name, TensorStorageMetadata(data.properties, data.size, [])).chunks.append(chunk)
    text = {"step": source.commit.step, "run": source.manifest.run, "facts": source.manifest.facts}
    (out / FACTS).write_text(json.dumps(text) + "\n")
    writer.finish(Metadata(state_dict_metadata=described), results)
    size = sum(file.stat().st_size for file in out.glob("*.distcp"))
    return ConversionResult(str(out), len(described), source.bytes - before, size)


def _write(writer: Any, plan: Any, planner: Any) -> Any:
    return writer.write_data(plan, planner).value()


def _planner(source: CheckpointSource, tell: ConversionProgress) -> Any:
    """DCP's planner that reads each box when it is written.

    torch's writer keeps the last tensor of each name until its file ends, though it has written it. So all tensors of a
    thread share its memory: one is written before the next is asked for, and none is looked at again.
    """
    import torch
    from torch.distributed.checkpoint import DefaultSavePlanner
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, MetadataIndex, TensorProperties
    from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType

    class Planner(DefaultSavePlanner):
        """Reads box by box."""

        mine = threading.local()

        def item(self, name: str, box: Box) -> WriteItem:
            """What is to be written of a box."""
            offsets, sizes = torch.Size(box.start), torch.Size(box.shape)
            dtype = getattr(torch, source.tensors[name].dtype)
            data = TensorWriteData(
                ChunkStorageMetadata(offsets, sizes), TensorProperties(dtype=dtype), torch.Size(box.whole)
            )
            return WriteItem(MetadataIndex(name, offsets), WriteItemType.SHARD, tensor_data=data)

        def resolve_data(self, write_item: WriteItem) -> torch.Tensor:
            """The values of a box."""
            name, data = write_item.index.fqn, write_item.tensor_data
            assert data is not None
            box = Box(tuple(data.size), tuple(data.chunk.offsets), tuple(data.chunk.sizes))
            dtype = data.properties.dtype
            tensor = (
                torch.empty(0, dtype=dtype).set_(self._room(box.elements * dtype.itemsize)).view(box.shape)
            )
            values = source.read(name, box)
            if box.elements:
                tensor.view(-1).view(torch.uint8).copy_(torch.from_numpy(values.reshape(-1).view(np.uint8)))
            tell(values.nbytes)
            return tensor

        def _room(self, size: int) -> torch.UntypedStorage:
            """The thread's memory for values, of that size."""
            if not hasattr(self.mine, "storage"):
                self.mine.storage = torch.UntypedStorage(0)
            if self.mine.storage.nbytes() != size:
                self.mine.storage.resize_(size)
            storage: torch.UntypedStorage = self.mine.storage
            return storage

    return Planner()


# ---- import ----


class DcpCheckpoint:
    """A checkpoint of DCP: `Foreign`.

    Of a chunk that lies in its file as it is, what is asked for is read alone: where columns are spread over chunks, each
    range of rows touches all of them. Else (compressed, or with strides) it is read whole, and kept by the thread that
    read it until its next.
    """

    def __init__(self, path: Path) -> None:
        from torch.distributed.checkpoint import FileSystemReader
        from torch.distributed.checkpoint.metadata import TensorStorageMetadata

        self._path = path
        self._reader: FileSystemReader = FileSystemReader(str(path))
        try:
            metadata = self._reader.read_metadata()
            self._reader.set_up_storage_reader(metadata, is_coordinator=True)
            entries = metadata.state_dict_metadata
        except Exception as error:  # a pickle may raise anything
            raise UserError(
                f"{path}/.metadata can't be read: {type(error).__name__}: {error}; name the folder of a DCP checkpoint"
            ) from None
        self._tensors: dict[str, TensorStorageMetadata] = {
            name: entry for name, entry in entries.items() if isinstance(entry, TensorStorageMetadata)
        }
        self._refuse_torn()
        self.others = [name for name in entries if name not in self._tensors]
        """Entries that are not tensors, but pickles."""
        self.bytes = 0
        """Read so far."""
        self._lock, self._kept = threading.Lock(), threading.local()
        self._filler = _filler()
        self._store = CheckpointStore(str(path))
        self._flat: dict[tuple[str, int], int | None] = {}
        """By tensor and number of a chunk, the byte of its file at which its values begin; None where it is read whole."""

    def _refuse_torn(self) -> None:
        """Refuse a folder whose files are fewer or shorter than its metadata tells, before anything is written."""
        ends: dict[str, int] = {}
        for stored in self._reader.storage_data.values():
            end = ends.get(stored.relative_path, 0)
            ends[stored.relative_path] = max(end, stored.offset + stored.length)
        for name, end in ends.items():
            file = self._path / name
            size = file.stat().st_size if file.is_file() else None
            if size is None or size < end:
                how = "is missing" if size is None else f"has {size} of at least {end} bytes"
                raise UserError(f"{file} {how}; complete the files")

    @property
    def largest(self) -> int:
        """Bytes of the largest chunk that is compressed, and so read whole."""
        return max(
            (
                prod(chunk.sizes) * DTYPES[self.dtype(name)][1]
                for name, entry in self._tensors.items()
                for number, chunk in enumerate(entry.chunks)
                if self._stored(name, number).transform_descriptors
            ),
            default=0,
        )

    def names(self) -> Sequence[str]:
        """Of all tensors."""
        return list(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Of a tensor."""
        return tuple(self._tensors[name].size)

    def dtype(self, name: str) -> str:
        """Of a tensor."""
        return str(self._tensors[name].properties.dtype).removeprefix("torch.")

    def read(self, name: str, first: int, last: int) -> Bits:
        """Elements `[first, last)`, as bits.

        Raises:
            UserError: where the chunks don't cover them, or one can't be read.
        """
        values = np.empty(last - first, bits_of(self.dtype(name)))
        at = 0
        for box in Box.full(self.shape(name)).flat(first, last):
            part = values[at : at + box.elements].reshape(box.shape)
            covered = 0
            for number, entry in enumerate(self._tensors[name].chunks):
                chunk = Box(box.whole, tuple(entry.offsets), tuple(entry.sizes))
                common = chunk.overlap(box) if chunk.valid else None
                if common is not None:
                    part[common.slices_within(box)] = self._part(name, number, chunk, common)
                    covered += common.elements
            if covered != box.elements:
                raise UserError(
                    f"{self._path}: {covered} of {box.elements} elements of {name}{box} have a source; complete the files"
                )
            at += box.elements
        return values

    def _stored(self, name: str, number: int) -> Any:
        """Where a chunk lies: torch's `_StorageInfo`.

        Raises:
            UserError: where that isn't known.
        """
        from torch.distributed.checkpoint.metadata import MetadataIndex

        offsets = self._tensors[name].chunks[number].offsets
        stored = self._reader.storage_data.get(MetadataIndex(name, offsets, number))
        if stored is None:
            raise UserError(
                f"{self._path}/.metadata names no file of {name} at {list(offsets)}; copy it again"
            )
        return stored

    def _part(self, name: str, number: int, chunk: Box, common: Box) -> Bits:
        """What a chunk has of `common`, which is without holes in it, as it is in the whole."""
        key = (name, number)
        if key not in self._flat:
            self._flat[key] = self._begin(name, number, chunk)
        begin = self._flat[key]
        if begin is None:
            return self._chunk(name, number)[common.slices_within(chunk)]
        first = 0
        for at, start, size in zip(common.start, chunk.start, chunk.shape, strict=True):
            first = first * size + at - start
        kind = bits_of(self.dtype(name))
        begin += first * kind.itemsize
        length = common.elements * kind.itemsize
        file = str(self._stored(name, number).relative_path)
        try:
            data = self._store.read_range(file, begin, begin + length)
        except OSError as error:
            raise UserError(f"{self._path}: {name} can't be read: {error}; complete the files") from None
        if len(data) < length:
            raise UserError(f"{self._path / file} is truncated: it ends within {name}; complete the files")
        with self._lock:
            self.bytes += length
        return np.frombuffer(data, kind).reshape(common.shape)

    def _begin(self, name: str, number: int, chunk: Box) -> int | None:
        """The byte of its file at which a chunk's values begin; None where they don't lie there as they are.

        Raises:
            UserError: where it can't be read.
        """
        import torch

        stored = self._stored(name, number)
        if stored.transform_descriptors:
            return None
        try:
            with (self._path / stored.relative_path).open("rb") as file:
                tensor = torch.load(
                    self._reader._slice_file(file, stored), map_location="meta", weights_only=True
                )
        except Exception as error:
            raise self._unreadable(name, error) from None
        place = getattr(tensor.untyped_storage(), "_checkpoint_offset", None)
        alike = tensor.shape == chunk.shape and tensor.dtype is self._tensors[name].properties.dtype
        if place is None or not alike or not tensor.is_contiguous():
            return None
        return int(stored.offset + place + tensor.storage_offset() * tensor.element_size())

    def _unreadable(self, name: str, error: Exception) -> UserError:
        return UserError(
            f"{self._path}: {name} can't be read: {type(error).__name__}: {error}; complete the files"
        )

    def _chunk(self, name: str, number: int) -> Bits:
        if getattr(self._kept, "key", None) != (name, number):
            self._kept.key, self._kept.values = None, None
            self._kept.values = self._load(name, number)
            self._kept.key = (name, number)
        values: Bits = self._kept.values
        return values

    def _load(self, name: str, number: int) -> Bits:
        import torch
        from torch.distributed.checkpoint.metadata import MetadataIndex
        from torch.distributed.checkpoint.planner import LoadItemType, LoadPlan, ReadItem

        entry = self._tensors[name]
        chunk = entry.chunks[number]
        target = torch.empty(chunk.sizes, dtype=entry.properties.dtype)
        index = MetadataIndex(name, chunk.offsets, number)
        zeros = torch.Size([0] * len(chunk.sizes))
        item = ReadItem(LoadItemType.TENSOR, index, zeros, index, zeros, chunk.sizes)
        try:
            self._reader.read_data(LoadPlan([item]), self._filler(target)).wait()
        except Exception as error:
            raise self._unreadable(name, error) from None
        with self._lock:
            self.bytes += target.numel() * target.element_size()
        flat = target.reshape(-1).view(torch.uint8).numpy() if target.numel() else np.empty(0, np.uint8)
        return flat.view(bits_of(self.dtype(name))).reshape(tuple(chunk.sizes))


def _filler() -> Callable[[torch.Tensor], Any]:
    """Makes DCP's planner that fills one tensor. Its class is made once: a class is freed by the garbage collector alone,
    and would keep its tensor until then."""
    from torch.distributed.checkpoint import DefaultLoadPlanner

    class Planner(DefaultLoadPlanner):
        """Fills one tensor."""

        def __init__(self, target: torch.Tensor) -> None:
            super().__init__()
            self.target = target

        def resolve_tensor(self, read_item: Any) -> torch.Tensor:  # noqa: ARG002
            """Where it goes."""
            return self.target

        def commit_tensor(self, read_item: Any, tensor: torch.Tensor) -> None:
            """It is there."""

    return Planner


def import_dcp(
    path: Path,
    out: StoreLike,
    run: str,
    trust: bool,
    rules: Sequence[NameRule] = KEEP,
    step: int | None = None,
    fill: tuple[ModelConfig, Kind, Moments] | None = None,
) -> ConversionJob:
    """A checkpoint of DCP as one of ours; dtypes stay, names too but for `rules`. Entries that are not tensors stay out.

    Args:
        path: its folder.
        trust: whether its pickle may be read.
        step: None: that which `export_dcp` noted, or 0.
        fill: model, optimizer and moments that training continues with, for what it wants besides. Then floats become fp32.

    Raises:
        UserError: without trust, where it is no such folder, or its tensors don't fit the rules.
    """
    if not (path / ".metadata").is_file():
        raise UserError(f"{path} holds no .metadata; name the folder of a DCP checkpoint")
    refuse_pickles(trust, f"{path}/.metadata")
    chunks = DcpCheckpoint(path)
    known = _noted(path)
    placed, left = place(chunks, rules)
    old = known.get("facts", {})
    lineage = [*old.get("lineage", []), {"how": "import", "format": "dcp", "from": str(path)}]
    small = {**facts({}, lineage), **old, "lineage": lineage}
    if fill is not None:
        small = facts(fingerprint(*fill), lineage)
    notes = [f"no tensors, left out: {', '.join(chunks.others[:3])}"] if chunks.others else []
    notes += [f"left out by the map of names: {len(left)} tensors"] if left else []
    number = step if step is not None else int(known.get("step", 0)) if fill is None else 0
    peak = THREADS * 3 * chunks.largest  # as torch reads it, as it unpacks it, and as it is kept
    into = ImportDestination(out, run, number, small)
    return imported(chunks, placed, into, notes=notes, fill=fill, masters=fill is not None, peak=peak)


def _noted(path: Path) -> dict[str, Any]:
    if not (path / FACTS).is_file():
        return {}
    try:
        tree = from_json((path / FACTS).read_text())
    except ValueError as error:
        raise UserError(f"{path / FACTS} is not a JSON: {error}; remove it to continue without") from None
    return tree if isinstance(tree, dict) else {}
