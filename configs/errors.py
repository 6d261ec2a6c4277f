"""The one exception for a mistake that the user can mend."""

from __future__ import annotations

import argparse
import difflib
import errno
import io
import json
import os
import signal
import sys
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any, NoReturn

#: Exit code of every command and rank that ends by a `UserError`; recovery never retries it.
USER_ERROR_EXIT = 2

#: Exit code of a rank that was asked to stop by SIGTERM and has saved its state: 128 + 15, as shells have it.
STOPPED_EXIT = 143

#: Exit code of a command that Ctrl-C ended: 128 + 2.
INTERRUPTED_EXIT = 130

#: Errors of a disk rather than of a program: full, over its quota, read-only, broken, away.
DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO, errno.ESTALE)


def disk_trouble(error: BaseException, otherwise: str) -> str:
    """What a disk that is full or broken refused; empty where the error is another.

    Args:
        otherwise: what to call a file whose name the error doesn't have.
    """
    return refused(error, otherwise) if isinstance(error, OSError) and error.errno in DISK_ERRORS else ""


def refused(error: OSError, otherwise: str) -> str:
    """What the system wouldn't read or write, and why.

    Args:
        otherwise: what to call a file whose name the error doesn't have.
    """
    return f"{error.filename or otherwise} can't be read or written ({error.strerror})"


class UserError(Exception):
    """A mistake of the user's, reported in one line: the field, the value, why, and what to type instead.

    Commands print it without a traceback and exit with `USER_ERROR_EXIT`.
    """


class OutputLost(Exception):
    """What a command prints can't be written where it goes, such as to a file on a full disk; exit code 1."""


class _Output(io.TextIOWrapper):
    """A standard output that tells its own failures from those of the files that a command reads and writes."""

    def write(self, text: str, /) -> int:
        with _own_failures():
            return super().write(text)

    def flush(self) -> None:
        with _own_failures():
            super().flush()


@contextmanager
def _own_failures() -> Iterator[None]:
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        raise OutputLost(f"the output can't be written: {error.strerror}; send it elsewhere") from None


class OneLineParser(argparse.ArgumentParser):
    """Reports a mistake in what was typed as a `UserError`, in one line and without the usage.

    Options are typed whole: a beginning that is unique today needn't be tomorrow.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **({"allow_abbrev": False} | options))
        self.register("type", Path, _path)

    def error(self, message: str) -> NoReturn:
        """Raise a `UserError`."""
        raise UserError(f"{message}; `{self.prog} --help` shows what can be typed")


def _path(text: str) -> Path:
    """An empty name, as of a variable of the shell that isn't set, would be the current folder."""
    if not text.strip():
        raise argparse.ArgumentTypeError(f"'{text}' is not a name; type one, or . for the current folder")
    return Path(text)


class Stopped(Exception):
    """A rank was asked to stop by SIGTERM and has done so; it exits with `STOPPED_EXIT`."""


class EndedBySignal(Exception):
    """A command was asked to end by a signal; it tidies up and exits with `code`, as shells have it."""

    def __init__(self, number: int) -> None:
        super().__init__(f"ended by {signal.Signals(number).name}")
        self.code = 128 + number


@contextmanager
def ended_by_signals() -> Iterator[None]:
    """Raise `EndedBySignal` on SIGTERM and SIGHUP, which leave no time to say what is kept; `nohup` stays as it is."""
    taken = [one for one in (signal.SIGTERM, signal.SIGHUP) if signal.getsignal(one) is signal.SIG_DFL]
    for one in taken:
        signal.signal(one, _end)
    try:
        yield
    finally:
        for one in taken:
            signal.signal(one, signal.SIG_DFL)


def _end(number: int, _frame: FrameType | None) -> None:
    raise EndedBySignal(number)


class ReplicasDiffer(Exception):
    """Ranks that must hold equal state don't, and nothing says whose is wrong."""


class WrongReplica(ReplicasDiffer):
    """A rank's copy of the state isn't what it must be; its host is at fault."""


@contextmanager
def starting() -> Iterator[None]:
    """Around the imports of a `__main__`, which take up to seconds.

    Ctrl-C there is one line and `INTERRUPTED_EXIT`, as it is later: nothing has begun by then. What the encoding of the
    output lacks, such as the bytes of a file's name that isn't text, is escaped as in `stderr`.
    """
    if isinstance(sys.stdout, io.TextIOWrapper) and sys.stdout is sys.__stdout__:
        sys.stdout = _Output(
            sys.stdout.buffer,
            sys.stdout.encoding,
            "backslashreplace",
            line_buffering=sys.stdout.line_buffering,
        )
    # Ignored in a shell's background, and another's business where it has its own handler.
    if signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    signal.signal(signal.SIGINT, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def leave(code: int) -> NoReturn:
    """End the process without the interpreter's teardown: communication libraries have threads that can hang in it."""
    try:
        if sys.stdout is not None:  # closed by who started us
            sys.stdout.flush()
    except BrokenPipeError:
        pass  # the reader of our output has seen enough
    except OutputLost as error:
        if not code:  # or it has been reported
            code = 1
            sys.stderr.write(f"megaray: {error}\n")
    if sys.stderr is not None:
        sys.stderr.flush()
    os._exit(code)


def _leave(_signal: int, _frame: FrameType | None) -> None:
    sys.stderr.write("megaray: interrupted\n")
    sys.stderr.flush()
    os._exit(INTERRUPTED_EXIT)


def said(error: UserError | OutputLost | EndedBySignal) -> int:
    """Print the error's line; the exit code that it has."""
    sys.stderr.write(f"megaray: {error}\n")
    if isinstance(error, EndedBySignal):
        return error.code
    return USER_ERROR_EXIT if isinstance(error, UserError) else 1


def shortened(value: object, longest: int) -> str:
    """A value as text of at most so many characters, for a message."""
    text = str(value)
    return text if len(text) <= longest else f"{text[: longest - 3]}..."


def nearest(word: str, known: Iterable[str], cutoff: float = 0.6) -> str:
    """` (did you mean 'x'?)` for the closest of `known`, or an empty string where none is as similar as `cutoff`."""
    close = difflib.get_close_matches(word, list(known), n=1, cutoff=cutoff)
    return f" (did you mean '{close[0]}'?)" if close else ""


def unknown(word: str, parser: argparse.ArgumentParser, command: str) -> UserError:
    """What is said of a word behind a command that takes no such word, with the nearest option.

    Args:
        parser: the program's, of which `command` is a subparser.
    """
    commands = next(one for one in parser._actions if isinstance(one, argparse._SubParsersAction))
    shows = f"`{parser.prog} {command} --help` shows what can be typed"
    if not word.startswith("-"):
        return UserError(f"`{command}` doesn't take the word '{word}'; {shows}")
    known = [flag for action in commands.choices[command]._actions for flag in action.option_strings]
    return UserError(
        f"'{word}' is not an option of `{command}`{nearest(word.partition('=')[0], known)}; {shows}"
    )


def check_command(arguments: Sequence[str], known: Iterable[str]) -> None:
    """See that the first word is one of a program's commands.

    Raises:
        UserError: it isn't.
    """
    names = list(known)
    first = next((word for word in arguments if not word.startswith("-")), None)
    if first is not None and first not in names:
        raise UserError(f"'{first}' is not a command{nearest(first, names)}; use one of {', '.join(names)}")


def from_json(text: str | bytes | bytearray) -> Any:
    """What a JSON text holds.

    Raises:
        ValueError: where it isn't valid, or nested more deeply than Python reads, which `json` has another error for.
    """
    try:
        return json.loads(text)
    except RecursionError:
        raise ValueError("nested too deeply") from None
