"""The command line of the trainer: train, prepare token files, size a model for its hardware, time a step, forecast a
run's loss, and validate the sizing."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import sys
import traceback
from collections.abc import Iterable, Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from configs.compose import choices, compose, load
from configs.errors import (
    INTERRUPTED_EXIT,
    STOPPED_EXIT,
    EndedBySignal,
    OneLineParser,
    OutputLost,
    Stopped,
    UserError,
    check_command,
    disk_trouble,
    nearest,
    said,
    unknown,
)
from configs.paths import default_home
from configs.rank import RankContext, die_with_parent
from configs.section import MOST_DEVICES
from faulttol.recorder import RankPhase, Recorder
from trainer.bench.options import ROUTINGS, options_of

if TYPE_CHECKING:
    from configs.schema import RunConfig
    from trainer.sizing.ask.answer import SizingAnswer
    from trainer.sizing.ask.questions import AnsweredQuestion

PROGRAM = "python -m trainer"
_COMMANDS = ("run", "prepare", "size", "bench", "forecast", "validate")


def main(arguments: Sequence[str]) -> int:
    """Run a command; exit code 0 done, 2 a user's mistake, 130 interrupted, 143 stopped by SIGTERM with its state
    saved, 1 anything else."""
    try:
        options = parse(arguments)
        if options.command == "prepare":
            return _prepare(options)
        if options.command == "forecast":
            return _forecast(options)
        if options.command == "validate":
            return _validate(options)
        if options.command == "bench":
            return _bench(options, list(arguments))
        return _run(options.config, options.overrides) if options.command == "run" else _size(options)
    except (UserError, OutputLost, EndedBySignal) as error:
        return said(error)
    except Stopped as stopped:
        print(f"megaray: {stopped}", file=sys.stderr)
        return STOPPED_EXIT
    except KeyboardInterrupt:
        print("megaray: interrupted", file=sys.stderr)
        return INTERRUPTED_EXIT
    except BrokenPipeError:  # the reader of our output has seen enough
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115, PTH123  (kept open until the end)
        return 0
    except Exception as error:
        if words := _storage_error(error):
            print(f"megaray: {words}", file=sys.stderr)
        else:
            traceback.print_exc()
        return 1


def _storage_error(error: Exception) -> str:
    """What a disk that is full or broken means for whoever started this; empty for any other error."""
    from faulttol.checkpoint.manifest import Incomplete  # has been loaded where it is raised

    what = str(error) if isinstance(error, Incomplete) else disk_trouble(error, "a file")
    if not what:
        return ""
    return f"{what}; fix that, then type the same command again: a run continues from its last checkpoint"


def _parser() -> OneLineParser:
    parser = OneLineParser(
        prog=PROGRAM, description="Train, prepare data, size models, and measure training steps."
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=OneLineParser
    )
    run = commands.add_parser("run", help="train; each rank is one process, as torchrun starts them")
    run.add_argument(
        "overrides", nargs="*", metavar="field=value", help="configuration, as `submit` takes it"
    )
    run.add_argument("--config", type=Path, help="a resolved configuration, as saved with a run")
    prepare = commands.add_parser(
        "prepare", help="tokenise text into a memory-mapped token file, before a run",
        description="Tokenise text, jsonl or parquet into Megatron's .bin and .idx; the same command resumes it.",
    )  # fmt: skip
    prepare.add_argument(
        "overrides", nargs="*", metavar="field=value", help="data.path=PATH and other data fields"
    )
    prepare.add_argument("--config", type=Path, help="YAML file with any part of the configuration")
    prepare.add_argument(
        "--out", type=Path, metavar="DIR", help="folder for the files; by default the cache of runs"
    )
    prepare.add_argument(
        "--workers", type=_count, metavar="N", help="processes; one for each core by default"
    )
    prepare.add_argument("--json", action="store_true", help="print JSON and nothing else")
    size = commands.add_parser(
        "size", help="forecast a model's memory and step time on its hardware, and suggest better shapes",
        description="Parameters, memory, time and lint of a model on a device; --explain derives each number.",
    )  # fmt: skip
    size.add_argument(
        "overrides", nargs="*", metavar="field=value", help="model=NAME hardware=NAME, and any field"
    )
    size.add_argument("--config", type=Path, help="YAML file with any part of the configuration")
    size.add_argument(
        "--gpus", type=_count, metavar="N", help="number of devices; the layout is searched unless set"
    )
    size.add_argument(
        "--profile", metavar="NAME",
        help="device profile with measured rates, or `catalogue` for published ones; by default the device's own",
    )  # fmt: skip
    size.add_argument("--suggest", action="store_true", help="suggest faster shapes with the same parameters")
    size.add_argument("--compare", metavar="A,B", help="show devices side by side")
    size.add_argument("--fit", action="store_true", help="show what must change to fit into memory")
    size.add_argument(
        "--by", metavar="DATE", help="how many devices finish by a date: 2026-12-24, friday, 10d"
    )
    size.add_argument("--tokens", metavar="T", help="tokens to train until --by, such as 300B")
    size.add_argument("--on", metavar="NAME", help="compare with the same job on another device")
    size.add_argument(
        "--explain", nargs="?", const="", metavar="NAME", help="derive a number; without NAME, list the names"
    )
    size.add_argument("--json", action="store_true", help="print JSON and nothing else")
    size.add_argument(
        "--hardware-table", nargs="?", const="", metavar="NAME", help="the catalogue with its sources"
    )
    size.add_argument("--rules", action="store_true", help="the lint's rules with reasons and sources")
    _add_bench(commands)
    forecast = commands.add_parser(
        "forecast", help="forecast a run's final loss, and check that it follows its trend",
        description="Fit a power law with a confidence band to the run's log and forecast the mean loss of its last steps.",
    )  # fmt: skip
    forecast.add_argument("folder", type=Path, help="the run's folder")
    forecast.add_argument("--steps", type=_count, metavar="N", help="last step; by default as configured")
    forecast.add_argument(
        "--warmup", type=_count, metavar="N", help="warm-up steps; by default as configured"
    )
    forecast.set_defaults(overrides=[])
    _add_validate(commands)
    return parser


def _add_validate(commands: argparse._SubParsersAction[OneLineParser]) -> None:
    validate = commands.add_parser(
        "validate", help="compare sizing forecasts with published runs and trivial baselines",
        description="Compare forecast with published step times, memory and layouts, and write a report with plots.",
    )  # fmt: skip
    validate.add_argument(
        "--data", type=Path, metavar="DIR", help="folder of the published tables; by default MEGARAY_DATA"
    )
    validate.add_argument(
        "--runs", type=Path, metavar="FILE", help="one table, with the columns of a known one"
    )
    validate.add_argument(
        "--out", type=Path, metavar="DIR", default=Path("validation"), help="where the report goes"
    )
    validate.add_argument("--json", action="store_true", help="print rows, errors and targets as JSON")
    validate.set_defaults(overrides=[])


def _add_bench(commands: argparse._SubParsersAction[OneLineParser]) -> None:
    bench = commands.add_parser(
        "bench", help="time a training step against compiled torch, Hugging Face and DeepSpeed",
        description="Time the whole step, its parts and kernels, and the device's peak rates, in one run.",
    )  # fmt: skip
    bench.add_argument("overrides", nargs="*", metavar="field=value", help="any field of the configuration")
    bench.add_argument("--gpus", type=_count, default=1, metavar="N", help="ranks; 1 by default")
    bench.add_argument("--model", default="olmoe_1b_7b", metavar="NAME", help="a model preset")
    bench.add_argument("--layers", type=_count, metavar="N", help="number of layers; by default the model's")
    bench.add_argument(
        "--routing", choices=ROUTINGS, default="real",
        help="expert load: the router's on real text (default), or forced to be balanced or Zipf's",
    )  # fmt: skip
    bench.add_argument("--steps", type=_count, default=20, metavar="N", help="timed steps; 20 by default")
    bench.add_argument(
        "--baselines", default="plain,hf", metavar="A,B", help="some of plain, hf and deepspeed, or none"
    )
    bench.add_argument(
        "--timeline", type=Path, metavar="DIR", help="write one profiled step into this folder"
    )
    bench.add_argument(
        "--variants",
        metavar="'A | B'",
        help="a table of settings, such as 'ep=4 | tp=2 ep=4 | ep=4 routing=zipf | auto'",
    )


def _bench(options: argparse.Namespace, arguments: list[str]) -> int:
    from trainer.bench import command  # torch loads here alone

    typed = options_of(
        options.model, options.layers, options.routing, options.steps, options.baselines, options.timeline,
        options.overrides,
    )  # fmt: skip
    say = lambda line: print(line, flush=True)  # noqa: E731
    return command.run(typed, options.gpus, arguments, say, options.variants)


def _count(text: str) -> int:
    try:
        value = int(text)
    except ValueError:
        value = 0
    if value > MOST_DEVICES:
        raise argparse.ArgumentTypeError(f"'{text}' is above {MOST_DEVICES}; type e.g. 8")
    if value < 1:
        raise argparse.ArgumentTypeError(f"'{text}' is not a whole number above 0; type e.g. 8")
    return value


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """What was typed.

    Raises:
        UserError: for a word that is not a command, option or configuration.
    """
    check_command(arguments, _COMMANDS)
    parser = _parser()
    options, rest = parser.parse_known_args(list(arguments))
    for word in rest:
        if word.startswith("-"):
            raise unknown(word, parser, options.command)
        options.overrides.append(word)
    for name in ("explain", "hardware_table"):  # an override after a flag whose value may be left out
        value = getattr(options, name, None)
        if value and "=" in value:
            options.overrides.append(value)
            setattr(options, name, "")
    return options


def _prepare(options: argparse.Namespace) -> int:
    from trainer.data import command

    try:
        prepared = command.run(options.overrides, options.config, options.out, options.workers, sys.stderr)
    except KeyboardInterrupt:
        print("megaray: stopped; the same command continues from here", file=sys.stderr)
        return INTERRUPTED_EXIT
    return _print_lines([json.dumps(prepared, indent=1)] if options.json else command.lines(prepared))


def _forecast(options: argparse.Namespace) -> int:
    if options.overrides:
        raise UserError(f"'{options.overrides[0]}' is one word too many; a forecast takes one run folder")
    from trainer.sizing.forecast import report  # numpy loads here alone

    return _print_lines(report(options.folder, options.steps, options.warmup))


def _validate(options: argparse.Namespace) -> int:
    if options.overrides:
        raise UserError(
            f"'{options.overrides[0]}' is one word too many; validate takes --data, --runs, --out and --json"
        )
    if options.out.exists() and not options.out.is_dir():
        raise UserError(f"--out {options.out} is a file; name a folder for the report")
    from trainer.study import report  # numpy and matplotlib load here alone
    from trainer.study.validate import validate

    study = validate(options.data, options.runs)
    if options.json:
        from trainer.study.validate import as_data

        return _print_lines([json.dumps(as_data(study), indent=1)])
    written = report.write(study, options.out)
    return _print_lines([*report.summary(study), "", f"report: {written[0]}"])


def _print_lines(lines: Iterable[str]) -> int:
    print("\n".join(lines))
    return 0


def _size(options: argparse.Namespace) -> int:
    from trainer.sizing.ask import catalogue, screen

    if options.hardware_table is not None:
        name = options.hardware_table
        if name:
            _check_device("--hardware-table", name)
        devices = [catalogue.device(name)] if name else catalogue.devices()
        if options.json:
            return _print_lines([json.dumps([one.model_dump(mode="json") for one in devices], indent=1)])
        return _print_lines(screen.hardware_table(devices[0]) if name else screen.hardware_tables(devices))
    if options.rules:
        return _print_lines(screen.rule_list())
    return _answer(options)


def _answer(options: argparse.Namespace) -> int:
    from trainer.sizing.ask import screen
    from trainer.sizing.ask.answer import answer

    names = _devices_to_compare(options.compare)
    rest = [word for word in options.overrides if word.partition("=")[0] != "hardware"]
    calls = [[*rest, f"hardware={name}"] for name in names] or [options.overrides]
    answers = [answer(call, options.config, options.gpus, options.profile, options.suggest) for call in calls]
    more = _answer_questions(options, answers[0])
    if options.json:
        made = [one.to_json() for one in answers]
        for one in more:
            made[0] |= one.to_json()
        return _print_lines([json.dumps(made if names else made[0], indent=1)])
    if options.explain is not None:
        figures = answers[0].figures() | {
            f.name: f for one in more for top in one.figures for f in top.walk()
        }
        return _print_lines(screen.explained(figures, options.explain))
    lines = list(screen.compared(answers) if names else screen.sized(answers[0]))
    for one in more:
        lines += ["", one.title, *(f"  {line}" for line in one.text())]
    return _print_lines([*lines, "", screen.HINT])


def _answer_questions(options: argparse.Namespace, one: SizingAnswer) -> list[AnsweredQuestion]:
    """Answers to what is asked besides."""
    from trainer.sizing.ask import catalogue, questions
    from trainer.sizing.ask.fit import fit

    hardware = one.costs.hardware
    answers: list[AnsweredQuestion] = []
    if (options.by is None) != (options.tokens is None):
        raise UserError("--by and --tokens go together; type e.g. --by friday --tokens 300B")
    if options.fit:
        answers.append(fit(one.job, hardware))
    if options.by is not None:
        answers.append(
            questions.devices_by_deadline(one, options.by, options.tokens, datetime.now().astimezone())
        )
    if options.on is not None:
        _check_device("--on", options.on)
        there = catalogue.device(options.on)
        answers.append(questions.compare_devices(one.job, questions.task(one), hardware, there))
    return answers


def _check_device(flag: str, name: str) -> None:
    known = choices("hardware")
    if name not in known:
        raise UserError(f"{flag} {name}: no such device{nearest(name, known)}; use one of {', '.join(known)}")


def _devices_to_compare(text: str | None) -> list[str]:
    """The devices of `--compare`."""
    if text is None:
        return []
    names, known = [name for name in text.split(",") if name], choices("hardware")
    for name in names:
        if name not in known:
            raise UserError(
                f"--compare {text}: no device {name}{nearest(name, known)}; use some of {', '.join(known)}"
            )
    if len(names) < 2:
        raise UserError(f"--compare {text} names {len(names)} device; name two or more, such as h200,mi300x")
    return names


def _run(file: Path | None, overrides: list[str]) -> int:
    die_with_parent(os.environ)
    config = load(file) if file is not None and not overrides else compose(overrides, file)
    world = RankContext.from_environment(os.environ, default_home() / "runs" / "torchrun").world
    _check_layout(config, world)
    if config.parallel.open or None in (
        config.parallel.dp,
        config.train.global_batch,
        config.train.precision,
        config.train.engine,
    ):
        from trainer.sizing.search.planner import Capacity, plan  # a resolved configuration needs no plan

        config = plan(config, Capacity.of_nodes([world])).config
    rank = RankContext.from_environment(os.environ, default_home() / "runs" / _run_folder_name(config))
    if rank.rank == 0:
        print(f"run folder: {rank.run.root}", file=sys.stderr)
        if config.parallel.lend_rows is not None:
            from trainer.sizing.search.runnable import never_lends  # what most ranks needn't wait for

            if idle := never_lends(config, rank.local_world):
                print(f"note: {idle}", file=sys.stderr)
    recorder = Recorder(rank.files.ring, rank.rank)
    recorder.begin(RankPhase.IMPORTS, 0)
    from trainer.loop import main as train  # torch loads after the parent's death is arranged for

    train(config, rank, recorder)
    return 0


def _check_layout(config: RunConfig, world: int) -> None:
    """Refuse a layout that can't run, or not on so many ranks, in the words of who starts ranks by hand."""
    from trainer.sizing.search.runnable import refusal

    why = refusal(config)
    if why:
        raise UserError(why)
    ranks = config.parallel.ranks
    if world < ranks or (config.parallel.dp is not None and world != ranks and not config.parallel.open):
        raise UserError(
            f"parallel.pp*dp*cp*tp={ranks} ranks are laid out, but {world} {'was' if world == 1 else 'were'} started; "
            f"start {ranks}: torchrun --nproc-per-node {ranks} -m trainer run ..."
        )


def _run_folder_name(config: RunConfig) -> str:
    """A run folder for each thing to be trained, so that one never continues from another; steps and layout may change."""
    tree = config.model_dump(
        mode="json", include={"model": True, "data": True, "optim": True, "train": {"seed"}}
    )
    return f"torchrun-{hashlib.blake2b(json.dumps(tree, sort_keys=True).encode(), digest_size=4).hexdigest()}"
