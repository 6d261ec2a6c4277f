"""Token streams: all of a token file, or those of its documents that are trained on, or held out of training."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np

from configs.errors import UserError

_ROWS = 1 << 20
"""Documents that are processed at a time."""


class TokenStream:
    """Ranges of a token array, read as one stream without being copied.

    Args:
        tokens: [N] token ids, memory-mapped or not.
        starts: [R] first token of each run, rising; None: one run, all of them.
        stops: [R] token behind each run.
    """

    def __init__(
        self, tokens: np.ndarray, starts: np.ndarray | None = None, stops: np.ndarray | None = None
    ) -> None:
        self.tokens = tokens
        self._starts = np.zeros(1, np.int64) if starts is None else starts
        self._stops = np.array([len(tokens)], np.int64) if stops is None else stops
        self._first = np.concatenate([[0], np.cumsum(self._stops - self._starts)])

    def __len__(self) -> int:
        return int(self._first[-1])

    def read(self, at: int, count: int) -> np.ndarray:
        """[count] tokens from `at` on; behind the last one comes the first again."""
        at %= len(self)
        run = int(np.searchsorted(self._first, at, side="right")) - 1
        start = int(self._starts[run]) + at - int(self._first[run])
        pieces, left = [], count
        while left > 0:
            stop = min(int(self._stops[run]), start + left)
            pieces.append(self.tokens[start:stop])
            left -= stop - start
            run = (run + 1) % len(self._starts)
            start = int(self._starts[run])
        return np.concatenate(pieces) if len(pieces) > 1 else np.asarray(pieces[0])


def split_validation(
    tokens: np.ndarray, ends: np.ndarray, hashes: Path, share: float, corpus: str
) -> tuple[TokenStream, TokenStream, int]:
    """The stream to train on, the one held out, and how many documents are.

    A document is held out where the hash of its content is below `share` of all hashes. So the same document is on
    the same side in every corpus that it is in, copies of one are never on both, and neither the number of workers
    nor the order of files matters. `share` is met as well as chance allows.

    Args:
        ends: [documents] the token behind each document.
        hashes: file of 8 bytes a document.
        share: of the documents, above 0.
        corpus: the data's name for messages.

    Raises:
        UserError: where no document would be held out, or none be left.
    """
    keys = np.memmap(hashes, "<u8", "r") if len(ends) else np.zeros(0, np.uint64)
    limit = np.uint64(min(int(share * 2.0**64), 2**64 - 1))
    changes, held = [np.zeros(0, np.int64)], 0
    before = np.zeros(1, bool)  # the first run is one to train on, be it empty
    for at in range(0, len(keys), _ROWS):
        out = keys[at : at + _ROWS] < limit
        held += int(out.sum())
        changes.append(at + np.flatnonzero(out != np.concatenate([before, out[:-1]])))
        before = out[-1:]
    if not held or held == len(ends):
        raise _refusal(share, held, keys, corpus)
    documents = np.concatenate(changes)
    last = int(ends[-1])
    edges = np.concatenate([[0], np.where(documents > 0, ends[documents - 1], 0), [last]])
    runs = [np.stack([edges[:-1], edges[1:]])[:, first::2] for first in (0, 1)]
    train, out_ = (TokenStream(tokens, *(run[:, run[0] < run[1]])) for run in runs)
    return train, out_, held


def _refusal(share: float, held: int, keys: np.ndarray, corpus: str) -> UserError:
    documents = f"{len(keys)} document{'s' * (len(keys) != 1)} of {corpus}"
    if len(keys) < 2:
        return UserError(
            f"data.validation={share} can't split the {documents} (a text file is one); give more files, or rows"
        )
    if held:
        most = int(keys.max()) / 2.0**64
        return UserError(
            f"data.validation={share} would hold out all {documents}; set it below {math.floor(most * 1e4) / 1e4}"
        )
    least = int(keys.min()) / 2.0**64
    return UserError(
        f"data.validation={share} holds out none of the {documents}; set it to {math.ceil(least * 1e4 + 1) / 1e4} or more"
    )
