"""The folder of a run's checkpoints: names that tell run and attempt, what is committed, who owns it, what goes.

    step-0000000200/RUN.a0002.manifest.json              commits step 200 of the run's second attempt
    step-0000000200/RUN.a0002.r00005.1f3a9c07.safetensors    rank 5's file, with a word that is new in each save

An attempt never writes a name that another attempt writes, so a late writer can't replace a newer attempt's files.
"""

from __future__ import annotations

import hashlib
import re
from dataclasses import dataclass
from urllib.parse import quote

from configs.errors import UserError
from faulttol.checkpoint.manifest import Identity, Incomplete, Manifest, Superseded
from faulttol.checkpoint.store import Store

_STEP = re.compile(r"step-(\d{10,})")
_FILE = re.compile(
    r"\.?(?P<run>.+)\.a(?P<attempt>\d{4,})\."
    r"((?P<manifest>manifest\.json)|manifest\.json\.\w+\.tmp|r\d+\.\w+\.safetensors(\.\w+\.tmp)?)"
)
"""A file of a commit, or what a writer that was killed left of one."""
_OLD = "manifest.json"
"""The manifest of format 1."""
_LONGEST = 100


def folder_of(step: int) -> str:
    """Folder of a step's checkpoint; names sort by step."""
    return f"step-{step:010d}"


def tag(run: str) -> str:
    """A run's id as it stands in file names."""
    word = quote(run, safe="")
    if len(word) > _LONGEST:
        word = f"{word[: _LONGEST - 9]}-{hashlib.sha256(run.encode()).hexdigest()[:8]}"
    return word


@dataclass(frozen=True, order=True)
class Commit:
    """A step that an attempt has begun to save; the newest has the newest attempt, then the highest step."""

    attempt: int
    step: int
    run: str
    """As `tag` gives it."""

    @property
    def prefix(self) -> str:
        """How its files' names begin, with the folder."""
        return f"{folder_of(self.step)}/{self.run}.a{self.attempt:04d}."

    @property
    def manifest(self) -> str:
        """Its manifest."""
        return f"{self.prefix}manifest.json"

    def shard(self, rank: int, token: str) -> str:
        """A rank's file."""
        return f"{self.prefix}r{rank:05d}.{token}.safetensors"


class Folder:
    """What lies under a checkpoint path: one listing, which doesn't change any more."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._files: dict[str, list[str]] = {}
        """Names by folder."""
        self.commits: list[Commit] = []
        """With a manifest, oldest first."""
        self.begun: list[Commit] = []
        """Without one: interrupted or still being written."""
        self.old: list[int] = []
        """Steps that were saved in format 1."""
        for folder in store.names():
            match = _STEP.fullmatch(folder)
            if match:
                self._files[folder] = store.names(folder)
                self._sort(int(match[1]), self._files[folder])
        self.commits.sort()

    def _sort(self, step: int, names: list[str]) -> None:
        found: dict[Commit, bool] = {}
        for name in names:
            match = _FILE.fullmatch(name)
            if match:
                commit = Commit(int(match["attempt"]), step, match["run"])
                found[commit] = found.get(commit, False) or match["manifest"] is not None
        self.commits += [commit for commit, committed in found.items() if committed]
        self.begun += [commit for commit, committed in found.items() if not committed]
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

    def admit(self, identity: Identity) -> None:
        """Refuse all but the run that owns the folder, and its attempts before the newest.

        Raises:
            UserError: where the checkpoints are another run's or of format 1.
            Superseded: where a newer attempt of the run has begun to save.
        """
        self.refuse_others()
        own = tag(identity.run)
        for commit in self.commits:
            if commit.run != own:
                raise UserError(
                    f"checkpoint.path='{self._store.url}' belongs to run {commit.run}, whose checkpoints are in it, and "
                    f"this is run {identity.run}: type checkpoint.path= another folder"
                )
        newest = max((c.attempt for c in [*self.commits, *self.begun] if c.run == own), default=0)
        if newest > identity.attempt:
            raise Superseded(
                f"attempt {newest} of run {identity.run} has saved to {self._store.url}, and this is attempt "
                f"{identity.attempt}, which is over; a new start of the run needs a higher MEGARAY_ATTEMPT"
            )

    def manifest(self, commit: Commit) -> Manifest:
        """The manifest of a commit, whose files are all there.

        Raises:
            Incomplete: where it is unreadable, contradicts its name, or a file is missing.
        """
        path = f"{self._store.url.rstrip('/')}/{commit.manifest}"
        try:
            found = Manifest.parse(self._store.read(commit.manifest))
        except Incomplete as error:
            raise Incomplete(f"{path}: {error}") from None
        except OSError as error:
            raise Incomplete(f"{path} can't be read: {error}") from None
        if (tag(found.run), found.attempt, found.step) != (commit.run, commit.attempt, commit.step):
            raise Incomplete(
                f"{path} is that of step {found.step}, attempt {found.attempt} of run {found.run}: "
                "files of two checkpoints are mixed"
            )
        folder = folder_of(commit.step)
        needed = {commit.shard(rank, found.token) for rank in range(found.world)}
        missing = sorted(needed - {f"{folder}/{name}" for name in self._files[folder]})
        if missing:
            raise Incomplete(
                f"{self._store.url.rstrip('/')}/{missing[0]} is missing, of {len(missing)} files"
            )
        return found

    def retire(self, identity: Identity, keep: int, newest: Commit, token: str) -> None:
        """Remove all but the newest `keep` checkpoints, and what interrupted saves up to now left: own ones only.

        Manifests go first: a removal that is interrupted leaves no manifest without its files.

        Args:
            newest: the commit that was just made.
            token: word in the names of its files.
        """
        own = tag(identity.run)
        mine = [commit for commit in self.commits if commit.run == own]
        kept = mine[-keep:]
        oldest = min(commit.step for commit in kept)
        empty = [name for name, files in self._files.items() if not files and name < folder_of(oldest)]
        stale = [c for c in self.begun if c.run == own and c.step < oldest]
        for commit in mine[:-keep]:
            self._store.remove(commit.manifest)
        for commit in [*mine[:-keep], *stale]:
            self._remove(commit)
        for name in empty:
            self._store.remove(name)
        folder = folder_of(newest.step)
        for name in self._names(newest):
            if f".{token}." not in name and f"{folder}/{name}" != newest.manifest:
                self._store.remove(f"{folder}/{name}")

    def _remove(self, commit: Commit) -> None:
        """Remove a commit's files, or at once its folder where nothing else is in it."""
        folder, names = folder_of(commit.step), self._names(commit)
        if names == self._files[folder]:
            self._store.remove(folder)
        else:
            for name in names:
                self._store.remove(f"{folder}/{name}")

    def _names(self, commit: Commit) -> list[str]:
        """Names of a commit's files, and of what was to become one."""
        folder = folder_of(commit.step)
        start = commit.prefix.removeprefix(f"{folder}/")
        return [name for name in self._files.get(folder, ()) if name.startswith((start, f".{start}"))]
