"""The command line of `python -m faulttol`: inspect, verify, compare, reshard, convert, grow and prune checkpoints."""

from __future__ import annotations

import argparse
import json
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import (
    INTERRUPTED_EXIT,
    OneLineParser,
    OutputLost,
    UserError,
    check_command,
    said,
    unknown,
)

if TYPE_CHECKING:
    from faulttol.commands.handlers import CommandResult

PROGRAM = "python -m faulttol"
_PATH = "a run's id or folder, a folder or URL of checkpoints, or a step's folder in it"
_UNITS = {"": 1, "K": 1 << 10, "M": 1 << 20, "G": 1 << 30, "T": 1 << 40}


_Add = Callable[..., OneLineParser]


def main(arguments: Sequence[str]) -> int:
    """Run a command; exit code 0 done, 1 damage, difference or failure, 2 a user's mistake, 130 interrupted."""
    from faulttol.checkpoint.manifest import Incomplete

    try:
        options = parse(arguments)
        if options.command == "run":
            return _run(options)
        if options.command == "bench":
            return _bench(options)
        if options.command == "preflight":
            return _preflight(options)
        answer = _answer(options)
    except (UserError, OutputLost) as error:
        return said(error)
    except (Incomplete, _NotReached) as error:
        print(f"megaray: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("megaray: interrupted", file=sys.stderr)
        return INTERRUPTED_EXIT
    except Exception:
        traceback.print_exc()
        return 1
    try:
        print(json.dumps(answer.data, indent=1) if options.json else "\n".join(answer.lines), flush=True)
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  (kept open until the end)
    except OutputLost as error:
        return said(error)
    return int(answer.code)


class _NotReached(Exception):
    """A file or storage that the system refused."""


def _answer(options: argparse.Namespace) -> CommandResult:
    """What a command found or did.

    Raises:
        _NotReached: where the system refused a file: it is full, another user's, a folder's name, or doesn't answer.
    """
    try:
        if options.command == "timeline":
            from faulttol.timeline import command as timeline  # it loads numpy

            return timeline.run(options)
        from faulttol.commands import handlers

        return handlers.ACTS[options.command](options)
    except OSError as error:
        why = " ".join(str(error).split()) or type(error).__name__
        raise _NotReached(f"{options.command} has failed: {why}; fix that, or name another place") from None


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """What was typed.

    Raises:
        UserError: for a word that is not a command or option.
    """
    if arguments[:1] == ["bench"]:  # it has a parser of its own
        return argparse.Namespace(command="bench", rest=list(arguments[1:]))
    parser, made = _parser()
    check_command(arguments, made)
    options, rest = parser.parse_known_args(list(arguments))
    if hasattr(options, "overrides"):  # may stand behind options
        options.overrides += [word for word in rest if "=" in word and not word.startswith("-")]
        rest = [word for word in rest if word not in options.overrides]
    if rest:
        raise unknown(rest[0], parser, options.command)
    return options


def _parser() -> tuple[OneLineParser, dict[str, OneLineParser]]:
    """The parser, and those of the commands by name."""
    parser = OneLineParser(
        prog=PROGRAM, description="Inspect, verify, compare, reshard, convert, grow and prune checkpoints."
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=OneLineParser
    )
    made: dict[str, OneLineParser] = {}

    def add(name: str, text: str, json: bool = True) -> OneLineParser:
        made[name] = commands.add_parser(name, help=text, description=f"{text}.")
        if json:
            made[name].add_argument("--json", action="store_true", help="print JSON and nothing else")
        return made[name]

    _add_reading(add)
    _add_writing(add)
    _add_converting(add)
    _add_timeline(add)
    add("bench", "measure saving and resharding against others, in one run", json=False)
    preflight = add(
        "preflight", "check whether this node is fit for work: memory, devices, arithmetic, network"
    )
    preflight.add_argument("--peers", default="", metavar="HOST:PORT,…", help="nodes that it must reach")
    preflight.add_argument("--quick", action="store_true", help="skip the arithmetic, which needs torch")
    run = add("run", "measure the fabric as a rank of a gang, as torchrun starts it", json=False)
    run.add_argument(
        "--config", type=Path, required=True, help="a resolved configuration, as saved with a run"
    )
    return parser, made


def _place(command: OneLineParser) -> None:
    """Options that name one checkpoint."""
    command.add_argument("path", metavar="PATH", help=_PATH)
    command.add_argument("--step", type=_natural, metavar="N", help="step to use; by default the newest")
    command.add_argument(
        "--attempt", type=_natural, metavar="N", help="attempt to use, if several saved the step"
    )


def _dry(command: OneLineParser) -> None:
    command.add_argument(
        "--dry-run", action="store_true", help="only show bytes read, written and moved, and peak memory"
    )


def _add_timeline(add: _Add) -> None:
    parser = add("timeline", "write what all ranks did as a timeline for Perfetto or chrome://tracing")
    parser.add_argument("run", metavar="RUN", help="a run's id or folder")
    parser.add_argument("--attempt", type=int, metavar="N", help="attempt to use; by default the newest")
    parser.add_argument("--steps", metavar="A:B", help="steps from A to B - 1; by default the last 20")
    parser.add_argument("--ranks", metavar="A:B", help="ranks from A to B - 1; by default all")
    parser.add_argument(
        "--out", type=Path, metavar="FILE", help="file to write; by default timeline-RUN-ATTEMPT.json"
    )


def _add_reading(add: _Add) -> None:
    inspect = add("inspect", "show steps, attempts, layouts, tensors, bytes, facts and pins")
    _place(inspect)
    inspect.add_argument(
        "--tensors", nargs="?", const="*", metavar="PATTERN", help="list tensors, such as '*experts*'"
    )
    verify = add("verify", "read everything and check its digests; exit code 1 if it is damaged")
    _place(verify)
    verify.add_argument(
        "--all", action="store_true", help="every checkpoint of the folder, not only the newest"
    )
    _dry(verify)
    diff = add("diff", "compare two checkpoints tensor by tensor; exit code 1 if they differ")
    diff.add_argument("path", metavar="FIRST", help=_PATH)
    diff.add_argument("other", metavar="SECOND", help=_PATH)


def _add_writing(add: _Add) -> None:
    reshard = add("reshard", "rewrite a checkpoint as the files of another layout, in another folder")
    _place(reshard)
    _out(reshard, "folder or URL to write; not the run's own")
    how = reshard.add_mutually_exclusive_group(required=True)
    how.add_argument("--files", type=_positive, metavar="N", help="write N files of about the same size")
    how.add_argument("--layout", metavar="AXES", help="write the files of a layout, such as pp=2,dp=4,ep=4")
    reshard.add_argument(
        "--check",
        action="store_true",
        help="compare the hashes of all tensors afterwards, which reads both again",
    )
    _dry(reshard)
    prune = add("prune", "remove checkpoints that the retention doesn't keep, or given steps; pin others")
    prune.add_argument("path", metavar="PATH", help=_PATH)
    prune.add_argument("--step", type=_natural, metavar="N", help="the step to pin or unpin")
    prune.add_argument(
        "--keep", type=_positive, metavar="N", help="keep the last N; by default as configured"
    )
    prune.add_argument("--keep-every", type=_positive, metavar="K", help="keep steps that are multiples of K")
    prune.add_argument("--steps", metavar="N,N", help="remove these steps, whatever the retention says")
    prune.add_argument(
        "--pin", metavar="NAME", help="keep a step under a name until --unpin; removes nothing"
    )
    prune.add_argument("--unpin", metavar="NAME", help="remove a pin; removes no checkpoint")
    prune.add_argument("--interrupted", action="store_true", help="also remove files of interrupted saves")
    prune.add_argument(
        "--verify",
        action="store_true",
        help="read everything first, so that damaged checkpoints don't count as kept",
    )
    prune.add_argument("--yes", "-y", action="store_true", help="do not ask")
    prune.add_argument("--dry-run", action="store_true", help="only show what would be removed, and why")


def _add_converting(add: _Add) -> None:
    export = add("export", "write weights as Hugging Face safetensors, or the whole state as torch's DCP")
    _place(export)
    _out(export, "folder for the files")
    export.add_argument("--to", choices=("hf", "dcp"), default="hf", help="format; hf by default")
    export.add_argument(
        "--dtype", choices=("bf16", "fp32"), default="bf16", help="dtype of hf's weights; bf16 by default"
    )
    export.add_argument("--shard-size", type=_bytes, default="5G", metavar="BYTES", help="largest file (5G)")
    _dry(export)
    importing = add("import", "make a checkpoint from another program's files")
    importing.add_argument("path", metavar="PATH", help="folder of the files")
    importing.add_argument(
        "overrides", nargs="*", metavar="field=value", help="model and optimizer that training continues with"
    )
    importing.add_argument(
        "--from",
        dest="form",
        choices=("hf", "dcp", "deepspeed"),
        required=True,
        help="their format; deepspeed: ZeRO 1 or 2, or universal",
    )
    _out(importing, "folder or URL for the checkpoint")
    importing.add_argument("--run", default="imported", metavar="ID", help="run that it belongs to")
    importing.add_argument(
        "--step", type=_natural, metavar="N", help="step of dcp files that don't record it"
    )
    importing.add_argument("--tag", metavar="NAME", help="tag of deepspeed, if the folder holds several")
    importing.add_argument(
        "--names", type=Path, metavar="FILE", help="JSON file that maps their names to megaray's"
    )
    importing.add_argument("--trust", action="store_true", help="load pickles, which may run any code")
    _dry(importing)
    grow = add("grow", "make a deeper model by stacking a checkpoint's layers (G_stack)")
    _place(grow)
    _out(grow, "folder or URL for the deeper model")
    grow.add_argument(
        "--layers", type=_positive, required=True, metavar="N", help="layers of the deeper model"
    )
    grow.add_argument(
        "--run", metavar="ID", help="id of the deeper model's run; by default derived from this one's"
    )
    grow.add_argument("--method", choices=("stack",), default="stack", help="how layers are multiplied")
    grow.add_argument(
        "--optimizer",
        choices=("reset", "copy"),
        default="reset",
        help="reset or copy the optimizer's state; reset by default",
    )
    _dry(grow)


def _out(command: OneLineParser, text: str) -> None:
    command.add_argument("--out", required=True, metavar="FOLDER", help=text)


def _natural(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number; type e.g. 200")
    return int(text)


def _positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0; type e.g. 2")
    return int(text)


def _bytes(text: str) -> int:
    word = text.strip().upper().removesuffix("B").removesuffix("I")
    unit = word[-1:] if word[-1:].isalpha() else ""
    number = word.removesuffix(unit)
    if unit not in _UNITS or not number.isdecimal() or not int(number):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of bytes; type e.g. 5G")
    return int(number) * _UNITS[unit]


def _preflight(options: argparse.Namespace) -> int:
    from faulttol.preflight.run import preflight

    outcome = preflight([peer for peer in options.peers.split(",") if peer], arithmetic=not options.quick)
    print(json.dumps(outcome.to_json(), indent=1) if options.json else "\n".join(outcome.lines()), flush=True)
    return int(bool(outcome.why))


def _bench(options: argparse.Namespace) -> int:
    from faulttol.bench.__main__ import main as measure

    return measure(options.rest)


def _run(options: argparse.Namespace) -> int:
    from configs.compose import load
    from configs.paths import default_home
    from configs.rank import RankContext, die_with_parent

    die_with_parent(os.environ)
    rank = RankContext.from_environment(os.environ, default_home() / "runs" / "torchrun")
    config = load(options.config)
    from faulttol.measure import main as measure  # torch loads after the parent's death is arranged for

    measure(config, rank)
    return 0
