"""What a checkpoint's manifest costs at thousands of ranks: bytes that a rank reads, and what rank 0 does alone.

    python -m tests.faulttol.bench.bench_manifest [--ranks 12288]

Every rank's pieces are made as a trainer makes them (pp 16, tp 8, ep 64, the rest dp; parameters replicated over dp and
written by the replica that `owned` chooses, optimizer slots cut flat over dp as ZeRO-1 does), and their indexes with
digests of the right length. Values aren't there: nothing here depends on them. The files' places, the directory and the
indexes are read through the code that a restore uses, for ranks of all stages.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from faulttol.checkpoint.boxes import Box
from faulttol.checkpoint.coverage import CoverageCache, FilePlan
from faulttol.checkpoint.folder import CheckpointCommit, CheckpointFolder, ManifestDirectory, run_tag
from faulttol.checkpoint.manifest import Identity, Manifest, ManifestHead, ShardFile, digest
from faulttol.checkpoint.pieces import BLOCK, DTYPES, LoadTarget, owned
from faulttol.checkpoint.reading import CheckpointReader
from faulttol.checkpoint.shards import Entry, ShardIndex
from faulttol.checkpoint.sharing import _groups, _key
from faulttol.checkpoint.store import copy_into

PP, TP, EP = 16, 8, 64
LAYERS, DIM, EXPERTS, WIDTH, VOCABULARY = 64, 7168, 256, 2048, 131072
SLOTS = ("", "/exp_avg", "/exp_avg_sq")
_HEX = "0123456789abcdef" * 2


class TensorShape:
    """A tensor's shape and dtype without its values."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        self.shape, self.dtype = shape, "torch.float32"

    def __getitem__(self, rows: slice) -> TensorShape:
        return TensorShape((rows.stop - rows.start, *self.shape[1:]))


@dataclass(frozen=True)
class ManifestPart:
    """A rank's part of a tensor."""

    name: str
    tensor: Any
    box: Box
    replica: int
    replicas: int


def dense(stage: int) -> Iterator[tuple[str, tuple[int, ...], int | None]]:
    """Name, shape and the dim that tp cuts, of what a stage's ranks have besides experts."""
    if stage == 0:
        yield "embedding", (VOCABULARY, DIM), 0
    if stage == PP - 1:
        yield "head", (VOCABULARY, DIM), 0
        yield "norm", (DIM,), None
    for layer in range(stage * LAYERS // PP, (stage + 1) * LAYERS // PP):
        at = f"blocks.{layer}"
        yield f"{at}.attention.q", (8192, DIM), 0
        yield f"{at}.attention.k", (1024, DIM), 0
        yield f"{at}.attention.v", (1024, DIM), 0
        yield f"{at}.attention.o", (DIM, 8192), 1
        yield f"{at}.attention.q_norm", (128,), None
        yield f"{at}.attention.k_norm", (128,), None
        yield f"{at}.attention_norm", (DIM,), None
        yield f"{at}.feed_norm", (DIM,), None
        yield f"{at}.feed.router", (EXPERTS, DIM), None
        yield f"{at}.feed.router_bias", (EXPERTS,), None
        yield f"{at}.feed.shared.gate_up", (2, WIDTH, DIM), 1
        yield f"{at}.feed.shared.down", (DIM, WIDTH), 1


def experts(stage: int) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Name and shape of a stage's stacked experts."""
    for layer in range(stage * LAYERS // PP, (stage + 1) * LAYERS // PP):
        yield f"blocks.{layer}.feed.experts.gate_up", (EXPERTS, 2, WIDTH, DIM)
        yield f"blocks.{layer}.feed.experts.down", (EXPERTS, DIM, WIDTH)


@lru_cache(maxsize=1 << 16)
def _flat(box: Box, place: int, of: int) -> tuple[Box, ...]:
    each = -(-box.elements // of)
    return tuple(box.flat(min(place * each, box.elements), min((place + 1) * each, box.elements)))


def parts(rank: int, world: int) -> Iterator[ManifestPart]:
    """Everything that a rank holds."""
    width = world // PP
    dp, edp = width // TP, width // EP
    stage, inside = divmod(rank, width)
    d, t, x, e = inside // TP, inside % TP, inside // EP, inside % EP
    held: list[tuple[str, Box, int, int]] = []
    for name, shape, dim in dense(stage):
        box = Box.full(shape)
        if dim is not None:
            size = shape[dim] // TP
            box = box.cut(dim, t * size, (t + 1) * size)
        # Where tp doesn't cut it, every rank of tp has it too.
        held.append((name, box, d if dim is not None else inside, dp if dim is not None else width))
    for name, shape in experts(stage):
        size = shape[0] // EP
        held.append((name, Box.full(shape).cut(0, e * size, (e + 1) * size), x, edp))
    for name, box, replica, replicas in held:
        yield ManifestPart(name, TensorShape(box.shape), box, replica, replicas)
        for slot in SLOTS[1:]:
            for cut in _flat(box, replica, replicas):
                yield ManifestPart(f"{name}{slot}", TensorShape(cut.shape), cut, 0, 1)


def index_of(rank: int, plan: Iterable[tuple[str, str, Box]]) -> tuple[bytes, int]:
    """A rank's index, and the bytes of its pieces."""
    entries, total = [], 0
    for name, dtype, box in plan:
        size = box.elements * DTYPES[dtype][1]
        entries.append(Entry(name, dtype, box, 0, _HEX * -(-size // BLOCK)))
        total += size
    return ShardIndex("run", 1, 100, rank, BLOCK, tuple(entries)).dump(), total


class ManifestShelf:
    """A store that has indexes, the directory and the manifest."""

    url = "bench"

    def __init__(self) -> None:
        self.files: dict[str, tuple[int, bytes]] = {}
        """By path: where the kept bytes begin, and they."""

    def read(self, name: str) -> bytes:
        return self.files[name][1]

    def read_range(self, name: str, start: int, end: int) -> bytearray:
        offset, data = self.files[name]
        return bytearray(data[start - offset : end - offset])

    def read_into(self, name: str, start: int, into: memoryview) -> int:
        return copy_into(into, self.read_range(name, start, start + len(into)))

    def names(self, folder: str = "") -> list[str]:
        if not folder:
            return sorted({name.split("/")[0] for name in self.files})
        return sorted(name.split("/")[1] for name in self.files if name.startswith(f"{folder}/"))


def timed(what: str, act: Any) -> Any:
    """What `act` gives; its time is printed, on the clock and of the processor (less where others use the machine)."""
    began, worked = time.perf_counter(), time.process_time()
    found = act()
    clock, work = time.perf_counter() - began, time.process_time() - worked
    print(f"{what:<60}{clock:9.2f} s, {work:.2f} s of CPU", flush=True)
    return found


def build(world: int) -> tuple[ManifestShelf, ManifestHead, list[FilePlan], int]:
    """All ranks' plans and indexes; what rank 0 does of it is timed."""
    shelf, commit = ManifestShelf(), CheckpointCommit(1, 100, run_tag("run"))
    plans: list[FilePlan] = []
    files: list[ShardFile] = []
    for rank in range(world):
        rows = [(piece.name, piece.dtype, piece.box) for piece in owned(parts(rank, world))]
        text, total = index_of(rank, rows)
        plans.append(FilePlan(rows))
        files.append(ShardFile(total + len(text), len(text), digest(text)))
        shelf.files[commit.shard(rank, "token")] = total, text
    print(f"{world} ranks, {sum(f.bytes for f in files) / 1e12:.1f} TB; plans as sent: "
          f"{max(len(p.packed) for p in plans)} bytes a rank at most")  # fmt: skip
    cache, digests = CoverageCache(), [plan.digest for plan in plans]
    tensors = timed("rank 0: check of all plans, first save", lambda: cache.check(digests, plans))
    timed("rank 0: check, later saves", lambda: cache.check(digests, [None] * world))
    manifest = Manifest("run", 1, 100, {"pp": PP, "tp": TP, "ep": EP}, "token", tensors, tuple(files))
    head, directory = timed("rank 0: manifest and directory", manifest.split)
    shelf.files[commit.directory("token")] = 0, b"".join(directory)
    shelf.files[commit.manifest] = 0, head.dump()
    return shelf, head, plans, sum(map(len, directory))


def read(shelf: ManifestShelf, head: ManifestHead, rank: int) -> tuple[int, int]:
    """Bytes that a rank reads before the first value, and what it read before directories: everything of its tensors."""
    wanted = [LoadTarget(p.name, "float32", p.box, p.tensor) for p in parts(rank, head.world)]
    names: dict[str, list[LoadTarget]] = {}
    for item in wanted:
        names.setdefault(item.name, []).append(item)
    directory = ManifestDirectory(shelf, head)  # type: ignore[arg-type]
    tensors = directory.find(names)
    assert len(tensors) == len(names)
    reader = CheckpointReader(shelf, directory, wanted, rank)  # type: ignore[arg-type]
    _, rest = reader._at_home(names)
    shared = {p.name for p in parts(rank, head.world) if p.replicas > 1}
    assert set(rest) <= shared, "what is this rank's alone lies in its own file"
    now = directory.bytes + reader.bytes
    files = {at for tensor in tensors.values() for at in tensor.files()}
    commit = CheckpointCommit(head.attempt, head.step, head.run)
    before = sum(len(shelf.files[commit.shard(at, head.token)][1]) for at in files)
    return now, before


def keys(world: int) -> list[bytes]:
    """What ranks tell to find who wants the same."""
    known: dict[tuple[str, Box], bytes] = {}
    answers = []
    for rank in range(world):
        found = []
        for part in parts(rank, world):
            at = part.name, part.box
            if at not in known:
                known[at] = _key(LoadTarget(part.name, "float32", part.box, part.tensor))
            found.append(known[at])
        answers.append(b"".join(found))
    return answers


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--ranks", type=int, default=12288, help="a multiple of 1024; 12288")
    world = parser.parse_args().ranks
    if world % 1024 or world < 1024:
        parser.error(
            f"--ranks={world} isn't a multiple of 1024 (pp {PP}, tp {TP}, ep {EP}): type 1024 or 12288"
        )
    shelf, head, _, directory = build(world)
    size = len(shelf.files[CheckpointCommit(1, 100, "run").manifest][1])
    folder = timed("rank 0: folder of the checkpoint listed and compared", lambda: CheckpointFolder(shelf))  # type: ignore[arg-type]
    identity = Identity("run", 1, {}, 0, world)
    timed(
        "rank 0: its files compared with the manifest",
        lambda: (folder.check_owner(identity), folder.head(folder.commits[0])),
    )
    told = keys(world)
    _, groups = timed("rank 0: who wants the same", lambda: _groups(told))
    print(
        f"{len(groups)} groups of ranks that want the same; {max(map(len, told))} bytes told by a rank at most"
    )
    ranks = sorted(
        {*range(0, world, world // PP), *range(world // PP - 1, world, world // PP), world // 2 + 77}
    )
    most, before = (max(column) for column in zip(*(read(shelf, head, rank) for rank in ranks), strict=True))
    print(f"head {size} bytes (rank 0 reads it for all), directory {directory} bytes in "
          f"{len(head.tensors) + len(head.files)} blocks, {head.count} tensors")  # fmt: skip
    before += size + directory
    most += size
    told_by = f"of {len(ranks)} ranks looked at, 1/{before // most} of before"
    print(f"before: {before} bytes read by a rank (whole manifest, all indexes of its tensors)")
    print(f"{most} bytes read by a rank at most, {told_by}: {'within' if most <= 1_000_000 else 'OVER'} 1 MB")


if __name__ == "__main__":
    main()
