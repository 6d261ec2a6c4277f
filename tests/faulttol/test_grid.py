"""The quick grid of layout pairs through checkpoints; what all pairs cover; and that the grid sees a difference."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from itertools import permutations
from pathlib import Path
from typing import Any

import pytest

from tests.faulttol import grid
from tests.faulttol.grid_ranks import GridWork, SentPart, Went, hashes_from
from tests.trainer.families import FAMILIES
from tests.trainer.grid import GridCase, config_of
from trainer.sizing.search.runnable import refusal

pytestmark = [pytest.mark.dist, pytest.mark.timeout(300)]

STEPS = grid.Steps(2, 2, 1, background=True)


def value(case: GridCase, key: str) -> Any:
    """A layout's word."""
    return (grid.DEFAULTS | case.layout | case.train | case.optim).get(key)


def changes(key: str) -> set[tuple[Any, Any]]:
    """What a word changes from and to, over all pairs."""
    return {(value(pair.one, key), value(pair.other, key)) for pair in grid.pairs()}


# ---- what the pairs are ----


def test_the_pairs_are_many_and_each_layout_is_one_that_the_trainer_runs() -> None:
    pairs = grid.pairs()
    assert len({pair.name for pair in pairs}) == len(pairs) >= 60
    for pair in pairs:
        assert refusal(config_of(pair.one, 4)) is None, pair.name
        assert pair.one.ranks <= 8
    assert {(1, 8), (8, 1), (8, 8)} <= {(pair.one.ranks, pair.other.ranks) for pair in pairs}


def test_the_pairs_change_everything_each_way() -> None:
    for axis in ("pp", "dp", "cp", "ep", "etp", "tp"):
        found = changes(axis)
        assert any(a < b for a, b in found) and any(a > b for a, b in found), axis
    assert set(permutations((1, 2, 3), 2)) <= changes("zero")
    assert set(permutations(("1f1b", "interleaved", "zbv"), 2)) <= changes("schedule")
    assert set(permutations(("gather", "ulysses"), 2)) <= changes("context")
    native, other = None, "deepspeed"
    assert {(native, other), (other, native), (other, other)} <= changes("engine")


def test_the_pairs_have_every_family_and_optimizer_and_always_another_ep() -> None:
    pairs = grid.pairs()
    assert {pair.one.family for pair in pairs} == set(FAMILIES)
    assert {value(pair.one, "kind") for pair in pairs} == {None, "muon", "lamb"}
    assert [pair.name for pair in pairs if value(pair.one, "ep") == value(pair.other, "ep")] == []


# ---- what they prove ----


def test_the_quick_grid_is_equal() -> None:
    todo = grid.quick()
    assert len(todo) == len(grid.QUICK) and {pair.one.family for pair in todo} == set(FAMILIES)
    told: list[str] = []
    assert grid.run(todo, grid.SHORT, told.append) == (len(todo), 0), "\n".join(told)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Iterator[grid.Grid]:
    made = grid.Grid(tmp_path_factory.mktemp("grid"), STEPS)
    yield made
    made.end()


PAIR = grid.LayoutPair(grid.case("qwen3", "", micros=1), grid.case("qwen3", "tp=2 ep=2", micros=1))


def test_a_save_beside_training_is_of_the_step_that_it_began_at(small: grid.Grid) -> None:
    wrong, error = small.check(PAIR)
    assert wrong == [] and error < grid.TOLERANCE["fp32"]


@pytest.mark.parametrize("seed", range(4))
def test_the_grid_sees_one_bit(small: grid.Grid, seed: int) -> None:
    """Wherever it is, in a parameter, a slot or a copy: the state differs there, and in what is saved there."""
    wrong, _ = small.check(PAIR, spoil=seed)
    assert any(text.startswith("there: ") for text in wrong), wrong


def test_work_that_fails_is_told_and_the_next_is_done(small: grid.Grid, tmp_path: Path) -> None:
    ranks, config = grid.GridRanks(), config_of(PAIR.one, 4)
    try:
        (problem,) = ranks.do(1, GridWork(config, source=str(tmp_path), after=1)).problems
        assert "gave None" in problem
        assert len(ranks.do(1, GridWork(config, before=1)).lines) == 1
    finally:
        ranks.end()


LINES = tuple((loss, 2.0, [[3, 5]], 0) for loss in (6.0, 5.0, 4.0, 3.0))
FIRST = Went({"a": "1", "b": "2"}, (), LINES)
THERE, BACK = dataclasses.replace(FIRST, lines=LINES[2:]), dataclasses.replace(FIRST, lines=LINES[2:3])


def judge(first: Went = FIRST, there: Went = THERE, back: Went = BACK) -> list[str]:
    return grid.judge(first, there, back, STEPS)[0]


def test_what_is_equal_and_what_is_not() -> None:
    assert judge() == []
    other = {"a": "1", "b": "3"}
    for name, hashes in (("b", other), ("b", {"a": "1"}), ("c", FIRST.hashes | {"c": "4"})):
        assert judge(there=dataclasses.replace(THERE, hashes=hashes)) == [f"there: {name} differs"]
        assert judge(back=dataclasses.replace(BACK, hashes=hashes)) == [f"back: {name} differs"]
    assert judge(first=dataclasses.replace(FIRST, hashes={}))
    assert judge(there=dataclasses.replace(THERE, problems=("copies of b differ",))) == [
        "there: copies of b differ"
    ]
    assert judge(there=Went(problems=("rank 1: no",)), back=Went()) == ["there: rank 1: no"]
    assert judge(there=Went(), back=Went())


def test_a_loss_that_is_off_is_unequal() -> None:
    loss, *rest = LINES[3]
    near, far = ((LINES[2], (loss * (1 + off), *rest)) for off in (5e-6, 2e-5))
    assert judge(there=dataclasses.replace(THERE, lines=near)) == []
    (told,) = judge(there=dataclasses.replace(THERE, lines=far))
    assert "off by 2.0e-05" in told
    (told,) = judge(back=dataclasses.replace(BACK, lines=((4.0 * (1 + 1e-12), *rest),)))
    assert "bit for bit" in told


# ---- hashes ----


def part(data: bytes, start: int, name: str = "x", dtype: str = "uint8", whole: int = 8) -> SentPart:
    return SentPart(name, dtype, (whole,), (slice(start, start + len(data)),), data)


def test_a_hash_does_not_depend_on_how_a_tensor_is_cut() -> None:
    data = bytes(range(8))
    whole, none = hashes_from([part(data, 0)])
    assert none == []
    assert hashes_from([part(data[5:], 5), part(data[:5], 0), part(data[2:6], 2)]) == (whole, [])
    assert hashes_from([part(data[:7] + b"\x06", 0)])[0] != whole
    assert hashes_from([part(data, 0, dtype="int8")])[0] != whole


def test_holes_copies_that_differ_and_other_shapes_are_told() -> None:
    data = bytes(range(8))
    assert hashes_from([part(data[:7], 0)])[1] == ["1 elements of x are nowhere"]
    assert hashes_from([part(data, 0), part(b"\x00", 3)])[1] == ["copies of x differ"]
    (told,) = hashes_from([part(data, 0), part(data, 0, whole=9)])[1]
    assert told == "x is uint8[8] and uint8[9]"
    (told,) = hashes_from([part(data, 0), part(data, 0, dtype="int8")])[1]
    assert told == "x is uint8[8] and int8[8]"
