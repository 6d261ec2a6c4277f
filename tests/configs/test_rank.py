"""What a rank is given when it starts."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import UserError
from configs.paths import RunPaths
from configs.rank import RankContext, RankFiles, threads

pytestmark = [pytest.mark.unit, pytest.mark.timeout(20)]


def _context(rings: Path | None) -> RankContext:
    return RankContext(3, 8, 1, 2, "10.0.0.1", 29500, RunPaths(Path("/runs/a")), 2, rings)


@pytest.mark.parametrize("rings", [None, Path("/dev/shm/a")])
def test_a_context_comes_back_from_the_environment(rings: Path | None) -> None:
    context = _context(rings)
    assert RankContext.from_environment(context.environment(), Path("/elsewhere")) == context
    assert ("MEGARAY_RINGS" in context.environment()) is (rings is not None)


@pytest.mark.parametrize(
    ("name", "value", "between"),
    [
        ("RANK", "abc", "from 0 to 3"),
        ("RANK", "4", "from 0 to 3"),
        ("RANK", "²", "from 0 to 3"),
        ("WORLD_SIZE", "0", "of at least 1"),
        ("LOCAL_RANK", "-1", "from 0 to 1"),
        ("LOCAL_WORLD_SIZE", "5", "from 1 to 4"),
        ("MASTER_PORT", "99999999", "from 0 to 65535"),
        ("MEGARAY_ATTEMPT", "two", "of at least 1"),
    ],
)
def test_a_variable_that_is_no_number_of_a_rank_is_named(name: str, value: str, between: str) -> None:
    env = RankContext(1, 4, 1, 2, "127.0.0.1", 29500, RunPaths(Path("/x")), 3).environment()
    with pytest.raises(UserError, match=f"{name}='{value}' is not a whole number {between}; torchrun"):
        RankContext.from_environment(env | {name: value}, Path("/y"))
    if name == "MEGARAY_ATTEMPT":
        assert RankContext.from_environment(env | {name: ""}, Path("/y")).attempt == 1


def test_what_a_rank_writes_for_its_observers_is_in_the_nodes_memory_where_one_watches() -> None:
    assert _context(Path("/dev/shm/a")).files == RankFiles(Path("/dev/shm/a"), 3)
    own = _context(None)
    assert own.files.folder == own.paths.ranks and own.files.ring == own.paths.ranks / "00003.ring"
    names = [path.name for path in (own.files.ring, own.files.signs, own.files.raised)]
    assert names == ["00003.ring", "00003.signs", "00003.raised"]


@pytest.mark.parametrize(
    ("told", "count"), [(None, 1), ("", 1), ("4", 4), ("4,2", 4), (" 3 , 1", 3), ("1,1,1", 1)]
)
def test_threads_are_the_first_number_of_a_list(told: str | None, count: int) -> None:
    assert threads({} if told is None else {"OMP_NUM_THREADS": told}) == count


@pytest.mark.parametrize("told", ["many", "0", "-1", "x,4", "1.5"])
def test_threads_that_are_no_number_are_refused(told: str) -> None:
    with pytest.raises(UserError) as refused:
        threads({"OMP_NUM_THREADS": told})
    text = str(refused.value)
    assert f"OMP_NUM_THREADS='{told}'" in text and "unset it" in text and "\n" not in text
