"""One writer of a measurement's folder at a time, on this host or another."""

from __future__ import annotations

import fcntl
import time
from pathlib import Path
from typing import BinaryIO

from configs.errors import UserError

_ATTEMPTS, _RETRY_SECONDS = 5, 0.1


def lock(path: Path, folder: Path) -> BinaryIO:
    """Lock a file, which is made where it is missing, as long as what is returned is open and this process lives.

    Args:
        folder: of the measurement, for the message.

    Raises:
        UserError: where another process measures into the folder.
        OSError: where the file can't be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    file = path.open("ab")
    for left in reversed(range(_ATTEMPTS)):
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not left:
                file.close()
                raise UserError(
                    f"another command measures into {folder} now; wait for its end, or name another folder with --out"
                ) from None
            time.sleep(_RETRY_SECONDS)  # a command that only checks for another one has the lock for a moment
        except OSError:
            break  # a file system without locks
        else:
            break
    return file
