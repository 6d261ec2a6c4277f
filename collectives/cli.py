"""The command line of `python -m collectives`."""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import BinaryIO

from collectives import flags
from collectives.launch import DISK_ADVICE, LocalRanks, detect_launcher, refuse_both
from collectives.store import stream
from collectives.store.lock import lock
from collectives.store.results import ResultStore
from collectives.store.resume import first_difference, other_measurement_error, settings_of
from configs.compose import amend, compose, dump, load
from configs.errors import (
    INTERRUPTED_EXIT,
    USER_ERROR_EXIT,
    EndedBySignal,
    OneLineParser,
    OutputLost,
    UserError,
    check_command,
    disk_trouble,
    ended_by_signals,
    refused,
    said,
    unknown,
)
from configs.paths import RunPaths
from configs.rank import RankContext, die_with_parent
from configs.schema import RunConfig

PROGRAM = "python -m collectives"
_COMMANDS = ("run", "fit", "compare", "report", "device")
_PROGRESS_SECONDS = 10.0
"""Between two lines of progress into a file."""
_MAX_LOCAL_RANKS = 1024
"""Ranks that are started on one machine; each is a process with its own torch."""
_NO_READER = "whoever read the output has ended, as `| head` does; send it to a file, such as `> table.txt`"
FINDINGS_EXIT = 3
"""Exit code where all was measured and something was found slow or wrong."""


def main(arguments: list[str]) -> int:
    """Run one command; exit code 0 done, 1 failed, 2 a user's mistake, 3 something was found slow or wrong."""
    try:
        options = parse(arguments)
        return int(options.command(options, arguments))
    except (UserError, OutputLost, EndedBySignal) as error:
        return said(error)
    except BrokenPipeError:
        # The others have printed all that was wanted; this one has stopped early.
        if arguments[:1] == ["run"]:
            print(f"megaray: {_NO_READER}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("megaray: interrupted", file=sys.stderr)
        return INTERRUPTED_EXIT
    except Exception as error:
        if trouble := disk_trouble(error, "a file of the measurement"):
            print(f"megaray: {trouble}; {DISK_ADVICE}", file=sys.stderr)
            return 1
        if isinstance(error, OSError) and error.filename is not None:
            why = refused(error, "a file")
            print(f"megaray: {why}; look at what lies there and who owns it", file=sys.stderr)
            return USER_ERROR_EXIT
        from collectives.studies.program import NothingMeasuredError  # loads torch
        from collectives.timing.team import FabricLost

        if isinstance(error, FabricLost | NothingMeasuredError):
            print(f"megaray: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        return 1


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options; configuration fields may stand anywhere among them.

    Raises:
        UserError: for a word that is neither.
    """
    check_command(arguments, _COMMANDS)
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    for word in rest:
        if word.startswith("-") or not hasattr(options, "overrides"):
            raise unknown(word, parser, options.verb)
        options.overrides.append(word)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = OneLineParser(
        prog=PROGRAM, description="Measure a cluster's network or one device, and find what is slow."
    )
    commands = parser.add_subparsers(dest="verb", required=True)
    run = commands.add_parser(
        "run", help="measure collectives; ranks are started here, or by torchrun, srun or mpirun"
    )
    _add_overrides(run)
    run.add_argument("--config", type=Path, help="a resolved configuration, as saved with a measurement")
    run.add_argument("--ranks", type=int, help="ranks to start on this machine; default: its GPUs, or 2")
    run.add_argument("--out", type=Path, help="folder of the measurement; an interrupted one is resumed")
    run.add_argument("--ops", metavar="NAMES", help="operations, separated by commas")
    flags.add(run.add_argument_group("nccl-tests' flags"))
    run.set_defaults(command=_run)
    _add_reading(commands)
    device = commands.add_parser("device", help="measure matmul and copy rates of one device, for sizing")
    _add_overrides(device)
    device.add_argument("--name", help="name of the profile under configs/profiles/device")
    device.add_argument("--seconds", type=float, default=180.0, help="seconds to spend (180)")
    device.add_argument("--against", metavar="PROFILE", help="compare with a profile, by name or path")
    device.set_defaults(command=_device)
    return parser


def _add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "overrides", nargs="*", metavar="field=value", help="configuration, as `submit` takes it"
    )


def _add_reading(commands: argparse._SubParsersAction[OneLineParser]) -> None:
    """Commands that read a measurement."""
    fit = commands.add_parser("fit", help="fit latency and bandwidth by message size, as a fabric profile")
    fit.add_argument("--name", help="name of the profile under configs/profiles/fabric")
    fit.add_argument("--confidence", type=float, default=0.95, help="confidence level of intervals (0.95)")
    fit.set_defaults(command=_fit)
    compare = commands.add_parser(
        "compare", help="compare with a baseline, the hardware's limit and peers; exit code 3 if slow"
    )
    compare.add_argument("--baseline", type=Path, help="an earlier measurement of the same")
    compare.add_argument(
        "--tolerance", type=float, default=0.1, help="fraction by which a rate may fall (0.1)"
    )
    compare.add_argument("--json", action="store_true", help="findings as JSON")
    compare.set_defaults(command=_compare)
    report = commands.add_parser("report", help="write plots as PNG and a self-contained HTML page")
    report.add_argument("--baseline", type=Path, help="an earlier measurement to compare with")
    report.set_defaults(command=_report)
    for command in (fit, compare, report):
        command.add_argument("measurement", type=Path, help="folder of a measurement, or id of a run")


def overrides(options: argparse.Namespace) -> list[str]:
    """What was typed after `run` as fields of the configuration, nccl-tests' flags among them."""
    ops = [f"collectives.ops={options.ops}"] if options.ops is not None else []
    return ["workload=collectives", *options.overrides, *ops, *flags.read(options, os.environ).overrides]


def _run(options: argparse.Namespace, arguments: list[str]) -> int:
    die_with_parent(os.environ)
    typed, words = flags.read(options, os.environ), overrides(options)
    saved = load(options.config) if options.config else None
    try:
        config = compose(words) if saved is None else amend(saved, words[1:]) if words[1:] else saved
    except UserError as error:
        raise UserError(flags.as_typed(str(error), options)) from None
    os.environ.update(typed.environment)
    ranks = _requested_ranks(options.ranks, typed.ranks)
    if ranks is not None:
        refuse_both(os.environ, ranks)
    by = detect_launcher(os.environ) if ranks is None else None
    folder = (options.out or Path(f"collectives-{time.strftime('%Y%m%d-%H%M%S')}")).absolute()
    if by is None:
        world = _world_size(config, ranks)
        folder = folder if options.out else _make_new_folder(folder)
        return _write_copy(RunPaths(folder), typed.copy, _run_locally(config, world, folder))
    os.environ.update(by.variables)
    rank = RankContext.from_environment(os.environ, _unused_folder(folder) if options.out is None else folder)
    # Loads torch, after the parent's death is arranged for.
    from collectives.studies.program import main as measure

    named = options.out is not None or "MEGARAY_RUN" in os.environ
    findings = measure(config, rank, arguments=tuple(arguments), named=named)
    code = FINDINGS_EXIT if findings else 0
    if rank.rank == 0:
        code = _write_copy(RunPaths(Path(os.environ["MEGARAY_RUN"])), typed.copy, code)
    if code == FINDINGS_EXIT and not by.keeps_codes:
        # The launcher would bury these lines under a report of a crash.
        print(
            f"# {len(findings)} findings; `{PROGRAM} compare {os.environ['MEGARAY_RUN']}` prints them, with exit code 3"
        )
        return 0
    return code


def _requested_ranks(ranks: int | None, typed: int | None) -> int | None:
    """Ranks to start here, by `--ranks` or by nccl-tests' `-t` and `-g`."""
    if ranks is not None and typed is not None and ranks != typed:
        raise UserError(
            f"--ranks={ranks} contradicts -t times -g, which are {typed} ranks; leave one of them out"
        )
    return typed if ranks is None else ranks


def _unused_folder(folder: Path) -> Path:
    """The folder, or one beside it: two measurements may begin within a second."""
    number = 2
    while folder.exists():
        folder = folder.with_name(f"{folder.name.partition('_')[0]}_{number}")
        number += 1
    return folder


def _make_new_folder(folder: Path) -> Path:
    """The folder, or one beside it, which this command made: another one may begin at the same moment."""
    while True:
        folder = _unused_folder(folder)
        try:
            folder.mkdir(parents=True)
        except FileExistsError:
            continue
        except OSError as error:
            raise UserError(
                f"{folder} can't be written ({error.strerror}); name a folder with --out"
            ) from None
        return folder


def _write_copy(run: RunPaths, target: Path | None, code: int) -> int:
    """Write the copy of the operation's JSON that `-J` names, where all was measured."""
    if target is None or code not in (0, FINDINGS_EXIT):
        return code
    made = sorted(run.measurement.glob("*.*.json"))
    if len(made) != 1:
        raise UserError(
            f"-J {target} takes one operation and group, and {run.measurement} has {len(made)} of them"
        )
    try:
        target.write_text(made[0].read_text())
    except OSError as error:
        raise UserError(f"-J {target} can't be written ({error.strerror}); it is {made[0]}") from None
    return code


def _world_size(config: RunConfig, ranks: int | None) -> int:
    """Ranks to start here, as typed, or one for each device."""
    world = ranks if ranks is not None else _devices(config)
    if world < 2:
        raise UserError(f"--ranks={world}: a collective needs at least two ranks; type at least --ranks 2")
    if world > _MAX_LOCAL_RANKS:
        raise UserError(
            f"--ranks={world} is above {_MAX_LOCAL_RANKS}, the most that are started on one machine; "
            "start more by torchrun, srun or mpirun"
        )
    return world


def _run_locally(config: RunConfig, world: int, folder: Path) -> int:
    """Start ranks on this machine and wait for them."""
    run = RunPaths(folder)
    store = ResultStore(run.measurement)
    _refuse_other(store, config, world, folder)
    try:
        claim = _claim(run, store, config, world)
        resolved = tempfile.NamedTemporaryFile("w", suffix=".yaml")  # noqa: SIM115 (closed below)
    except OSError as error:
        raise UserError(f"--out={folder} can't be written ({error.strerror}); name another folder") from None
    with claim, resolved, ended_by_signals():
        try:
            resolved.write(dump(config))
            resolved.flush()
            started = LocalRanks.start(run, world, ["-m", "collectives", "run", "--config", resolved.name])
        except OSError as error:
            raise UserError(f"no ranks were started ({error}); name another folder with --out") from None
        try:
            code, trouble = started.wait(fine=(0, FINDINGS_EXIT))
        except KeyboardInterrupt:
            started.end()
            code, trouble = INTERRUPTED_EXIT, "interrupted"
        except EndedBySignal as ended:
            started.end()
            code, trouble = ended.code, str(ended)
    if trouble:
        kept = "" if code == USER_ERROR_EXIT else _write_finished_rows(store)
        print(f"megaray: {'; '.join(filter(None, [trouble, kept]))}", file=sys.stderr)
    return code


def _claim(run: RunPaths, store: ResultStore, config: RunConfig, world: int) -> BinaryIO:
    """Lock the folder for this command, and only then write the configuration into it.

    Rank 0 locks the rows, but not before torch is loaded: until then another command that began at the same moment would
    replace this one's configuration and logs.

    Raises:
        UserError: where another command was faster.
        OSError: where the folder can't be written.
    """
    claim = lock(run.config, store.folder)
    try:
        _refuse_other(store, config, world, run.root)  # it may have ended since the first look
        if not (store.metadata.exists() and run.config.stat().st_size):
            claim.truncate(0)
            claim.write(dump(config).encode())
            claim.flush()
    except BaseException:
        claim.close()
        raise
    return claim


def _refuse_other(store: ResultStore, config: RunConfig, world: int, folder: Path) -> None:
    """Refuse a folder with a whole or another measurement before anything is written into it.

    What only the ranks know, such as hosts and versions, they compare themselves.
    """
    if not store.metadata.exists():
        return
    about, ended = store.read_metadata()
    if ended:
        raise UserError(f"--out={folder} holds a finished measurement; name another folder, or remove it")
    differs = first_difference(about, settings_of(config.collectives))
    if not differs and about.settings["ranks"] != world:
        differs = f"ranks={about.settings['ranks']}"
    if differs:
        raise other_measurement_error(store.folder, differs)
    with contextlib.suppress(OSError):  # what can't be written is reported by whoever writes
        store.lock().close()


def _write_finished_rows(store: ResultStore) -> str:
    """Write the tables of the finished rows, and say where they are."""
    rows = [row for row in store.finished() if row.timings] if store.metadata.exists() else []
    if not rows:
        return ""
    count = "1 row is" if len(rows) == 1 else f"{len(rows)} rows are"
    kept = f"{count} kept in {store.folder}"
    try:
        stream.write_tables(store, lambda: None)
    except OSError as error:  # as on a full disk; the rows are in the journal
        kept += f", without tables ({error.strerror})"
    return f"{kept}, and the same command with this --out continues after them"


def _devices(config: RunConfig) -> int:
    if config.hardware.kind == "cpu":
        return 2
    import torch  # asked only where there should be GPUs

    return int(torch.cuda.device_count())


def _fit(options: argparse.Namespace, _: list[str]) -> int:
    from collectives import commands  # loads numpy

    print(commands.fit(commands.open_measurement(options.measurement), options.name, options.confidence))
    return 0


def warn(text: str) -> None:
    """Print a warning."""
    print(f"megaray: {text}", file=sys.stderr)


def _compare(options: argparse.Namespace, _: list[str]) -> int:
    from collectives import commands

    baseline = commands.open_measurement(options.baseline) if options.baseline else None
    findings = commands.compare(
        commands.open_measurement(options.measurement), baseline, options.tolerance, warn
    )
    if options.json:
        print(json.dumps([finding.to_json() for finding in findings]))
    else:
        print("\n".join(map(str, findings)) or "nothing slower than it should be")
    return FINDINGS_EXIT if findings else 0


def _report(options: argparse.Namespace, _: list[str]) -> int:
    from collectives import commands  # loads matplotlib

    baseline = commands.open_measurement(options.baseline) if options.baseline else None
    for path in commands.report(commands.open_measurement(options.measurement), baseline):
        print(path)
    return 0


def _device(options: argparse.Namespace, _: list[str]) -> int:
    from collectives import commands  # loads torch

    config = compose(["workload=collectives", *options.overrides])

    last = -math.inf

    def progress(text: str) -> None:
        nonlocal last
        if last == -math.inf:  # only now: what can't be measured has been refused by then
            print(
                f"# measuring for about {options.seconds:g} s; Ctrl-C keeps what is measured so far",
                file=sys.stderr,
            )
        if sys.stderr.isatty():
            last = time.monotonic()
            print(f"\r{text:<100.100}", end="", file=sys.stderr)
        elif time.monotonic() - last >= _PROGRESS_SECONDS:
            last = time.monotonic()
            print(f"# {text}", file=sys.stderr)

    text, agrees = commands.device(config, options.name, options.seconds, options.against, progress)
    print(text)
    return 0 if agrees else FINDINGS_EXIT
