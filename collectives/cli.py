"""The command line of `python -m collectives`."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
import traceback
from pathlib import Path

from collectives.launch import Ranks, launched
from collectives.store.results import Store
from configs.compose import compose, dump, load
from configs.errors import USER_ERROR_EXIT, UserError, nearest
from configs.paths import RunPaths
from configs.rank import RankContext, die_with_parent
from configs.schema import RunConfig

PROGRAM = "python -m collectives"
FINDINGS_EXIT = 3
"""Exit code where all was measured and something was found slow or wrong."""
_FLAGS = (
    ("-b", "min_size", "BYTES", "smallest size, e.g. 8, 32M, 1G"),
    ("-e", "max_size", "BYTES", "largest size"),
    ("-f", "step_factor", "FACTOR", "factor from one size to the next"),
    ("-i", "step_size", "BYTES", "bytes from one size to the next, instead of -f"),
    ("-n", "min_iterations", "COUNT", "timed iterations at least; more follow until the mean is known"),
    ("-w", "min_warmup", "COUNT", "untimed iterations at least"),
    ("-o", "reductions", "NAMES", "sum, prod, max, min, avg, band, bor, bxor"),
    ("-d", "dtypes", "NAMES", "int8, uint8, int32, int64, half, bfloat16, float, double"),
    ("-r", "root", "RANK", "root of rooted operations"),
    ("-c", "check", "0|1", "check every element"),
)
"""nccl-tests' flags that have the same meaning here, and their fields."""


def main(arguments: list[str]) -> int:
    """Run one command; exit code 0 done, 1 failed, 2 a user's mistake, 3 something was found slow or wrong."""
    try:
        options = parse(arguments)
        return int(options.command(options, arguments))
    except UserError as error:
        print(f"megaray: {error}", file=sys.stderr)
        return USER_ERROR_EXIT
    except BrokenPipeError:
        return 1
    except KeyboardInterrupt:
        print("megaray: interrupted", file=sys.stderr)
        return 130
    except Exception as error:
        from collectives.timing.team import FabricLost  # loads torch

        if isinstance(error, FabricLost):
            print(f"megaray: {error}", file=sys.stderr)
        else:
            traceback.print_exc()
        return 1


def parse(arguments: list[str]) -> argparse.Namespace:
    """Options; configuration fields may stand anywhere among them.

    Raises:
        UserError: for a word that is neither.
    """
    options, rest = _parser().parse_known_args(arguments)
    for word in rest:
        if word.startswith("-") or not hasattr(options, "overrides"):
            known = ["--ranks", "--out", "--ops", "--config", *(flag for flag, *_ in _FLAGS)]
            raise UserError(
                f"'{word}' is no option of `{options.name}`{nearest(word, known)}; `{PROGRAM} {options.name} --help` "
                "shows them"
            )
        options.overrides.append(word)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    commands = parser.add_subparsers(dest="name", required=True)
    run = commands.add_parser(
        "run", help="measure: ranks are started here, or by torchrun, srun or mpirun", allow_abbrev=False
    )
    _add_overrides(run)
    run.add_argument("--config", type=Path, help="a resolved configuration, as saved with a measurement")
    run.add_argument("--ranks", type=int, help="ranks to start on this machine; default: its GPUs, or 2")
    run.add_argument("--out", type=Path, help="folder of the measurement; one that was interrupted goes on")
    run.add_argument("--ops", metavar="NAMES", help="operations, with commas")
    for flag, field, metavar, text in _FLAGS:
        run.add_argument(flag, dest=field, metavar=metavar, help=text)
    run.add_argument(
        "-z", dest="blocking", choices=["0", "3"], help="3: a barrier, untimed, before each iteration"
    )
    run.add_argument("-G", dest="graph", choices=["0", "1"], help="1: replay a graph (GPU)")
    run.set_defaults(command=_run)
    _add_reading(commands)
    device = commands.add_parser("device", help="matmul and copy rates of one device, for sizing")
    _add_overrides(device)
    device.add_argument("--name", help="name of the profile under configs/profiles/device")
    device.add_argument("--seconds", type=float, default=180.0, help="time to spend")
    device.add_argument("--against", metavar="PROFILE", help="compare with a profile, by name or path")
    device.set_defaults(command=_device)
    return parser


def _add_overrides(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "overrides", nargs="*", metavar="field=value", help="configuration, as `submit` takes it"
    )


def _add_reading(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Commands that read a measurement."""
    fit = commands.add_parser("fit", help="latency and bandwidth by region of sizes, as a fabric profile")
    fit.add_argument("--name", help="name of the profile under configs/profiles/fabric")
    fit.add_argument("--confidence", type=float, default=0.95, help="level of the intervals")
    fit.set_defaults(command=_fit)
    compare = commands.add_parser("compare", help="against a baseline, the hardware's limit and peers")
    compare.add_argument("--baseline", type=Path, help="an earlier measurement of the same")
    compare.add_argument("--tolerance", type=float, default=0.1, help="share by which a rate may fall")
    compare.add_argument("--json", action="store_true", help="findings as JSON")
    compare.set_defaults(command=_compare)
    report = commands.add_parser("report", help="plots as PNG and a page that stands alone")
    report.add_argument("--baseline", type=Path, help="an earlier measurement to compare with")
    report.set_defaults(command=_report)
    for command in (fit, compare, report):
        command.add_argument("measurement", type=Path, help="folder of a measurement, or id of a run")


def overrides(options: argparse.Namespace) -> list[str]:
    """nccl-tests' flags as fields of the configuration."""
    found = ["workload=collectives", *options.overrides]
    if options.ops:
        found.append(f"collectives.ops={options.ops}")
    for _, field, _, _ in _FLAGS:
        value = getattr(options, field)
        if value is not None:
            value = {"0": "false", "1": "true"}.get(value, value) if field == "check" else value
            found.append(f"collectives.{field}={value}")
    for field in ("iterations", "warmup"):
        # As nccl-tests takes these flags: as many as are asked for, above the usual most.
        asked, most = getattr(options, f"min_{field}") or "", {"iterations": 1000, "warmup": 200}[field]
        if asked.isdigit() and int(asked) > most and not any(f"max_{field}" in o for o in found):
            found.append(f"collectives.max_{field}={asked}")
    if options.blocking:
        found.append(f"collectives.sync={'barrier' if options.blocking == '3' else 'loop'}")
    if options.graph:
        found.append(f"collectives.timer={'graph' if options.graph == '1' else 'auto'}")
    return found


def _run(options: argparse.Namespace, arguments: list[str]) -> int:
    die_with_parent(os.environ)
    config = load(options.config) if options.config else compose(overrides(options))
    variables = launched(os.environ)
    folder = options.out or Path(f"collectives-{time.strftime('%Y%m%d-%H%M%S')}")
    if variables is None:
        return _run_here(config, options, folder)
    os.environ.update(variables)
    if options.out is None:
        folder = Path("collectives-launched")  # one name on all ranks, which start at different times
    rank = RankContext.from_environment(os.environ, folder.absolute())
    from collectives.studies.program import (
        main as measure,  # torch loads after the parent's death is arranged for
    )

    return FINDINGS_EXIT if measure(config, rank, arguments=tuple(arguments)) else 0


def _run_here(config: RunConfig, options: argparse.Namespace, folder: Path) -> int:
    """Start ranks on this machine and wait for them."""
    world = options.ranks if options.ranks is not None else _devices(config)
    if world < 2:
        raise UserError(f"--ranks={world}: one rank has nobody to talk to; type at least --ranks 2")
    run = RunPaths(folder.absolute())
    store = Store(run.measurement)
    if store.metadata.exists() and store.read().ended:
        raise UserError(f"--out={folder} holds a finished measurement; name another folder, or remove it")
    try:
        run.root.mkdir(parents=True, exist_ok=True)
        run.config.write_text(dump(config))
    except OSError as error:
        raise UserError(f"--out={folder} can't be written ({error.strerror}); name another folder") from None
    ranks = Ranks.start(run, world, ["-m", "collectives", "run", "--config", str(run.config)])
    try:
        code, trouble = ranks.wait(fine=(0, FINDINGS_EXIT))
    except KeyboardInterrupt:
        ranks.end()
        code, trouble = 130, "interrupted"
    if trouble:
        print(f"megaray: {'; '.join(filter(None, [trouble, _keep(store)]))}", file=sys.stderr)
    return code


def _keep(store: Store) -> str:
    """Make the files of what is done, and say so."""
    rows = store.finished() if store.metadata.exists() else []
    if not rows:
        return ""
    store.write()
    return f"{len(rows)} rows are kept in {store.folder}, and the same command with this --out goes on after them"


def _devices(config: RunConfig) -> int:
    if config.hardware.kind == "cpu":
        return 2
    import torch  # asked only where there should be GPUs

    return int(torch.cuda.device_count())


def _fit(options: argparse.Namespace, _: list[str]) -> int:
    from collectives import commands  # loads numpy

    print(commands.fit(commands.find(options.measurement), options.name, options.confidence))
    return 0


def _compare(options: argparse.Namespace, _: list[str]) -> int:
    from collectives import commands

    baseline = commands.find(options.baseline) if options.baseline else None
    findings = commands.compare(commands.find(options.measurement), baseline, options.tolerance)
    if options.json:
        print(json.dumps([finding.to_json() for finding in findings]))
    else:
        print("\n".join(map(str, findings)) or "nothing slower than it should be")
    return FINDINGS_EXIT if findings else 0


def _report(options: argparse.Namespace, _: list[str]) -> int:
    from collectives import commands  # loads matplotlib

    baseline = commands.find(options.baseline) if options.baseline else None
    for path in commands.report(commands.find(options.measurement), baseline):
        print(path)
    return 0


def _device(options: argparse.Namespace, _: list[str]) -> int:
    from collectives import commands  # loads torch

    config = compose(["workload=collectives", *options.overrides])

    def progress(text: str) -> None:
        if sys.stderr.isatty():
            print(f"\r{text:<100.100}", end="", file=sys.stderr)

    text, agrees = commands.device(config, options.name, options.seconds, options.against, progress)
    print(text)
    return 0 if agrees else FINDINGS_EXIT
