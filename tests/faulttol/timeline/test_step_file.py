"""The file of a node's steps, windows of many files, and the heat map that is drawn of them."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from faulttol.timeline import codes, reader, step_file
from faulttol.timeline.heat import HeatRequest, deviation, heat_map, joined, median
from faulttol.timeline.reader import AttemptSteps
from faulttol.timeline.step_file import BATCH, CAPACITIES, CLEAR, FACTOR, STORED, StepFile, folder
from tests.conftest import descriptors

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

PRECISION = 3e-4


# ---- codes ----


def test_codes_keep_seconds_to_a_few_parts_in_ten_thousand() -> None:
    seconds = np.array([0.0, 1e-6, 3.3e-5, 0.01, 1.0, 12.5, 3600.0, 9e4, 1e9, np.nan])
    back = codes.decode(codes.encode(seconds))
    assert back[0] == 0 and np.isnan(back[-1]) and back[-2] == pytest.approx(1e5, rel=PRECISION)
    assert back[1:-2] == pytest.approx(seconds[1:-2], rel=PRECISION)
    ordered = codes.encode(np.sort(np.random.default_rng(0).random(500)))
    assert (np.diff(ordered.astype(int)) >= 0).all()


# ---- the file ----


def _fill(path: Path, steps: int, ranks: int = 2, first: int = 0, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).random((len(STORED), ranks, steps)) + 0.1
    made = StepFile(path, path.stem, range(ranks))
    made.append(first, np.arange(steps, dtype=np.int64) + 1, values)
    made.close()
    return values


def _expect(window: reader.Window, values: np.ndarray, first: int) -> None:
    """A window is what the values give by brute force."""
    assert window.mean.shape[1] == len(window.edges) - 1 > 0
    for column, (begin, end) in enumerate(zip(window.edges, window.edges[1:], strict=False)):
        part = values[:, begin - first : end - first]
        assert window.mean[:, column] == pytest.approx(part.mean(1), rel=2 * PRECISION), (begin, end)
        assert window.most[:, column] == pytest.approx(part.max(1), rel=2 * PRECISION), (begin, end)


@pytest.mark.parametrize("steps", [1, 5, 127, 128, 129, 700, 5000, 20_000])
def test_windows_are_what_brute_force_gives(tmp_path: Path, steps: int) -> None:
    values = _fill(folder(tmp_path) / "a.steps", steps, first=40)
    found = AttemptSteps(tmp_path)
    assert found.span == (40, 40 + steps) and found.ranks.tolist() == [0, 1] and found.nodes == {"a": (0, 1)}
    spans = [
        (0, 1 << 60, 200),
        (0, 1 << 60, 7),
        (40 + steps - 9, 1 << 60, 50),
        (40 + steps // 2, 40 + steps - steps // 8, 60),
    ]
    for begin, end, columns in spans:
        for field in ("wait", "lag"):
            window = found.window(field, begin, end, columns)
            if end > begin and begin < 40 + steps:
                _expect(window, values[STORED.index(field)], 40)
                assert window.edges[0] <= max(begin, 40) and window.edges[-1] >= min(end, 40 + steps)
    found.close()


def test_levels_above_are_the_mean_and_the_most_of_the_one_below(tmp_path: Path) -> None:
    steps = FACTOR**5 * 3 + 77
    values = _fill(folder(tmp_path) / "a.steps", steps)
    found = AttemptSteps(tmp_path)
    window = found.window("step", 0, steps, 3)
    assert window.edges[1] - window.edges[0] >= FACTOR**5
    _expect(window, values[0], 0)


def test_appending_bit_by_bit_and_again_after_a_crash_gives_the_same_file(tmp_path: Path) -> None:
    values = _fill(tmp_path / "whole.steps", 3000)
    path, at = tmp_path / "parts.steps", 0
    rng = np.random.default_rng(1)
    while at < 3000:
        made = StepFile(path, "whole", range(2))  # as after a crash: nothing was closed
        assert made.next == (at or None)
        for _ in range(2):
            count = int(rng.integers(1, 400))
            end = min(3000, at + count)
            made.append(at, np.arange(at, end, dtype=np.int64) + 1, values[:, :, at:end])
            at = end
    one, other = (tmp_path / "whole.steps").read_bytes(), path.read_bytes()
    slots = slice(4096, 8192)
    one, other = one[: slots.start] + one[slots.stop :], other[: slots.start] + other[slots.stop :]
    differing = np.flatnonzero(np.frombuffer(one, "u2") != np.frombuffer(other, "u2"))
    # Means over a crash are those of codes, so a last bit may differ.
    gaps = np.frombuffer(one, "u2")[differing].astype(int) - np.frombuffer(other, "u2")[differing].astype(int)
    assert len(one) == len(other) and (np.abs(gaps) <= 1).all() and len(differing) < 300


def test_a_file_that_cannot_be_begun_leaves_no_descriptor(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A node tries again every few seconds for as long as its storage is full."""

    def full(*_: object) -> int:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "pwrite", full)
    before = descriptors()
    for _ in range(3):
        with pytest.raises(OSError, match="No space left"):
            StepFile(tmp_path / "a.steps", "a", [0])
    assert descriptors() <= before


def test_a_write_that_is_taken_in_part_is_completed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inner = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: inner(fd, data[:1000], at))
    values = _fill(folder(tmp_path) / "a.steps", 700)
    _expect(AttemptSteps(tmp_path).window("step", 0, 700, 700), values[0], 0)


def test_a_stale_handle_is_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As after a restart of the file server: each descriptor that was open then answers ESTALE for good."""
    values = _fill(folder(tmp_path) / "a.steps", 50)
    attempt, inner = AttemptSteps(tmp_path), os.pread
    _expect(attempt.window("step", 0, 50, 50), values[0], 0)
    stale = {one.fd for one in attempt._files.values()}
    held = [os.dup(fd) for fd in stale]  # so that the numbers below are others

    def pread(fd: int, size: int, at: int) -> bytes:
        if fd in stale:
            raise OSError(116, "Stale file handle")
        return inner(fd, size, at)

    def close(fd: int) -> None:
        held.append(fd)  # and stay so

    monkeypatch.setattr(reader.os, "pread", pread)
    monkeypatch.setattr(reader.os, "close", close)
    for _ in range(2):
        _expect(attempt.window("step", 0, 50, 50), values[0], 0)
    assert not stale & {one.fd for one in attempt._files.values()} and attempt.span == (0, 50)
    monkeypatch.undo()
    for fd in held:
        os.close(fd)
    attempt.close()


def test_a_file_has_a_bounded_size(tmp_path: Path) -> None:
    _fill(tmp_path / "a.steps", 30_000)
    size = (tmp_path / "a.steps").stat().st_size
    shape = step_file.StepFileShape("a", (0, 1))
    assert size <= shape.offset(len(CAPACITIES) - 1, 7) + shape.block(1)
    _fill(tmp_path / "b.steps", 60_000)
    assert (tmp_path / "b.steps").stat().st_size <= size * 1.05


def test_the_oldest_steps_are_kept_joined(tmp_path: Path) -> None:
    values = _fill(folder(tmp_path) / "a.steps", 9000)
    found = AttemptSteps(tmp_path)
    newest = found.window("data", 9000 - 2000, 9000, 4000)
    assert (np.diff(newest.edges) == 1).all()
    old = found.window("data", 0, 300, 4000)
    assert (np.diff(old.edges) >= FACTOR).all()
    _expect(old, values[STORED.index("data")], 0)


@pytest.mark.parametrize("damaged", [0, 1])
def test_a_commit_that_was_cut_short_leaves_the_one_before(tmp_path: Path, damaged: int) -> None:
    path = folder(tmp_path) / "a.steps"
    made = StepFile(path, "a", [0])
    for step in range(5):
        made.append(step, np.array([step + 1]), np.ones((len(STORED), 1, 1)))
    newest = 5 % 2
    with path.open("r+b") as raw:
        raw.seek(4096 + (newest if damaged == 0 else 1 - newest) * 512 + 20)
        raw.write(b"\xff\xff")
    assert AttemptSteps(tmp_path).span == (0, 4 if damaged == 0 else 5)


def test_foreign_and_broken_files_are_passed_over(tmp_path: Path) -> None:
    folder(tmp_path).mkdir()
    for name, data in (
        ("a", b""),
        ("b", b"MEGASTEPS1\n{"),
        ("c", os.urandom(9000)),
        ("d", b"MEGASTEPS1\n{}" + bytes(9000)),
    ):
        (folder(tmp_path) / f"{name}.steps").write_bytes(data)
    found = AttemptSteps(tmp_path)
    assert found.span is None and found.window("step", 0, 9).mean.shape == (0, 0)
    assert AttemptSteps(tmp_path / "nowhere").span is None


def test_a_file_of_other_ranks_is_begun_anew(tmp_path: Path) -> None:
    _fill(tmp_path / "a.steps", 100)
    made = StepFile(tmp_path / "a.steps", "a", [4, 5, 6])
    assert made.next is None
    assert step_file.shape_of(os.open(tmp_path / "a.steps", os.O_RDONLY)) == step_file.StepFileShape(
        "a", (4, 5, 6)
    )


def test_missing_steps_are_unknown_and_earlier_ones_change_nothing(tmp_path: Path) -> None:
    made = StepFile(folder(tmp_path) / "a.steps", "a", [0])
    ones = np.ones((len(STORED), 1, 3))
    made.append(10, np.arange(1, 4), ones)
    made.append(1500, np.arange(1, 4), 2 * ones)
    made.append(1501, np.arange(1, 5), 3 * np.ones((len(STORED), 1, 4)))
    found = AttemptSteps(tmp_path).window("step", 0, 1 << 60, 4000)
    known = {
        int(edge): float(v) for edge, v in zip(found.edges, found.mean[0], strict=False) if not np.isnan(v)
    }
    assert {step: round(value, 2) for step, value in known.items()} == {
        10: 1.0, 11: 1.0, 12: 1.0, 1500: 2.0, 1501: 2.0, 1502: 2.0, 1503: 3.0, 1504: 3.0,
    }  # fmt: skip


def test_what_is_overwritten_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The writer goes round the whole level between a reader's look at the commit and its read."""
    path = folder(tmp_path) / "a.steps"
    steps = 2 * CAPACITIES[0]
    value = np.tile(np.arange(steps, dtype=float) + 1, (len(STORED), 1, 1))
    made = StepFile(path, "a", [0])
    made.append(0, np.arange(steps, dtype=np.int64) + 1, value)
    found = AttemptSteps(tmp_path)
    assert found.span == (0, steps)
    more = np.full((len(STORED), 1, CAPACITIES[0]), 1e5)
    inner, raced = os.pread, []

    def pread(fd: int, size: int, at: int) -> bytes:
        if not raced and at > 8192:
            raced.append(True)
            made.append(steps, np.arange(CAPACITIES[0]) + 1, more)
        return inner(fd, size, at)

    monkeypatch.setattr(reader.os, "pread", pread)
    window = found.window("step", steps - 100, steps, 400)
    assert raced
    shown = window.mean[0][(window.edges[:-1] >= steps - 100) & (window.edges[:-1] < steps)]
    wrong = shown[~np.isnan(shown)]
    assert (wrong < 9e4).all(), "values of steps that came later"


def test_readers_keep_clear_of_what_the_next_commits_overwrite() -> None:
    for level, capacity in enumerate(CAPACITIES):
        adds = -(-BATCH // FACTOR**level)
        assert capacity > CLEAR[level] >= 2 * adds and CLEAR[level] >= adds + step_file.BLOCK - 1


def test_without_descriptors_files_are_opened_for_each_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    values = {name: _fill(folder(tmp_path) / f"{name}.steps", 50, seed=ord(name)) for name in "abc"}
    for number, name in enumerate("abc"):  # ranks of their own
        raw = (folder(tmp_path) / f"{name}.steps").read_bytes()
        head = step_file.StepFileShape(name, (2 * number, 2 * number + 1)).header
        (folder(tmp_path) / f"{name}.steps").write_bytes(head + raw[len(head) :])
    inner, shut, opened = os.open, os.close, set()

    def limited(path: object, flags: int, mode: int = 0o777) -> int:
        if not str(path).endswith(".steps"):
            return inner(path, flags, mode)  # type: ignore[arg-type]
        if len(opened) == 2:
            raise OSError(24, "Too many open files")
        opened.add(inner(path, flags, mode))  # type: ignore[arg-type]
        return max(opened)

    def closed(fd: int) -> None:
        opened.discard(fd)
        shut(fd)

    monkeypatch.setattr(reader.os, "close", closed)
    monkeypatch.setattr(reader.os, "open", limited)
    found = AttemptSteps(tmp_path).window("save", 0, 50, 50)
    assert found.ranks.tolist() == list(range(6))
    _expect(found, np.concatenate([values[name][STORED.index("save")] for name in "abc"]), 0)


# ---- the heat map ----


def test_the_median_is_that_of_what_is_known() -> None:
    values = np.random.default_rng(0).random((7, 40)).astype(np.float32)
    values[np.random.default_rng(1).random((7, 40)) < 0.4] = np.nan
    values[:, 3] = np.nan
    found = median(values)
    assert np.isnan(found[3])
    known = ~np.isnan(values).all(0)
    assert found[known] == pytest.approx(np.nanmedian(values[:, known], axis=0))


def test_deviation_is_from_the_peers_of_the_stage() -> None:
    values = np.array([[1.0, 2], [1, 2], [1.5, 2], [10, 20], [10, 30], [10, np.nan]], np.float32)
    found = deviation(values, np.array([0, 0, 0, 1, 1, 1]))
    assert found[:5] == pytest.approx(np.array([[0, 0], [0, 0], [0.5, 0], [0, -0.2], [0, 0.2]]), abs=1e-6)
    assert found[5, 0] == 0 and np.isnan(found[5, 1])
    assert np.isnan(deviation(np.zeros((3, 1), np.float32), np.zeros(3, int))).all()


def test_rows_are_joined_to_the_mean_and_the_most() -> None:
    rng = np.random.default_rng(0)
    means, mosts = rng.random((2, 3000, 5)).astype(np.float32)
    means[rng.random(means.shape) < 0.2] = np.nan
    for size in (1, 7, 3000):
        parts = np.array_split(rng.permutation(3000), 3000 // size)
        mean, most = joined(means, mosts, list(parts))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", RuntimeWarning)
            assert mean == pytest.approx(
                np.array([np.nanmean(means[part], 0) for part in parts]), nan_ok=True, rel=1e-5
            )
        assert most == pytest.approx(np.array([mosts[part].max(0) for part in parts]))


@pytest.fixture(scope="module")
def attempt(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four nodes of two ranks, two stages; rank 5 computes longer from step 60 on."""
    path = tmp_path_factory.mktemp("attempt")
    for node in range(4):
        values = np.full((len(STORED), 2, 100), 1.0 + (node >= 2))
        if node == 2:
            values[STORED.index("compute"), 1, 60:] = 3.0
        made = StepFile(folder(path) / f"n{node}.steps", f"n{node}", [2 * node, 2 * node + 1])
        made.append(0, np.arange(100) + 1, values)
        made.close()
    return path


LAYOUT = {"pp": 2, "dp": 4, "ep": 2}


def test_the_slow_rank_stands_out_against_its_stage(attempt: Path) -> None:
    found = heat_map(AttemptSteps(attempt), HeatRequest(mode="deviation", columns=100), LAYOUT)
    assert [row.ranks for row in found.rows] == [(rank,) for rank in range(8)] and found.unit == ""
    assert found.mean[5, 60:] == pytest.approx([0.5] * 40, abs=1e-3)
    found.mean[5, 60:] = 0
    assert np.abs(found.mean).max() < 1e-3


def test_rows_by_node_and_by_axis(attempt: Path) -> None:
    steps = AttemptSteps(attempt)
    by_node = heat_map(steps, HeatRequest(group="node", columns=100), LAYOUT)
    assert [row.label for row in by_node.rows] == ["n0", "n1", "n2", "n3"]
    assert by_node.mean[:, -1] == pytest.approx([1, 1, 2.5, 2], rel=1e-3)
    assert by_node.most[:, -1] == pytest.approx([1, 1, 3, 2], rel=1e-3)
    by_stage = heat_map(steps, HeatRequest(group="pp", columns=100), LAYOUT)
    assert [(row.label, row.ranks) for row in by_stage.rows] == [
        ("pp 0", (0, 1, 2, 3)),
        ("pp 1", (4, 5, 6, 7)),
    ]
    assert by_stage.mean[:, -1] == pytest.approx([1, 2.25], rel=1e-3)
    by_expert = heat_map(steps, HeatRequest(group="ep", columns=100), LAYOUT)
    assert [row.ranks for row in by_expert.rows] == [(0, 2, 4, 6), (1, 3, 5, 7)]
    few = heat_map(steps, HeatRequest(rows=3, columns=1), LAYOUT)
    assert [(row.label, row.ranks) for row in few.rows] == [
        ("ranks 0–2", (0, 1, 2)), ("ranks 3–5", (3, 4, 5)), ("ranks 6–7", (6, 7)),
    ]  # fmt: skip


def test_some_ranks_alone_keep_their_peers(attempt: Path) -> None:
    steps = AttemptSteps(attempt)
    for mode in ("raw", "deviation"):
        whole = heat_map(steps, HeatRequest(mode=mode, columns=100), LAYOUT)
        some = heat_map(steps, HeatRequest(mode=mode, columns=100, ranks=range(3, 6)), LAYOUT)
        assert [row.ranks for row in some.rows] == [(3,), (4,), (5,)]
        assert some.mean == pytest.approx(whole.mean[3:6])
    nodes = heat_map(steps, HeatRequest(group="node", ranks=range(4, 8), columns=1), LAYOUT)
    assert [row.label for row in nodes.rows] == ["n2", "n3"]


@pytest.mark.parametrize(("name", "value"), [("field", "computer"), ("mode", "rew"), ("group", "npde")])
def test_a_wrong_word_is_named_with_what_there_is(attempt: Path, name: str, value: str) -> None:
    with pytest.raises(UserError, match=f"{name}='{value}' isn't one of"):
        heat_map(AttemptSteps(attempt), HeatRequest(**{name: value}), LAYOUT)


def test_an_attempt_without_steps_has_an_empty_map(tmp_path: Path) -> None:
    found = heat_map(AttemptSteps(tmp_path), HeatRequest(), {})
    assert found.rows == () and np.isnan(found.low)
