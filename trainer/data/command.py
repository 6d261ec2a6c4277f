"""`python -m trainer prepare`: text to a token file ahead of a run, with progress, and resumed when stopped."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TextIO

from configs.compose import compose
from configs.errors import UserError
from configs.paths import default_home
from trainer.data.prepare import prepare
from trainer.data.store import TokenStore, fingerprint
from trainer.data.workers import cores

_WIDTH = 30
_REDRAW_SECONDS = 0.1
_LINE_SECONDS = 10.0
"""Time between lines where no terminal redraws one."""
_WORDS = {"scores": "reading scores", "tokens": "tokenising", "verify": "checking what is there"}


class ProgressLine:
    """Progress on a stream: one line that is redrawn on a terminal, lines now and then elsewhere.

    Args:
        stream: where to, such as standard error.
        clock: seconds, for the rate.
    """

    def __init__(self, stream: TextIO, clock: Callable[[], float] = time.monotonic) -> None:
        self._stream, self._clock, self._terminal = stream, clock, stream.isatty()
        self._begun = self._shown = clock()
        self._phase, self._before, self._drawn = "", 0, False

    def __call__(self, phase: str, done: int, total: int, tokens: int) -> None:
        """Show how far it is: bytes of the sources done and in all, and tokens so far."""
        now = self._clock()
        if phase != self._phase:
            self._phase, self._begun, self._before = phase, now, done
            self._shown = -math.inf if self._terminal else now
        last = total > 0 and done >= total
        if not last and now - self._shown < (_REDRAW_SECONDS if self._terminal else _LINE_SECONDS):
            return
        self._shown = now
        share = min(1.0, done / total) if total else 0.0
        seconds = now - self._begun
        rate = (done - self._before) / seconds if seconds > 0 else 0.0
        left = f", {_clock((total - done) / rate)} left" if rate and not last else ""
        amount = f"{done / 1e6:,.1f} of {total / 1e6:,.1f} MB" if total else f"{done / 1e6:,.1f} MB"
        line = f"{_WORDS[phase]} {share:4.0%}, {amount}, {tokens:,} tokens, {rate / 1e6:.1f} MB/s{left}"
        if self._terminal:
            full = int(share * _WIDTH)
            self._stream.write(f"\r\x1b[K[{'#' * full}{'.' * (_WIDTH - full)}] {line}")
            self._drawn = True
        else:
            self._stream.write(line + "\n")
        self._stream.flush()

    def close(self) -> None:
        """End the redrawn line."""
        if self._drawn:
            self._stream.write("\n")
            self._stream.flush()
            self._drawn = False


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}"


def run(
    overrides: Sequence[str], config: Path | None, out: Path | None, workers: int | None, stream: TextIO
) -> dict[str, Any]:
    """Prepare what the overrides describe; what came of it, as plain JSON.

    Args:
        overrides: `data.…` fields as `submit` takes them; with a word on the model, ids are checked against its
            vocabulary.
        out: folder for the token file; None: the cache, where a run with the same `data` finds it.
        workers: processes; None: one for each core, where there is enough to do.
        stream: for progress.

    Raises:
        UserError: for a mistake in the configuration or the data.
    """
    resolved = compose(overrides, config)
    data = resolved.data
    if out is not None and data.mixture:
        raise UserError(f"--out {out} takes one data.path; prepare the paths of data.mixture one by one")
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"--out {out} is a file; name a folder")
    named = any(word.startswith(("model=", "model.", "experiment=")) for word in overrides) or config
    bar = ProgressLine(stream)
    begun = time.monotonic()
    try:
        vocab = resolved.model.vocab if named else None
        store = prepare(data, vocab, default_home() / "data", workers, bar, out)
    finally:
        bar.close()
    return _summary(store, time.monotonic() - begun) | {"fingerprint": fingerprint(store, data)}


def _summary(store: TokenStore, seconds: float) -> dict[str, Any]:
    return {
        "tokens": store.count, "documents": store.documents, "held_out": store.held, "separator": store.separator,
        "parts": [
            {
                "path": part.path, "file": str(Path(getattr(part.tokens, "filename", part.folder))),
                "tokens": len(part.tokens), "documents": part.documents, "dtype": part.tokens.dtype.name,
                "digest": part.digest,
            }
            for part in store.parts
        ],
        "notes": store.notes, "seconds": round(seconds, 3), "cores": cores(),
    }  # fmt: skip


def lines(summary: dict[str, Any]) -> list[str]:
    """A summary for people."""
    said = []
    for part in summary["parts"]:
        path = part["path"] or "the standard library"
        said.append(
            f"{path}: {part['tokens']:,} tokens ({part['dtype']}) in {part['documents']:,} documents; {part['file']}"
        )
    if summary["held_out"]:
        said.append(f"{summary['held_out']:,} documents held out")
    files = [part["file"] for part in summary["parts"]]
    hint = (
        f"train on it: data.path={files[0]}"
        if len(files) == 1
        else "a run with the same data.mixture finds them"
    )
    return [*said, *summary["notes"], hint]
