"""The code that a run is submitted with, kept with the home, so that its every attempt runs the same."""

from __future__ import annotations

import compileall
import contextlib
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from configs.errors import UserError
from configs.paths import HomePaths

CODE = Path(__file__).parents[2]
"""The folder that the packages are in."""
PACKAGES = ("configs", "collectives", "faulttol", "trainer", "orchestrator")
_DIGITS = 16


def snapshot_code(home: HomePaths, state: dict[str, Any], code: Path = CODE) -> Path:
    """The folder in the home that holds the packages as they are now; written where it isn't there yet, and never again.

    Args:
        home: that keeps it.
        state: of the repository, which is kept in it as `state.json`.
        code: folder that the packages are in.

    Raises:
        UserError: where it can't be written; nothing is left behind then.
    """
    folder = home.code / _digest(code)
    if folder.is_dir():
        return folder
    aside = home.code / f".{folder.name}.{os.getpid()}"
    try:
        home.code.mkdir(parents=True, exist_ok=True)
        for path in _files(code):
            target = aside / path.relative_to(code)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(path, target)
        folder = home.code / _digest(aside)  # of what was copied, should somebody have written meanwhile
        # Compiled now: nobody can write beside the files later, and each rank would compile for itself.
        with contextlib.redirect_stdout(sys.stderr):
            compileall.compile_dir(aside, quiet=2, workers=1)
        aside.joinpath("state.json").write_text(json.dumps(state, indent=1))
        for path in [aside, *aside.rglob("*")]:
            path.chmod(0o555 if path.is_dir() else 0o444)
        with contextlib.suppress(OSError):  # another command was faster with the same
            aside.rename(folder)
        if not folder.is_dir():
            raise OSError(f"{folder} could not be made")
    except OSError as error:
        raise UserError(
            f"can't write the code into {home.code} ({error.strerror or error}); free some space and submit again"
        ) from None
    finally:
        if aside.exists():
            remove_read_only(aside)
    return folder


def remove_read_only(folder: Path) -> None:
    """Remove a folder whose files nobody may write."""
    for path in [folder, *(p for p in folder.rglob("*") if p.is_dir())]:
        path.chmod(0o755)
    shutil.rmtree(folder)


def _files(code: Path) -> Iterator[Path]:
    """Files of the packages, in order; what Python has compiled, and hidden ones, are left out."""
    for package in PACKAGES:
        for folder, folders, names in os.walk(code / package):
            folders[:] = sorted(
                name for name in folders if name != "__pycache__" and not name.startswith(".")
            )
            yield from (
                Path(folder, n) for n in sorted(names) if not n.startswith(".") and not n.endswith(".pyc")
            )


def _digest(code: Path) -> str:
    whole = hashlib.sha256(f"{sys.version_info[:2]}".encode())
    for path in _files(code):
        content = path.read_bytes()
        whole.update(f"{path.relative_to(code)}\0{len(content)}\0".encode() + content)
    return whole.hexdigest()[:_DIGITS]
