"""The folder of a run's checkpoints: names that tell run and attempt, what is committed, who owns it, what goes.

    step-0000000200/RUN.a0002.manifest.json              commits step 200 of the run's second attempt
    step-0000000200/RUN.a0002.r00005.1f3a9c07.safetensors    rank 5's file, with a word that is new in each save
    step-0000000200/RUN.a0002.directory.1f3a9c07.jsonl   what is in which file
    step-0000000200/RUN.a0002.pin-best                   keeps it whatever the retention says
    step-0000000200/RUN.a0002.unpinned-agreed-200        a person has unpinned it: the run doesn't pin it again
    step-0000000200/RUN.a0002.use-9b1d22e0               keeps it while a reader renews this

An attempt never writes a name that another attempt writes, so a late writer can't replace a newer attempt's files.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from urllib.parse import quote

from configs.errors import UserError
from faulttol.checkpoint.manifest import (
    DirectoryBlock,
    Identity,
    Incomplete,
    Manifest,
    ManifestHead,
    SaveSuperseded,
    ShardFile,
    Tensor,
    digest,
    files_of,
    tensors_of,
)
from faulttol.checkpoint.store import StoreLike

_STEP = re.compile(r"step-(\d{10,})")
_NAMED = re.compile(r"(?P<root>.+?)/+step-0*(?P<step>\d+)/*")
_FILE = re.compile(
    r"\.?(?P<run>.+)\.a(?P<attempt>\d{4,})\."
    r"((?P<manifest>manifest\.json)|pin-(?P<pin>[\w-]+)|use-(?P<use>\w+)"
    r"|manifest\.json\.\w+\.tmp|(r\d+\.\w+\.safetensors|directory\.\w+\.jsonl)(\.\w+\.tmp)?)"
)
"""A file of a commit, or what a writer that was killed left of one."""
_OLD = "manifest.json"
"""The manifest of format 1."""
_LONGEST = 100
_FEW = 8
_THREADS = 8
"""Folders that are listed at once where there are more than a few."""


def folder_of(step: int) -> str:
    """Folder of a step's checkpoint; names sort by step."""
    return f"step-{step:010d}"


def parse_checkpoint_path(path: str) -> tuple[str, int | None]:
    """Folder or URL of checkpoints, and the step where the path is one step's folder."""
    match = _NAMED.fullmatch(path)
    return (match["root"], int(match["step"])) if match else (path.rstrip("/") or "/", None)


def run_tag(run: str) -> str:
    """A run's id as it stands in file names."""
    word = quote(run, safe="")
    if len(word) > _LONGEST:
        word = f"{word[: _LONGEST - 9]}-{hashlib.sha256(run.encode()).hexdigest()[:8]}"
    return word


@dataclass(frozen=True, order=True)
class CheckpointCommit:
    """A step that an attempt has begun to save; the newest has the newest attempt, then the highest step."""

    attempt: int
    step: int
    run: str
    """As `run_tag` gives it."""

    @property
    def prefix(self) -> str:
        """How its files' names begin, with the folder."""
        return f"{folder_of(self.step)}/{self.run}.a{self.attempt:04d}."

    @property
    def manifest(self) -> str:
        """Its manifest."""
        return f"{self.prefix}manifest.json"

    def directory(self, token: str) -> str:
        """Its directory."""
        return f"{self.prefix}directory.{token}.jsonl"

    def shard(self, rank: int, token: str) -> str:
        """A rank's file."""
        return f"{self.prefix}r{rank:05d}.{token}.safetensors"


class CheckpointFolder:
    """What lies under a checkpoint path: one listing, which doesn't change any more."""

    def __init__(self, store: StoreLike) -> None:
        self._store = store
        self._files: dict[str, list[str]] = {}
        """Names by folder."""
        self.commits: list[CheckpointCommit] = []
        """With a manifest, oldest first."""
        self.begun: list[CheckpointCommit] = []
        """Without one: interrupted or still being written."""
        self.old: list[int] = []
        """Steps that were saved in format 1."""
        self.pins: dict[CheckpointCommit, list[str]] = {}
        """Names that commits are pinned under."""
        self.uses: dict[CheckpointCommit, list[str]] = {}
        """Words of those who read commits, or did once."""
        self._whole: dict[CheckpointCommit, bool] = {}
        steps = {name: int(match[1]) for name in store.names() if (match := _STEP.fullmatch(name))}
        if len(steps) > _FEW:  # an object store answers a thousand names a request
            with ThreadPoolExecutor(_THREADS) as pool:
                self._files = dict(zip(steps, pool.map(store.names, steps), strict=True))
        else:
            self._files = {name: store.names(name) for name in steps}
        for name, step in steps.items():
            self._sort(step, self._files[name])
        self.commits.sort()

    def _sort(self, step: int, names: list[str]) -> None:
        has_manifest: dict[CheckpointCommit, bool] = {}
        for name in names:
            match = _FILE.fullmatch(name)
            if not match:
                continue
            commit = CheckpointCommit(int(match["attempt"]), step, match["run"])
            if match["pin"]:
                self.pins.setdefault(commit, []).append(match["pin"])
            elif match["use"]:
                self.uses.setdefault(commit, []).append(match["use"])
            else:
                has_manifest[commit] = has_manifest.get(commit, False) or match["manifest"] is not None
        self.commits += [commit for commit, committed in has_manifest.items() if committed]
        self.begun += [commit for commit, committed in has_manifest.items() if not committed]
        self.old += [step] if _OLD in names else []

    def refuse_others(self) -> None:
        """Refuse what isn't the work of one run in this format.

        Raises:
            UserError: for format 1, and for the manifests of several runs.
        """
        if self.old:
            raise UserError(
                f"checkpoint.path='{self._store.url}' holds checkpoints of format 1 ({folder_of(self.old[-1])}), which "
                "knew one layout only and isn't read any more: end that run with the version that began it, or type "
                "checkpoint.path= another folder"
            )
        runs = sorted({commit.run for commit in self.commits})
        if len(runs) > 1:
            raise UserError(
                f"checkpoint.path='{self._store.url}' holds checkpoints of several runs ({', '.join(runs)}): move each "
                "run's step folders into a folder of its own and type checkpoint.path= that"
            )

    def check_owner(self, identity: Identity) -> None:
        """Refuse all but the run that owns the folder, and its attempts before the newest.

        Raises:
            UserError: where the checkpoints are another run's or of format 1.
            SaveSuperseded: where a newer attempt of the run has begun to save.
        """
        self.refuse_others()
        own = run_tag(identity.run)
        for commit in self.commits:
            if commit.run != own:
                raise UserError(
                    f"checkpoint.path='{self._store.url}' belongs to run {commit.run}, whose checkpoints are in it, and "
                    f"this is run {identity.run}: type checkpoint.path= another folder"
                )
        newest = max((c.attempt for c in [*self.commits, *self.begun] if c.run == own), default=0)
        if newest > identity.attempt:
            raise SaveSuperseded(
                f"attempt {newest} of run {identity.run} has saved to {self._store.url}, and this is attempt "
                f"{identity.attempt}, which is over; a new start of the run needs a higher MEGARAY_ATTEMPT"
            )

    def head(self, commit: CheckpointCommit) -> ManifestHead:
        """The manifest of a commit, whose files are all there.

        Raises:
            Incomplete: where it is unreadable, contradicts its name, or a file is missing.
        """
        path = f"{self._store.url.rstrip('/')}/{commit.manifest}"
        try:
            head = ManifestHead.parse(self._store.read(commit.manifest))
        except Incomplete as error:
            raise Incomplete(f"{path}: {error}") from None
        except OSError as error:
            raise Incomplete(f"{path} can't be read: {error}") from None
        if (run_tag(head.run), head.attempt, head.step) != (commit.run, commit.attempt, commit.step):
            raise Incomplete(
                f"{path} is that of step {head.step}, attempt {head.attempt} of run {head.run}: "
                "files of two checkpoints are mixed"
            )
        folder = folder_of(commit.step)
        needed = {commit.shard(rank, head.token) for rank in range(head.world)}
        needed.add(commit.directory(head.token))
        missing = sorted(needed - {f"{folder}/{name}" for name in self._files[folder]})
        if missing:
            raise Incomplete(
                f"{self._store.url.rstrip('/')}/{missing[0]} is missing, of {len(missing)} files"
            )
        return head

    def manifest(self, commit: CheckpointCommit) -> Manifest:
        """The manifest of a commit with its whole directory.

        Raises:
            Incomplete: as `head` does, and where the directory is missing, torn or changed.
        """
        return ManifestDirectory(self._store, self.head(commit)).whole()

    def whole(self, commit: CheckpointCommit) -> bool:
        """Whether the manifest can be read and all files are there; what is in them isn't looked at."""
        if commit not in self._whole:
            try:
                self.head(commit)
                self._whole[commit] = True
            except Incomplete:
                self._whole[commit] = False
        return self._whole[commit]

    def lease_times(self, commit: CheckpointCommit) -> list[float]:
        """When readers last renewed their leases, in seconds since 1970."""
        renewed: list[float] = []
        for word in self.uses.get(commit, ()):
            try:
                renewed.append(float(self._store.read(f"{commit.prefix}use-{word}")))
            except (OSError, ValueError):  # gone, or its writer was killed
                continue
        return renewed

    def names(self, commit: CheckpointCommit) -> list[str]:
        """Names of a commit's files in its folder, and of what was to become one."""
        folder = folder_of(commit.step)
        start = commit.prefix.removeprefix(f"{folder}/")
        return [name for name in self._files.get(folder, ()) if name.startswith((start, f".{start}"))]

    def alone(self, commit: CheckpointCommit) -> bool:
        """Whether nothing but a commit's files is in its folder."""
        return self.names(commit) == self._files[folder_of(commit.step)]

    def empty(self, before: int) -> list[str]:
        """Folders of steps before `before` with nothing in them."""
        return [name for name, files in self._files.items() if not files and name < folder_of(before)]


class ManifestDirectory:
    """What a checkpoint's directory tells, read block by block where it is asked for, each verified."""

    def __init__(self, store: StoreLike, head: ManifestHead) -> None:
        self.head = head
        self._store = store
        commit = CheckpointCommit(head.attempt, head.step, run_tag(head.run))
        self._name = commit.directory(head.token)
        self._tensors: dict[int, dict[str, Tensor]] = {}
        self._files: dict[int, list[ShardFile]] = {}
        self.bytes = 0
        """Read so far."""

    def find(self, names: Iterable[str]) -> dict[str, Tensor]:
        """Tensors by name, those of the names that are there.

        Raises:
            Incomplete: where a block is missing, torn or changed, naming its tensors.
        """
        wanted = list(names)
        numbers = self.head.blocks_of(wanted)
        new = [number for number in numbers if number not in self._tensors]
        for number, text in self._read(self.head.tensors, new, "tensors"):
            self._tensors[number] = tensors_of(text)
        known: dict[str, Tensor] = {}
        for number in numbers:
            known |= self._tensors[number]
        return {name: known[name] for name in wanted if name in known}

    @property
    def known(self) -> list[str]:
        """Names of tensors in the blocks that were read."""
        return [name for tensors in self._tensors.values() for name in tensors]

    def marks(self, names: Iterable[str]) -> int:
        """A bit for each tensor of the directory, in its order: whether it is among `names`, all of them there."""
        here, first, marks = set(names), 0, 0
        for number, block in enumerate(self.head.tensors):
            for place, name in enumerate(self._tensors.get(number, ())):
                marks |= (name in here) << (first + place)
            first += block.count
        return marks

    def unmarked(self, marks: int, most: int) -> list[str]:
        """Names of tensors without a bit in `marks`, at most so many."""
        unmarked: list[str] = []
        first = 0
        for number, block in enumerate(self.head.tensors):
            full = (1 << block.count) - 1
            if marks >> first & full != full and len(unmarked) < most:
                self.find([str(block.first)])
                names = list(self._tensors[number])
                unmarked += [name for at, name in enumerate(names) if not marks >> (first + at) & 1]
            first += block.count
        return unmarked[:most]

    def rows(self, ranks: Iterable[int]) -> dict[int, ShardFile]:
        """Files by rank.

        Raises:
            Incomplete: where a block is missing, torn or changed, naming its ranks.
        """
        wanted = list(ranks)
        new = [number for number in self.head.blocks_of_files(wanted) if number not in self._files]
        for number, text in self._read(self.head.files, new, "files"):
            self._files[number] = files_of(text)
        files: dict[int, ShardFile] = {}
        for rank in wanted:
            (number,) = self.head.blocks_of_files([rank])
            files[rank] = self._files[number][rank - int(self.head.files[number].first)]
        return files

    def whole(self) -> Manifest:
        """Everything.

        Raises:
            Incomplete: where it is missing, torn or changed.
        """
        tensors = self.find(str(block.first) for block in self.head.tensors)
        for block in range(len(self.head.tensors)):
            tensors |= self._tensors[block]
        files = self.rows(range(self.head.world))
        return Manifest.join(self.head, dict(sorted(tensors.items())), list(files.values()))

    def _read(
        self, blocks: Sequence[DirectoryBlock], numbers: Sequence[int], what: str
    ) -> Iterator[tuple[int, bytes]]:
        """Blocks by number, neighbours read at once."""
        path = f"{self._store.url.rstrip('/')}/{self._name}"
        at = 0
        while at < len(numbers):
            end = at + 1
            while end < len(numbers) and numbers[end] == numbers[end - 1] + 1:
                end += 1
            first, last = blocks[numbers[at]], blocks[numbers[end - 1]]
            try:
                data = self._store.read_range(self._name, first.offset, last.offset + last.length)
            except OSError as error:
                raise Incomplete(f"{path} can't be read: {error}") from None
            self.bytes += len(data)
            for number in numbers[at:end]:
                block = blocks[number]
                text = bytes(data[block.offset - first.offset :][: block.length])
                if digest(text) != block.digest:
                    torn = "is truncated" if len(text) < block.length else "differs from what was saved"
                    raise Incomplete(
                        f"{path} {torn} in bytes {block.offset} to {block.offset + block.length}, which tell of "
                        f"{block.count} {what} from {block.first} on"
                    )
                yield number, text
            at = end
