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
