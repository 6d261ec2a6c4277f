"""What ranks are given: where they keep compiled modules."""

from __future__ import annotations

import importlib.util
import os
import stat
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from orchestrator.agent import environment

PREFIX, NONE = "PYTHONPYCACHEPREFIX", "PYTHONDONTWRITEBYTECODE"


@pytest.fixture
def torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A torch that came without compiled modules; the file of its sources."""
    source = tmp_path / "torch" / "__init__.py"
    source.parent.mkdir()
    source.touch()
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: ModuleSpec("torch", None, origin=str(source)))
    monkeypatch.setattr(environment.tempfile, "gettempdir", lambda: str(tmp_path))
    return source


@pytest.mark.usefixtures("torch")
def test_modules_are_compiled_once_where_python_may_not_write_them(tmp_path: Path) -> None:
    found = environment._bytecode({NONE: "1"})
    folder = Path(found[PREFIX])
    assert found == {PREFIX: str(folder), NONE: ""} and folder.parent == tmp_path
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert environment._bytecode({NONE: "1"}) == found, "the next attempt finds them"


@pytest.mark.usefixtures("torch")
@pytest.mark.parametrize("env", [{}, {NONE: ""}, {NONE: "1", PREFIX: "/of/mine"}])
def test_where_they_are_kept_anyway_nothing_changes(env: dict[str, str]) -> None:
    assert environment._bytecode(env) == {}


def test_modules_that_are_compiled_are_used(torch: Path) -> None:
    compiled = Path(importlib.util.cache_from_source(str(torch)))
    compiled.parent.mkdir()
    compiled.touch()
    assert environment._bytecode({NONE: "1"}) == {}


@pytest.mark.usefixtures("torch")
def test_a_folder_that_others_can_write_to_gives_no_modules(tmp_path: Path) -> None:
    folder = tmp_path / f"megaray-bytecode-{os.getuid()}"
    folder.mkdir()
    folder.chmod(0o777)
    assert environment._bytecode({NONE: "1"}) == {}
    folder.rmdir()
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(tmp_path / "elsewhere")
    assert environment._bytecode({NONE: "1"}) == {}
