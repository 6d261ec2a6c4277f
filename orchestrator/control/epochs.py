"""Controllers of one home, counted: each begins an epoch, and the newest owns logs, agents and queue.

The first one's number is the time, since agents of a home that was removed and made anew remember its earlier numbers.
The folder has one empty-handed file per epoch, made exclusively, so two controllers never get the same number, on NFS
too. An older controller finds the next number taken before each thing that it writes, and ends.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError, from_json
from configs.paths import HomePaths
from orchestrator.record.log import Fenced

STALE_SECONDS = 15.0
"""Seconds without a beat after which a controller counts as gone."""
_KEPT = 16
"""Files of earlier epochs that are kept."""


@dataclass(frozen=True)
class Epoch:
    """One controller's time."""

    number: int
    folder: Path
    actor: str = ""
    """Names the controller among those of its cluster, through all its processes."""

    def check(self) -> None:
        """Raise `Fenced` where a newer controller has begun."""
        # One that slept for long may find the next number gone, but then its own went before.
        if (self.folder / _name(self.number + 1)).exists() or not (self.folder / _name(self.number)).exists():
            raise Fenced(f"controller {self.number} was replaced by a newer one")

    def superseded_by_other(self) -> bool:
        """Whether a controller other than this one's next process has followed it, as far as is known."""
        try:
            newest = from_json((self.folder / _name(recorded_epochs(self.folder)[-1])).read_text())
            return bool(newest["actor"] != self.actor)
        except (OSError, ValueError, KeyError, IndexError, TypeError):
            return False

    def beat(self) -> None:
        """Show that the controller lives; what the disk refuses is let pass."""
        try:
            os.utime(self.folder / _name(self.number))
        except OSError:
            pass


def claim(
    home: HomePaths, cluster: str, age: Callable[[Path], float] | None = None, actor: str = ""
) -> Epoch:
    """Begin the next epoch.

    Args:
        home: the home that is served.
        cluster: names the Ray cluster; a controller of the same one is replaced at once, since there is never a second.
        age: seconds since a file's last beat; for tests.
        actor: as in `Epoch`.

    Raises:
        UserError: where the controller of another cluster serves the home and lives, or the folder can't be written.
    """
    folder, age = home.epochs, age or _age
    try:
        folder.mkdir(parents=True, exist_ok=True)
        while True:
            newest = max(recorded_epochs(folder), default=0)
            _refuse_living(folder, newest, cluster, home, age)
            own = newest + 1 if newest else _first()
            try:
                with (folder / _name(own)).open("x") as file:
                    host = socket.gethostname()
                    file.write(
                        json.dumps({"cluster": cluster, "pid": os.getpid(), "host": host, "actor": actor})
                    )
            except FileExistsError:
                continue
            known = recorded_epochs(folder)
            if known[-1] > own:
                continue  # it was slow: the number was taken before, and its file is gone since
            if len(known) > 1 and own - 1 not in known:
                # Two began the home at once, and the other one looks for the next number.
                (folder / _name(own)).unlink()
                continue
            for old in known[:-_KEPT]:
                (folder / _name(old)).unlink(missing_ok=True)
            return Epoch(own, folder, actor)
    except OSError as error:
        raise UserError(
            f"MEGARAY_HOME={home.home} can't be written ({error.strerror}); set it to a folder that you may write"
        ) from None


def recorded_epochs(folder: Path) -> list[int]:
    """Epochs that are on record, oldest first."""
    return sorted(int(path.name) for path in folder.iterdir() if path.name.isdigit())


def _refuse_living(
    folder: Path, newest: int, cluster: str, home: HomePaths, age: Callable[[Path], float]
) -> None:
    path = folder / _name(newest)
    try:
        holder: dict[str, Any] = from_json(path.read_text())
        beat = age(path)
    except (FileNotFoundError, ValueError):
        return  # nobody, or one that died while it began
    if holder.get("cluster") != cluster and beat < STALE_SECONDS:
        raise UserError(
            f"the controller of another Ray cluster serves {home.home}: process {holder.get('pid')} on "
            f"{holder.get('host')}; "
            "set MEGARAY_HOME to another folder"
        )


def _age(path: Path) -> float:
    return time.time() - path.stat().st_mtime


def _first() -> int:
    """Number of a home's first controller."""
    return int(time.time())


def _name(number: int) -> str:
    return f"{number:08d}"
