"""Loading under any layout: the newest checkpoint that every rank can read, each rank only what it needs of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from configs.errors import UserError, nearest
from faulttol.checkpoint.folder import Commit, Folder, folder_of
from faulttol.checkpoint.manifest import Identity as Identity
from faulttol.checkpoint.manifest import Incomplete, Superseded
from faulttol.checkpoint.manifest import Manifest as Manifest
from faulttol.checkpoint.peers import Failure, Peers, on_first, together
from faulttol.checkpoint.pieces import Wanted as Wanted
from faulttol.checkpoint.reading import Reader
from faulttol.checkpoint.store import Store


@dataclass(frozen=True)
class Restored:
    """A checkpoint that all ranks have loaded."""

    step: int
    facts: dict[str, Any]
    """That were saved with it."""
    path: str
    passed: tuple[str, ...]
    """Why newer checkpoints were passed over."""
    bytes: int
    """That this rank has read."""


def newest(root: str, peers: Peers) -> Manifest | None:
    """The newest checkpoint whose manifest can be read and whose files are there; None where nothing is committed.

    Only rank 0 reads, all ranks call this together and get the same.

    Raises:
        UserError: on every rank, where the folder has checkpoints of format 1 or of several runs.
        Incomplete: on every rank, where checkpoints are committed and no manifest can be read.
    """
    store = Store(root)

    def find() -> Manifest | None:
        folder = Folder(store)
        passed: list[str] = []
        folder.refuse_others()
        for commit in reversed(folder.commits):
            try:
                return folder.manifest(commit)
            except Incomplete as error:
                passed.append(f"step {commit.step}: {error}")
        if passed:
            raise _none_readable(root, passed)
        return None

    first = peers.gather(None) is not None
    found, failure = on_first(peers, first, find)
    if failure is not None:
        raise _error(failure)
    return found


def read_manifest(root: str, step: int, peers: Peers) -> Manifest:
    """The manifest of a step, of its newest attempt. Only rank 0 reads, all ranks call this together.

    Raises:
        UserError: on every rank, where the folder has checkpoints of format 1 or of several runs.
        Incomplete: on every rank, where the step isn't committed, its manifest is damaged or a file is missing.
    """
    store = Store(root)

    def find() -> Manifest:
        folder = Folder(store)
        folder.refuse_others()
        commits = [commit for commit in folder.commits if commit.step == step]
        if not commits:
            raise Incomplete(f"step {step} has no manifest in {root}")
        return folder.manifest(commits[-1])

    first = peers.gather(None) is not None
    found, failure = on_first(peers, first, find)
    if failure is not None or found is None:
        raise _error(failure)
    return found


def restore(root: str, wanted: Sequence[Wanted], peers: Peers, identity: Identity) -> Restored | None:
    """Fill live tensors from the newest checkpoint that every rank can read, whatever layout saved it.

    All ranks call this together and agree on the checkpoint. Each reads the blocks that its boxes touch, and verifies
    each before it is used.

    Args:
        root: folder or fsspec URL.
        wanted: what this rank needs; together the ranks must want every tensor of the checkpoint.
        identity: of this run: another run's checkpoints are refused.

    Returns:
        None where nothing has been committed.

    Raises:
        UserError: on every rank, where the folder is another run's or of format 1, or the newest checkpoint has other
            tensors, shapes or dtypes than the ranks want: the state of another model.
        Incomplete: on every rank, where checkpoints were committed and none can be read: to start afresh would be to
            lose them in silence. Tensors may be half filled then.
    """
    store, first = Store(root), identity.rank == 0
    passed: list[str] = []
    commits, failure = on_first(peers, first, lambda: _candidates(store, identity))
    if failure is not None:
        raise _error(failure)
    for commit in commits or ():
        found = _load(store, commit, wanted, peers, first)
        if not isinstance(found, str):
            manifest, size = found
            path = f"{root.rstrip('/')}/{folder_of(commit.step)}"
            return Restored(commit.step, manifest.facts, path, tuple(passed), size)
        passed.append(f"step {commit.step}: {found}")
    if passed:
        raise _none_readable(root, passed)
    return None


def _candidates(store: Store, identity: Identity) -> list[Commit]:
    """Committed checkpoints of the run, newest first."""
    folder = Folder(store)
    try:
        folder.admit(identity)
    except Superseded as error:  # a restart wouldn't mend it
        raise UserError(str(error)) from None
    return folder.commits[::-1]


def _load(
    store: Store, commit: Commit, wanted: Sequence[Wanted], peers: Peers, first: bool
) -> tuple[Manifest, int] | str:
    """Load one checkpoint: its manifest and the bytes that were read, or why a rank could not."""
    manifest, failure = on_first(peers, first, lambda: Folder(store).manifest(commit))
    if failure is not None or manifest is None:
        if failure is not None and failure[0] is not UserError:
            return failure[1]
        raise _error(failure)
    _refuse_another(store, manifest, wanted, peers)
    reader = Reader(store, manifest, wanted)
    _, failures = together(peers, reader.fill)
    if failures:
        return "; ".join(text for _, text in failures[:3])
    return manifest, reader.bytes


def _refuse_another(store: Store, manifest: Manifest, wanted: Sequence[Wanted], peers: Peers) -> None:
    """Refuse a checkpoint that hasn't exactly the tensors that the ranks want.

    Raises:
        UserError: on every rank, naming tensors.
    """
    names = list(manifest.tensors)
    here = {item.name for item in wanted}
    marks = sum(
        1 << place for place, name in enumerate(names) if name in here
    )  # few bytes for thousands of names
    answers = peers.gather((_differences(manifest, wanted), marks))
    told = None
    if answers is not None:
        problems = list(dict.fromkeys(problem for rows, _ in answers for problem in rows))
        wants = 0
        for _, other in answers:
            wants |= other
        problems += [f"nothing here wants {name}" for at, name in enumerate(names) if not wants >> at & 1]
        told = problems[:3], len(problems)
    problems, count = peers.broadcast(told)
    if problems:
        rest = f"; and {count - len(problems)} more" if count > len(problems) else ""
        raise UserError(
            f"checkpoint.path='{store.url}': {folder_of(manifest.step)} is the state of another model or optimizer "
            f"({'; '.join(problems)}{rest}): set model and optim as run {manifest.run} had them, or type checkpoint.path= "
            "another folder"
        )


def _differences(manifest: Manifest, wanted: Sequence[Wanted]) -> list[str]:
    """Tensors that a rank wants and that the checkpoint hasn't, or has otherwise."""
    found: list[str] = []
    for item in wanted:
        there = manifest.tensors.get(item.name)
        if there is None:
            close = nearest(item.name, manifest.tensors) if not found else ""
            found.append(f"it has no {item.name}{close}")
        elif (there.dtype, there.shape) != (item.dtype, item.box.whole):
            found.append(
                f"{item.name} is {there.dtype}{list(there.shape)} there, and {item.dtype}{list(item.box.whole)} here"
            )
    return found


def _none_readable(root: str, passed: Sequence[str]) -> Incomplete:
    return Incomplete(
        f"no checkpoint in {root} can be read: {' | '.join(passed)}; restore the files, or name another "
        "checkpoint.path to start afresh"
    )


def _error(failure: Failure | None) -> Exception:
    kind, text = failure or (Incomplete, "rank 0 gave no answer")
    return kind(text)
