"""The mutants fit the code, and the harness tells a killed one from one that lives or only breaks something."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.mutants import harness
from tests.mutants.harness import broken, judge, run
from tests.mutants.listed import Mutant, misplaced, mutants
from tests.source_tree import ROOT

pytestmark = pytest.mark.timeout(240)

SCHEDULE = "trainer/optim/schedule.py"
TABLE = "tests/trainer/optim/test_schedule.py::test_rates_follow_the_table[constant]"


def _mutant(name: str, new: str, test: str = TABLE) -> Mutant:
    return Mutant(name, SCHEDULE, "if step < optim.warmup_steps:", new, test)


KILLED = _mutant("no warm-up", "if False:")
LIVES = _mutant("the same in other words", "if optim.warmup_steps > step:")
BREAKS = _mutant("no code", "if step < < optim.warmup_steps:")
RAISES = _mutant("another error", "if step < optim.nothing:")


@pytest.mark.unit
def test_every_mutant_fits_the_code_and_there_are_enough() -> None:
    found = mutants()
    assert misplaced(found, {m.file: (ROOT / m.file).read_text() for m in found}) == []
    assert len(found) >= 60
    tests = {m.test.partition("::")[0] for m in found}
    assert [name for name in tests if not (ROOT / name).is_file()] == []


@pytest.mark.unit
def test_a_mutant_that_does_not_fit_is_told() -> None:
    text = {SCHEDULE: "if step < optim.warmup_steps:\n" * 2}
    assert misplaced([KILLED], text) == [f"no warm-up: its text is in {SCHEDULE} 2 times"]
    assert misplaced([KILLED], {SCHEDULE: ""}) == [f"no warm-up: its text is in {SCHEDULE} 0 times"]
    same = _mutant("nothing", KILLED.old)
    assert misplaced([same], {SCHEDULE: KILLED.old}) == ["nothing: it changes nothing"]


@pytest.mark.unit
def test_two_mutants_of_one_name_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.mutants.areas import data

    monkeypatch.setattr(data, "MUTANTS", [data.MUTANTS[0]] * 2)
    with pytest.raises(ValueError, match="two mutants are called"):
        mutants()


def _answer(code: int, *failed: tuple[str, str, str]) -> dict[str, Any]:
    return {"code": code, "passed": [], "failed": list(failed), "said": []}


@pytest.mark.unit
@pytest.mark.parametrize(
    ("answer", "killed"),
    [
        (_answer(1, (TABLE, "call", "AssertionError: assert 1 == 2")), True),
        (_answer(1, (TABLE, "call", "Failed: DID NOT RAISE UserError")), True),
        (_answer(1, (TABLE, "call", "Failed: Timeout (>60.0s) from pytest-timeout.")), False),
        (_answer(1, (TABLE, "call", "RuntimeError: shapes")), False),
        (_answer(1, (TABLE, "setup", "AssertionError: a fixture")), False),
        (_answer(2, (TABLE, "collect", "ImportError: SyntaxError")), False),
        (_answer(0), False),
        (_answer(4), False),
        (_answer(-1), False),
        (_answer(-11), False),
    ],
)
def test_only_a_failed_assertion_kills(answer: dict[str, Any], killed: bool) -> None:
    assert judge(KILLED, answer, 1.0).killed == killed


@pytest.mark.unit
def test_an_unmutated_tree_has_to_pass_and_to_run_every_test() -> None:
    passed = {"code": 0, "passed": [TABLE], "failed": [], "said": []}
    assert broken(passed, [TABLE, TABLE.partition("[")[0]]) == []
    assert broken(passed, ["other::test"]) == ["other::test doesn't run: it is skipped or misspelt"]
    assert broken(_answer(4), [TABLE]) == ["the tests end with exit code 4 without a mutant"]
    (line,) = broken(_answer(1, (TABLE, "call", "AssertionError: no")), [TABLE])
    assert line == f"{TABLE} fails without a mutant (call): AssertionError: no"


@pytest.mark.dist
def test_a_run_names_what_lives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "mutants", lambda: [KILLED, LIVES, BREAKS, RAISES])
    before = (ROOT / SCHEDULE).read_text()
    killed, count, wrong = run("", 1, lambda _line: None)
    assert (killed, count) == (1, 4) and (ROOT / SCHEDULE).read_text() == before
    assert wrong[0] == f"the same in other words: the test passes ({TABLE})"
    assert wrong[1].startswith("no code: the test breaks instead of failing (collect)")
    assert wrong[2].startswith("another error: the test breaks instead of failing (call): AttributeError")
    assert run("nobody has this name", 1, lambda _line: None)[2] == [
        "no mutant has 'nobody has this name' in its name, file or test"
    ]


@pytest.mark.dist
def test_a_tree_that_fails_unmutated_is_no_proof(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    for name in ("trainer", "tests", "configs", "faulttol", "collectives", "orchestrator", "pyproject.toml"):
        (tmp_path / name).symlink_to(ROOT / name)
    (tmp_path / "trainer").unlink()
    harness.shutil.copytree(ROOT / "trainer", tmp_path / "trainer")
    path = tmp_path / SCHEDULE
    path.write_text(path.read_text().replace("(step + 1)", "step"))
    monkeypatch.setattr(harness, "mutants", lambda: [KILLED])
    killed, count, wrong = run("", 1, lambda _line: None, tmp_path)
    assert (killed, count) == (0, 1) and "fails without a mutant (call): AssertionError" in wrong[0]
