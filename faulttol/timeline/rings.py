"""The recorder's ring as arrays: `faulttol.recorder.read` for whoever reads many rings every second."""

from __future__ import annotations

import struct
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from faulttol.recorder import PhaseMark, RankPhase

ROW = np.dtype([("sequence", "i8"), ("ns", "i8"), ("mark", "i2"), ("phase", "i2"), ("step", "i8")])
"""One record; `ns` is the node's monotonic clock."""
_HEADER = struct.Struct("=8sQQQQQQQ")
_WORDS = 4
_MAGIC = b"MEGARAY3"
_PHASES, _MARKS = max(RankPhase), max(PhaseMark)


def read(path: Path, after: int = 0) -> NDArray[Any]:
    """Records with a sequence number above `after`, of type `ROW`, oldest first; none where there is no ring.

    What was overwritten, or is being written, is left out: a gap in the sequence numbers shows it.
    """
    try:
        with path.open("rb") as file:
            head = file.read(_HEADER.size)
            if len(head) < _HEADER.size:
                return np.zeros(0, ROW)
            magic, size, capacity, _, _, last, _, _ = _HEADER.unpack(head)
            if magic != _MAGIC or size != 8 * _WORDS or not capacity or last <= after:
                return np.zeros(0, ROW)
            data = file.read(size * capacity)
    except OSError:
        return np.zeros(0, ROW)
    words = np.frombuffer(data[: len(data) // size * size], "u8").reshape(-1, _WORDS)
    expected = np.arange(max(after, last - capacity) + 1, last + 1, dtype="u8")
    places = ((expected - 1) % capacity).astype(np.int64)
    there = places < len(words)
    words, expected = words[places[there]], expected[there]
    meaning = words[:, 2]
    whole = (words[:, 0] == expected) & (words[:, 0] ^ words[:, 1] ^ meaning == words[:, 3])
    whole &= (meaning & 0xFF <= _MARKS) & (meaning >> 8 & 0xFF <= _PHASES)
    words, meaning = words[whole], meaning[whole]
    rows = np.empty(len(words), ROW)
    rows["sequence"], rows["ns"], rows["step"] = words[:, 0], words[:, 1], meaning >> 16
    rows["mark"], rows["phase"] = meaning & 0xFF, meaning >> 8 & 0xFF
    return rows
