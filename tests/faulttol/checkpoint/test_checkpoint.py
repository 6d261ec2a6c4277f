"""A checkpoint is whole or doesn't exist, belongs to one run and its newest attempt, and old ones go."""

from __future__ import annotations

import errno
import json
import logging
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from configs.errors import UserError
from faulttol.checkpoint import load as loading
from faulttol.checkpoint import save as saving
from faulttol.checkpoint.folder import CheckpointFolder, folder_of, run_tag
from faulttol.checkpoint.manifest import Incomplete, ManifestHead, SaveSuperseded
from faulttol.checkpoint.peers import SoloPeers, by_rank
from faulttol.checkpoint.pieces import TensorPiece
from faulttol.checkpoint.save import Retention, Saved, save
from faulttol.checkpoint.store import CheckpointStore
from tests.faulttol.ranks import LAYOUT, identity, piece, pieces, save_all, together

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


def _steps(root: Path) -> list[int]:
    return [commit.step for commit in CheckpointFolder(CheckpointStore(str(root))).commits]


def _newest(root: Path) -> ManifestHead | None:
    return loading.newest(loading.stored(str(root)), SoloPeers())


def _refusal(answers: list[Saved | Exception], kind: type[Exception]) -> str:
    """What all ranks raised alike."""
    assert all(type(answer) is kind for answer in answers), answers
    assert len({str(answer) for answer in answers}) == 1
    return str(answers[0])


# ---- saving ----


@pytest.mark.parametrize("world", [1, 2, 5])
def test_all_ranks_are_told_the_same(tmp_path: Path, world: int) -> None:
    answers = save_all(tmp_path, 30, world)
    assert all(isinstance(a, Saved) and a.step == 30 and a.bytes > 1000 * world for a in answers)
    assert {a.path for a in answers if isinstance(a, Saved)} == {f"{tmp_path}/step-0000000030"}
    files = list((tmp_path / folder_of(30)).iterdir())
    assert len(files) == world + 2, "and the directory and the manifest"
    assert answers[0].bytes == sum(p.stat().st_size for p in files if p.suffix == ".safetensors")


def test_a_manifest_tells_what_was_saved(tmp_path: Path) -> None:
    save_all(tmp_path, 30)
    for found in together(2, lambda rank, peers: loading.newest(loading.stored(str(tmp_path)), peers)):
        assert isinstance(found, ManifestHead)
        assert (found.run, found.attempt, found.step, found.world) == ("run-1", 1, 30, 2)
        assert found.layout == LAYOUT and found.facts == {"loss": 30 / 7}
    folder = CheckpointFolder(CheckpointStore(str(tmp_path)))
    manifest = folder.manifest(folder.commits[-1])
    assert {name: (t.dtype, t.shape, t.ranks) for name, t in manifest.tensors.items()} == {
        "weight": ("uint8", (2000,), ((0, 1),)),
        "bias": ("uint8", (10,), ((1, 1),)),
        "own/0": ("uint8", (7,), ((0, 0),)),
        "own/1": ("uint8", (7,), ((1, 1),)),
    }


def test_a_step_is_read_by_its_number(tmp_path: Path) -> None:
    save_all(tmp_path, 1)
    save_all(tmp_path, 2)

    def only(step: int) -> list[loading.Tier]:
        return [replace(tier, step=step) for tier in loading.stored(str(tmp_path))]

    for head in together(2, lambda rank, peers: loading.newest(only(1), peers)):
        assert isinstance(head, ManifestHead) and head.step == 1
    for refusal in together(2, lambda rank, peers: loading.newest(only(3), peers)):
        assert isinstance(refusal, UserError) and "step-0000000003' isn't a committed checkpoint" in str(
            refusal
        )


def test_nothing_was_saved_yet(tmp_path: Path) -> None:
    assert together(2, lambda rank, peers: loading.newest(loading.stored(str(tmp_path / "none")), peers)) == [
        None,
        None,
    ]


def test_the_newest_is_found_by_its_manifest(tmp_path: Path) -> None:
    for step in (9, 100, 20):
        save_all(tmp_path, step, keep=5)
    (tmp_path / folder_of(100) / "run-1.a0001.manifest.json").unlink()
    assert _steps(tmp_path) == [9, 20]
    found = _newest(tmp_path)
    assert found is not None and found.step == 20


def test_an_odd_run_id_is_a_file_name(tmp_path: Path) -> None:
    for run in ("a b/c:ü%", "long" * 60, "dots.a0007.r1"):
        root = tmp_path / run_tag(run)
        assert all(isinstance(a, Saved) for a in save_all(root, 1, run=run))
        found = _newest(root)
        assert found is not None and found.run == run


def test_boxes_without_elements_are_no_matter(tmp_path: Path) -> None:
    def parts(rank: int) -> list[TensorPiece]:
        return [piece("w", bytes(6) if rank else b"", 6, 0)]

    answers = together(
        2, lambda rank, peers: save(str(tmp_path), 5, parts(rank), identity(rank, 2), {}, peers, Retention(2))
    )
    assert all(isinstance(a, Saved) for a in answers), answers


# ---- failures while saving ----


def test_one_rank_that_cannot_write_fails_all_and_commits_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_all(tmp_path, 10)
    write = CheckpointStore.write

    def full(self: CheckpointStore, name: str, chunks: object) -> int:
        if ".r00001." in name:
            raise OSError(errno.ENOSPC, "No space left on device")
        return write(self, name, chunks)  # type: ignore[arg-type]

    monkeypatch.setattr(CheckpointStore, "write", full)
    told = _refusal(save_all(tmp_path, 20), Incomplete)
    assert "step 20 was not saved" in told and "rank 1: OSError" in told and "No space left" in told
    assert list((tmp_path / folder_of(20)).iterdir()) == [], "the room is given back"
    assert _steps(tmp_path) == [10]


def test_a_manifest_that_cannot_be_written_fails_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: CheckpointStore, name: str, chunks: object) -> int:
        assert name.endswith("manifest.json")
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(CheckpointStore, "create", refuse)
    assert "Permission denied" in _refusal(save_all(tmp_path, 20), Incomplete)
    assert _steps(tmp_path) == [] and list((tmp_path / folder_of(20)).iterdir()) == []


def test_a_commit_whose_answer_was_lost_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The request is repeated, and meets the manifest that it has written itself."""
    create = CheckpointStore.create

    def twice(self: CheckpointStore, name: str, chunks: list[bytes]) -> int:
        create(self, name, chunks)
        return create(self, name, chunks)

    monkeypatch.setattr(CheckpointStore, "create", twice)
    assert all(isinstance(a, Saved) for a in save_all(tmp_path, 20))
    assert _steps(tmp_path) == [20]


def test_a_folder_that_cannot_be_listed_fails_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: CheckpointStore, folder: str = "") -> list[str]:
        raise PermissionError(errno.EACCES, "Permission denied")

    monkeypatch.setattr(CheckpointStore, "names", refuse)
    assert "step 1 was not saved" in _refusal(save_all(tmp_path, 1), Incomplete)


def test_a_disk_that_fills_up_leaves_no_temporary_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", fail)
    (tmp_path / "there").mkdir()
    with pytest.raises(OSError, match="No space left"):
        CheckpointStore(str(tmp_path)).write("there/file", [b"x" * 100])
    assert list((tmp_path / "there").iterdir()) == []


@pytest.mark.parametrize(
    ("parts", "why"),
    [
        ([[piece("w", bytes(6), 10, 0)], [piece("w", bytes(6), 10, 4)]], r"w\[4:6\] has two sources"),
        ([[piece("w", bytes(6), 10, 0)], [piece("w", bytes(6), 10, 0)]], r"w\[0:6\] has two sources"),
        ([[piece("w", bytes(6), 10, 0)], [piece("w", bytes(3), 10, 6)]], r"w\[9:10\] of \[10\] has no source"),
        ([[piece("w", bytes(6), 10, 0)], [piece("w", bytes(4), 11, 6)]], r"w is uint8\[10\] on rank 0 and uint8\[11\]"),
        ([[piece("w", bytes(5), 10, 0), piece("w", bytes(5), 10, 0)], []], r"w\[0:5\] is there twice on rank 0"),
        ([[TensorPiece("w", "uint8", piece("w", bytes(4), 4, 0).box, memoryview(bytes(3)))], []], "has 3 bytes, and 4"),
        ([[TensorPiece("w", "int3", piece("w", bytes(4), 4, 0).box, memoryview(bytes(4)))], []], "w is int3, which"),
    ],
)  # fmt: skip
def test_ranks_that_contradict_each_other_are_refused(
    tmp_path: Path, parts: list[list[TensorPiece]], why: str
) -> None:
    answers = together(
        2, lambda rank, peers: save(str(tmp_path), 5, parts[rank], identity(rank, 2), {}, peers, Retention(2))
    )
    with pytest.raises(Incomplete, match=why):
        raise Incomplete(_refusal(answers, Incomplete))
    assert _steps(tmp_path) == [] and list((tmp_path / folder_of(5)).iterdir()) == []


def test_facts_that_are_no_json_are_told(tmp_path: Path) -> None:
    with pytest.raises(Incomplete, match="step 1 was not saved.*TypeError.*set"):
        save(str(tmp_path), 1, pieces(0, 1, 1), identity(0, 1), {"x": {1}}, SoloPeers(), Retention(1))


# ---- interrupted and repeated saves ----


def test_a_second_save_of_a_step_does_not_mix_with_the_first(tmp_path: Path) -> None:
    """An interrupted save has left one file; the next one of the same step takes none of it, and removes it."""
    save_all(tmp_path, 10)
    (left,) = (tmp_path / folder_of(10)).glob("*.r00001.*")
    (tmp_path / folder_of(10) / "run-1.a0001.manifest.json").unlink()
    save_all(tmp_path, 10)
    found = _newest(tmp_path)
    assert found is not None and found.token not in left.name
    assert not left.exists() and len(list((tmp_path / folder_of(10)).iterdir())) == 4, "and then it goes"


def test_old_checkpoints_are_removed_after_the_commit(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_all(tmp_path, step, keep=2)
    assert sorted(p.name for p in tmp_path.iterdir()) == [folder_of(3), folder_of(4)]


def test_leftovers_are_removed_and_what_is_newer_or_not_ours_left_alone(tmp_path: Path) -> None:
    def make(step: int, name: str) -> None:
        (tmp_path / folder_of(step)).mkdir(exist_ok=True)
        (tmp_path / folder_of(step) / name).write_bytes(b"x")

    make(1, "run-1.a0001.r00000.dead.safetensors")
    make(2, ".run-1.a0001.r00000.dead.safetensors.beef.tmp")
    make(3, "run-2.a0001.r00000.dead.safetensors")
    make(3, "run-1.a0001.r00000.dead.safetensors")
    make(9, "run-1.a0001.r00000.dead.safetensors")
    (tmp_path / folder_of(4)).mkdir()
    (tmp_path / "notes.txt").write_text("mine")
    save_all(tmp_path, 5, keep=1)
    names = {str(p.relative_to(tmp_path)) for p in tmp_path.rglob("*") if p.is_file()}
    assert {name for name in names if folder_of(5) not in name} == {
        f"{folder_of(3)}/run-2.a0001.r00000.dead.safetensors",
        f"{folder_of(9)}/run-1.a0001.r00000.dead.safetensors",
        "notes.txt",
    }
    assert not (tmp_path / folder_of(4)).exists()


def test_the_manifest_goes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Otherwise a removal that is interrupted leaves a manifest without its files."""
    save_all(tmp_path, 1, keep=1)
    removed: list[str] = []
    monkeypatch.setattr(CheckpointStore, "remove", lambda self, name: removed.append(name))
    save_all(tmp_path, 2, keep=1)
    assert removed == [f"{folder_of(1)}/run-1.a0001.manifest.json", folder_of(1)]


def test_a_removal_that_fails_is_told_and_training_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse(self: CheckpointStore, name: str) -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    save_all(tmp_path, 1, keep=1)
    monkeypatch.setattr(CheckpointStore, "remove", refuse)
    with caplog.at_level(logging.WARNING):
        assert all(isinstance(a, Saved) for a in save_all(tmp_path, 2, keep=1))
    assert "could not remove old checkpoints" in caplog.text and "Permission denied" in caplog.text


# ---- whose folder it is ----


def test_another_runs_folder_is_refused_and_left_as_it_is(tmp_path: Path) -> None:
    save_all(tmp_path, 1)
    before = {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()}
    told = _refusal(save_all(tmp_path, 2, keep=1, run="run-2"), UserError)
    assert (
        "belongs to run run-1" in told and "this is run run-2: type checkpoint.path= another folder" in told
    )
    assert f"checkpoint.path='{tmp_path}'" in told and "\n" not in told
    assert {p: p.read_bytes() for p in tmp_path.rglob("*") if p.is_file()} == before


def test_a_run_that_committed_meanwhile_owns_the_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both began in an empty folder; the second to commit is refused, and its files go."""
    write, met = CheckpointStore.write, []

    def slow(self: CheckpointStore, name: str, chunks: object) -> int:
        if "run-2" in name and not met:
            met.append(name)
            save_all(tmp_path, 1, world=1)
        return write(self, name, chunks)  # type: ignore[arg-type]

    monkeypatch.setattr(CheckpointStore, "write", slow)
    assert "belongs to run run-1" in _refusal(save_all(tmp_path, 1, world=1, run="run-2"), UserError)
    assert met and not list(tmp_path.rglob("run-2*"))


def test_a_mixed_folder_is_refused(tmp_path: Path) -> None:
    save_all(tmp_path / "a", 1)
    save_all(tmp_path / "b", 2, run="run-2")
    (tmp_path / "b" / folder_of(2)).rename(tmp_path / "a" / folder_of(2))
    with pytest.raises(UserError, match=r"holds checkpoints of several runs \(run-1, run-2\): move"):
        _newest(tmp_path / "a")
    assert "several runs (run-1, run-2)" in _refusal(save_all(tmp_path / "a", 3), UserError)


def test_format_1_is_refused_by_name(tmp_path: Path) -> None:
    folder = tmp_path / folder_of(12)
    folder.mkdir()
    (folder / "manifest.json").write_text(json.dumps({"format": 1, "step": 12, "shards": []}))
    (folder / "00000-abcd.bin").write_bytes(b"x")
    why = (
        r"format 1 \(step-0000000012\).*end that run with the version that began it, or type checkpoint.path="
    )
    for act in (
        lambda: _newest(tmp_path),
        lambda: loading.restore(loading.stored(str(tmp_path)), [], SoloPeers(), identity(0, 1)),
        lambda: save(str(tmp_path), 20, pieces(0, 1, 20), identity(0, 1), {}, SoloPeers(), Retention(1)),
    ):
        with pytest.raises(UserError, match=why):
            act()
    assert len(list(tmp_path.rglob("*"))) == 3, "nothing of it was pruned"


# ---- attempts ----


def test_a_late_writer_of_an_older_attempt_commits_nothing(tmp_path: Path) -> None:
    save_all(tmp_path, 10, attempt=2)
    for step in (10, 5, 20):
        told = _refusal(save_all(tmp_path, step, attempt=1), SaveSuperseded)
        assert "attempt 2 of run run-1 has saved" in told and "this is attempt 1, which is over" in told
    assert _steps(tmp_path) == [10] and not list(tmp_path.rglob("*.a0001.*"))


def test_a_newer_attempt_that_starts_during_a_save_shuts_it_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write, met = CheckpointStore.write, []

    def slow(self: CheckpointStore, name: str, chunks: object) -> int:
        if ".a0001.r" in name and not met:
            met.append(name)
            save_all(tmp_path, 10, world=1, attempt=2)
        return write(self, name, chunks)  # type: ignore[arg-type]

    monkeypatch.setattr(CheckpointStore, "write", slow)
    assert "attempt 2" in _refusal(save_all(tmp_path, 10, world=1, attempt=1), SaveSuperseded)
    found = _newest(tmp_path)
    assert met and found is not None and (found.attempt, found.step) == (2, 10)


def test_a_manifest_that_comes_late_replaces_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Even where an old writer passed the last check: names of attempts differ, and the newest attempt counts."""
    save_all(tmp_path, 10, attempt=2)
    monkeypatch.setattr(CheckpointFolder, "check_owner", lambda self, who: None)
    save_all(tmp_path, 10, attempt=1)
    save_all(tmp_path, 15, attempt=1)
    found = _newest(tmp_path)
    assert found is not None and (found.attempt, found.step) == (2, 10)


def test_an_attempts_branch_that_was_left_is_retired(tmp_path: Path) -> None:
    """Attempt 2 went back before step 50 of attempt 1, whose steps go as soon as it has `keep` of its own."""
    save_all(tmp_path, 40, keep=2)
    save_all(tmp_path, 50, keep=2)
    save_all(tmp_path, 45, keep=2, attempt=2)
    assert [(c.attempt, c.step) for c in CheckpointFolder(CheckpointStore(str(tmp_path))).commits] == [
        (1, 50),
        (2, 45),
    ]
    save_all(tmp_path, 50, keep=2, attempt=2)
    assert [(c.attempt, c.step) for c in CheckpointFolder(CheckpointStore(str(tmp_path))).commits] == [
        (2, 45),
        (2, 50),
    ]
    assert not list(tmp_path.rglob("*.a0001.*"))


def test_the_module_has_no_torch() -> None:
    code = f"import sys, {saving.__name__}, {loading.__name__}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


@pytest.mark.parametrize(
    ("failed", "said"),
    [
        ([(3, "a")], "rank 3: a"),
        ([(rank, "disk full") for rank in range(512)], "rank 0 and 511 more: disk full"),
        ([(0, "a"), (1, "b"), (2, "a")], "rank 0 and 1 more: a; rank 1: b"),
        ([(0, "a"), (1, "b"), (2, "c"), (3, "d")], "rank 0: a; rank 1: b; rank 2: c; and another"),
        ([(rank, str(rank)) for rank in range(9)], "rank 0: 0; rank 1: 1; rank 2: 2; and 6 other reasons"),
    ],
)
def test_ranks_that_fail_alike_are_one_reason(failed: list[tuple[int, str]], said: str) -> None:
    assert by_rank(failed) == said
