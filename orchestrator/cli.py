"""The command line: what can be typed, and one clear line for what can't.

Reading commands (`plan`, `list`, `status`, `watch`, `logs`, `incidents`) look at files and import neither
torch nor ray nor deepspeed; the others load `orchestrator.commands.cluster_commands` when they are called.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from configs.errors import (
    DISK_ERRORS,
    INTERRUPTED_EXIT,
    USER_ERROR_EXIT,
    OneLineParser,
    OutputLost,
    UserError,
    check_command,
    said,
    unknown,
)
from configs.paths import HomePaths, default_home
from orchestrator import DASHBOARD_PORT, PROGRAM
from orchestrator.commands.calls import CommandCall, plan_answer, watch, with_resume_source

_OVERRIDES = "configuration: group=preset or dotted.field=value, such as model=demo train.steps=200"


@dataclass(frozen=True)
class Command:
    """A command's name, its help, and what it takes."""

    name: str
    help: str
    run: Callable[[CommandCall], int]
    takes_overrides: bool = False
    takes_run: bool = False
    takes_node: bool = False


def build_parser() -> argparse.ArgumentParser:
    """The whole surface; `tests/orchestrator/commands/cli_surface.txt` holds it still."""
    parser = OneLineParser(
        prog=PROGRAM, description="Submit, watch and resume mixture-of-experts training runs."
    )
    commands = parser.add_subparsers(
        dest="command", required=True, metavar="COMMAND", parser_class=OneLineParser
    )
    for command in COMMANDS:
        sub = commands.add_parser(command.name, help=command.help, description=command.help)
        sub.add_argument("--json", action="store_true", help="print JSON and nothing else")
        sub.add_argument("--address", help="HOST:PORT of a Ray head, or http://HOST:8265 of its dashboard")
        if command.takes_run:
            sub.add_argument("run", help="run id, or the beginning of one")
        if command.takes_node:
            sub.add_argument("node", help="address or host name of a node, as `nodes` shows it")
        if command.takes_overrides:
            sub.add_argument("overrides", nargs="*", metavar="field=value", help=_OVERRIDES)
            if not command.takes_run:
                sub.add_argument("--config", type=Path, help="YAML file with any part of the configuration")
        for flags, options in _OPTIONS.get(command.name, []):
            sub.add_argument(*flags, **options)
    return parser


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """Parse; overrides and options may stand in any order.

    Raises:
        UserError: in one line, naming the nearest command or option.
    """
    parser = build_parser()
    check_command(arguments, (command.name for command in COMMANDS))
    options, rest = parser.parse_known_args(arguments)
    for word in rest:
        if word.startswith("-") or not hasattr(options, "overrides"):
            raise unknown(word, parser, options.command)
        options.overrides.append(word)
    return options


def main(arguments: Sequence[str]) -> int:
    """Run one command; its exit code: 0 done, 1 the run failed, 2 the user's mistake."""
    try:
        options = parse(arguments)
        call = CommandCall(options, HomePaths(default_home()), tuple(arguments))
        if call.address and call.address.startswith(("http://", "https://")):
            return _cluster("forward", call)
        return next(c for c in COMMANDS if c.name == options.command).run(call)
    except UserError as error:
        return said(error)
    except OutputLost as error:
        sys.stdout = None  # its end would fail once more
        return said(error)
    except BrokenPipeError:
        sys.stdout = None  # `| head` has left; nothing more can be written
        return 0
    except KeyboardInterrupt:
        print("megaray: interrupted", file=sys.stderr)
        return INTERRUPTED_EXIT
    except OSError as error:
        if error.filename is None and error.errno not in DISK_ERRORS:
            raise  # no storage's fault, so one of ours
        print(f"megaray: {_storage(error)}", file=sys.stderr)
        return USER_ERROR_EXIT


def _storage(error: OSError) -> str:
    """What a file that can't be read or written means for whoever has typed a command."""
    where = f"{error.filename}: " if error.filename is not None else ""
    return (
        f"{where}{error.strerror}; look at its owner, its permissions and the room on its disk (MEGARAY_HOME is "
        f"{default_home()}), then type the command again"
    )


def _cluster(name: str, call: CommandCall) -> int:
    """Call a command of the module that loads Ray."""
    # Loaded here, since reading commands must answer without Ray.
    from orchestrator.commands import cluster_commands

    return int(getattr(cluster_commands, name)(call))


def _plan(call: CommandCall) -> int:
    from configs.compose import compose  # composition alone needs Hydra; `list` and `status` do not
    from orchestrator.commands.submission import slot_resource
    from trainer.sizing.search.planner import plan

    config, begins = with_resume_source(compose(call.overrides, call.config_file), call.home)
    made = plan(config, known_capacity(call.home, call.options.slots, slot_resource(config)))
    call.say(*plan_answer(made, begins, call.home))
    return 0


def known_capacity(home: HomePaths, slots: int | None, resource: str) -> Any:
    """What is known of the cluster without asking it: `--slots`, the controller's published view, or None."""
    from orchestrator.record.summaries import read_queue
    from trainer.sizing.search.planner import Capacity

    if slots is not None:
        return Capacity.of_nodes([slots])
    counts = [node["slots"].get(resource, 0) for node in read_queue(home).get("nodes", [])]
    return Capacity.of_nodes([n for n in counts if n]) if any(counts) else None


def _list(call: CommandCall) -> int:
    from orchestrator.commands import console
    from orchestrator.record import summaries

    if call.options.watch:
        from orchestrator.commands import screen  # rich loads where somebody looks

        screen.watch_list(call.home, sys.stdout, call.wants_json)
        return 0
    listing = summaries.summaries(call.home)
    text = console.run_list(listing.rows, listing.damage, listing.silent)
    call.report(text, [asdict(row) for row in listing.rows])
    if call.wants_json:
        sys.stderr.writelines(f"{line}\n" for line in console.list_notes(listing))
    return 0


def _status(call: CommandCall) -> int:
    from orchestrator.commands import console
    from orchestrator.record import summaries

    reader = summaries.RunReader(call.home.existing(call.options.run))
    queue = summaries.read_queue(call.home)
    row, incidents = reader.summary(queue), reader.incidents()
    silent = "" if row.terminal else summaries.controller_silence(queue, time.time())
    call.report(
        console.status(row, incidents, silent), asdict(row) | {"incidents": incidents, "silent": silent}
    )
    return 0


def _watch(call: CommandCall) -> int:
    return watch(call, call.home.existing(call.options.run).run_id)


def _logs(call: CommandCall) -> int:
    from orchestrator.commands import watching
    from orchestrator.commands.text import redacted

    run = call.home.existing(call.options.run)
    rank, attempts = call.options.rank, run.attempt_numbers()
    newest = attempts[-1] if attempts else 1
    attempt = newest if call.options.attempt is None else call.options.attempt
    if attempt not in attempts:
        raise UserError(
            f"run '{run.run_id}' has no attempt {attempt}; it has "
            f"{', '.join(map(str, attempts)) or 'none yet'}"
        )
    path = run.attempt(attempt).log(rank)
    if not path.exists():
        raise UserError(
            f"--rank {rank}: attempt {attempt} of '{run.run_id}' has no such rank; its logs are in {path.parent}"
        )
    if call.wants_json:
        print(json.dumps({"run": run.run_id, "attempt": attempt, "rank": rank, "path": str(path),
                          "text": redacted(path.read_text(errors="replace"))}))  # fmt: skip
        return 0
    try:
        watching.show_log(path, sys.stdout, run if call.options.follow else None)
    except KeyboardInterrupt:
        return INTERRUPTED_EXIT
    return 0


def _prune(call: CommandCall) -> int:
    # Loaded here: which checkpoints are read by others needs their manifests, and other commands don't.
    from orchestrator.commands import prune

    return prune.prune(call)


def _dashboard(call: CommandCall) -> int:
    from orchestrator.web import cli as dashboard  # aiohttp and numpy, for those who look

    return dashboard.run(call)


def _incidents(call: CommandCall) -> int:
    from orchestrator.commands import console
    from orchestrator.record import summaries

    rows = summaries.incidents(call.home.existing(call.options.run))
    call.report(console.incidents(rows), rows)
    return 0


def _on_cluster(name: str) -> Callable[[CommandCall], int]:
    return lambda call: _cluster(name, call)


COMMANDS = [
    Command("submit", "plan a run, ask, queue it and follow it", _on_cluster("submit"), takes_overrides=True),
    Command("plan", "show the plan of a configuration, without a cluster", _plan, takes_overrides=True),
    Command("list", "show all runs with state, position in the queue and progress", _list),
    Command("status", "show one run", _status, takes_run=True),
    Command("watch", "follow a run; Ctrl-C leaves it alone", _watch, takes_run=True),
    Command("logs", "show what a rank has printed", _logs, takes_run=True),
    Command("incidents", "show what broke, where, when, and what it cost", _incidents, takes_run=True),
    Command("cancel", "stop a run; its checkpoints stay", _on_cluster("cancel"), takes_run=True),
    Command(
        "resume",
        "continue a failed or cancelled run, under another layout, batch or number of nodes if typed",
        _on_cluster("resume"),
        takes_overrides=True,
        takes_run=True,
    ),
    Command("nodes", "show the cluster's nodes and who holds their slots", _on_cluster("nodes")),
    Command(
        "cordon",
        "let no new run start on a node; what runs there continues",
        _on_cluster("cordon"),
        takes_node=True,
    ),
    Command(
        "uncordon",
        "let runs start on a cordoned or drained node again",
        _on_cluster("uncordon"),
        takes_node=True,
    ),
    Command(
        "drain",
        "move runs off a node, after a save, and keep others from it",
        _on_cluster("drain"),
        takes_node=True,
    ),
    Command("spare", "keep a node for runs that have lost one", _on_cluster("spare"), takes_node=True),
    Command("unspare", "use a spare node like the others", _on_cluster("unspare"), takes_node=True),
    Command("prune", "remove the folders of runs that ended long ago, and code that no run needs", _prune),
    Command(
        "dashboard", "serve the page, its JSON and Prometheus' metrics for all runs of the home", _dashboard
    ),
    Command("serve", "keep the controller of a Ray cluster up; for service managers", _on_cluster("serve")),
    Command("up", "start a local Ray that outlives the command", _on_cluster("up")),
    Command("down", "cancel all runs and end the local Ray", _on_cluster("down")),
]

_YES = (("--yes", "-y"), {"action": "store_true", "help": "do not ask"})
_DETACH = (("--detach",), {"action": "store_true", "help": "return once the run is queued"})
_REASON = (("--reason",), {"required": True, "help": "why, for whoever looks at `nodes`"})
_OPTIONS: dict[str, list[tuple[tuple[str, ...], dict[str, Any]]]] = {
    "submit": [
        _YES,
        _DETACH,
        (("--dry-run",), {"action": "store_true", "help": "show the plan and check it, start nothing"}),
        (("--priority",), {"type": int, "default": 0, "help": "higher goes first (default 0)"}),
        (("--owner",), {"help": "who it belongs to; quotas count by it (default: your account)"}),
    ],
    "list": [
        (("--watch",), {"action": "store_true", "help": "show it again whenever it changes, until Ctrl-C"})
    ],
    "dashboard": [
        (("--host",), {"default": "127.0.0.1", "help": "address to listen on (default 127.0.0.1)"}),
        (
            ("--port",),
            {"type": int, "default": DASHBOARD_PORT, "help": f"port (default {DASHBOARD_PORT}; 0: any)"},
        ),
        (
            ("--allow-host",),
            {
                "action": "append",
                "default": [],
                "metavar": "NAME",
                "help": "another name that browsers reach it by",
            },
        ),
        (
            ("--no-token",),
            {"action": "store_true", "help": "let anybody of this machine read and act; loopback only"},
        ),
        (
            ("--export",),
            {
                "nargs": 2,
                "metavar": ("RUN", "FILE"),
                "help": "write one run as one HTML file instead of serving",
            },
        ),
    ],
    "cancel": [(("--now",), {"action": "store_true", "help": "kill its ranks instead of having them save"})],
    "cordon": [_REASON],
    "drain": [_REASON],
    "prune": [
        _YES,
        (("--keep",), {"type": int, "metavar": "N", "help": "keep the newest N runs that have ended"}),
        (
            ("--older",),
            {"type": float, "metavar": "DAYS", "help": "only runs that ended longer ago (default 30)"},
        ),
    ],
    "plan": [(("--slots",), {"type": int, "help": "slots of an imagined node"})],
    "resume": [_YES, _DETACH],
    "logs": [
        (("--rank",), {"type": int, "default": 0, "help": "rank (default 0)"}),
        (("--attempt",), {"type": int, "help": "attempt (default the newest)"}),
        (("--follow", "-f"), {"action": "store_true", "help": "continue until the run ends"}),
    ],
    "up": [(("--slots",), {"type": int, "help": "ranks that may run at once (default: processors)"})],
    "down": [_YES],
}
