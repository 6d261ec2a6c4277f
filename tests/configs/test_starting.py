"""How the four programs start: Ctrl-C while their modules load, and outputs that can't take every character."""

from __future__ import annotations

import importlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from configs.errors import INTERRUPTED_EXIT, UserError, starting
from faulttol.bench import __main__ as bench
from tests.faulttol.ranks import save_all
from tests.source_tree import ROOT

pytestmark = pytest.mark.timeout(60)

_STRUCK = """
import os, runpy, signal, sys

signal.signal(signal.SIGINT, signal.default_int_handler)  # where tests run in a shell's background it is ignored

class Strike:
    def find_spec(self, name, path=None, target=None):
        if name == sys.argv[1] + ".cli":
            os.kill(os.getpid(), signal.SIGINT)

sys.meta_path.insert(0, Strike())
runpy.run_module(sys.argv[1], run_name="__main__", alter_sys=True)
"""
"""Starts a program, with Ctrl-C at the first of its imports that takes long."""


@pytest.mark.unit
@pytest.mark.parametrize("program", ["collectives", "faulttol", "orchestrator", "trainer"])
def test_ctrl_c_while_a_program_loads_is_one_line(program: str) -> None:
    ended = subprocess.run(
        [sys.executable, "-c", _STRUCK, program], cwd=ROOT, capture_output=True, text=True, timeout=50
    )
    assert (ended.returncode, ended.stdout, ended.stderr) == (INTERRUPTED_EXIT, "", "megaray: interrupted\n")


@pytest.mark.unit
def test_what_handles_ctrl_c_otherwise_is_left_alone() -> None:
    """Such as a shell's background, where it is ignored."""
    before = signal.getsignal(signal.SIGINT)
    try:
        for handler in (signal.SIG_IGN, lambda *_: None):
            signal.signal(signal.SIGINT, handler)
            with starting():
                assert signal.getsignal(signal.SIGINT) is handler
            assert signal.getsignal(signal.SIGINT) is handler
        signal.signal(signal.SIGINT, signal.default_int_handler)
        with starting():
            assert signal.getsignal(signal.SIGINT) is not signal.default_int_handler
        assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.dist
@pytest.mark.parametrize(
    "words",
    [
        ["faulttol", "inspect", "{root}/\udcff"],
        ["orchestrator", "plan", "experiment=smoke"],
        ["trainer", "size", "model=demo", "hardware=cpu"],
    ],
    ids=lambda words: words[0],
)
def test_what_an_output_cannot_show_is_escaped(words: list[str], tmp_path: Path) -> None:
    """A file's name of other bytes than text, in a terminal of another encoding."""
    (tmp_path / "\udcff").mkdir()
    save_all(tmp_path / "\udcff", 3, run="run-1")
    ended = subprocess.run(
        [sys.executable, "-m", *(word.format(root=tmp_path) for word in words)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=50,
        env=os.environ | {"PYTHONIOENCODING": "ascii", "MEGARAY_HOME": str(tmp_path)},
    )
    assert (ended.returncode, ended.stderr) == (0, ""), ended.stderr
    assert ended.stdout.isascii() and ("\\udcff" in ended.stdout) is (words[0] == "faulttol")


@pytest.mark.unit
@pytest.mark.parametrize(
    ("target", "code", "said"), [(">&-", 0, ""), ("> /dev/full", 1, "No space left on device")]
)
@pytest.mark.parametrize(
    "words",
    [
        "trainer size model=demo hardware=cpu",
        "orchestrator plan experiment=smoke",
        "faulttol preflight --quick",
        "faulttol inspect /nothing",
        "collectives compare /nothing",
    ],
)
def test_an_output_that_is_closed_or_full_is_no_traceback(
    words: str, target: str, code: int, said: str
) -> None:
    if words.endswith("/nothing"):  # what is reported first stays the reason
        code, said = 2, "/nothing"
    command = f"{sys.executable} -m {words} {target}"
    ended = subprocess.run(command, shell=True, cwd=ROOT, capture_output=True, text=True, timeout=50)
    assert ended.returncode == code and said in ended.stderr and ended.stderr.count("\n") == bool(said), (
        ended.stderr
    )


@pytest.mark.unit
@pytest.mark.parametrize(
    ("program", "words", "said"),
    [
        ("orchestrator", "list run-1", "`list` doesn't take the word 'run-1'"),
        ("orchestrator", "status --jsn x", "'--jsn' is not an option of `status` (did you mean '--json'?)"),
        ("collectives", "fit one two", "`fit` doesn't take the word 'two'"),
        ("collectives", "fit one --nme=x", "'--nme=x' is not an option of `fit` (did you mean '--name'?)"),
        ("faulttol", "verify one two", "`verify` doesn't take the word 'two'"),
        ("trainer", "size --sugest", "'--sugest' is not an option of `size` (did you mean '--suggest'?)"),
        # A beginning is not an option either.
        ("orchestrator", "plan --slot 4", "'--slot' is not an option of `plan` (did you mean '--slots'?)"),
        ("collectives", "run --iter 4", "'--iter' is not an option of `run` (did you mean '--iters'?)"),
        ("faulttol", "verify x --al", "'--al' is not an option of `verify` (did you mean '--all'?)"),
        ("trainer", "bench --layer 4", "'--layer' is not an option of `bench` (did you mean '--layers'?)"),
    ],
)
def test_a_word_too_many_is_named_alike_by_all_programs(program: str, words: str, said: str) -> None:
    cli = importlib.import_module(f"{program}.cli")
    with pytest.raises(UserError) as refused:
        cli.parse(words.split())
    shows = f"`python -m {program} {words.split()[0]} --help` shows what can be typed"
    assert str(refused.value) == f"{said}; {shows}"


@pytest.mark.unit
def test_a_wrong_option_of_the_bench_of_saves(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["save", "--gi", "1"]) == 2
    assert "'--gi' is not an option of `save` (did you mean '--gib'?)" in capsys.readouterr().err
