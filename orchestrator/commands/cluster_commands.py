"""The commands that talk to a Ray cluster; loaded only when one of them is typed."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import asdict

from configs.compose import compose, dump
from configs.errors import UserError
from configs.schema import RunConfig
from configs.timeouts import Timeouts
from faulttol.checkpoint.store import check_writable
from orchestrator import PROGRAM, ray_cluster
from orchestrator.commands import beginnings, console
from orchestrator.commands.calls import Call, begun, shown, watch
from orchestrator.commands.resumption import Resumption
from orchestrator.commands.submission import CODE, Submission, slot_resource, travelling_source, write_run
from orchestrator.ray_controller import ControllerClient
from orchestrator.record import reading
from trainer.data import prepare
from trainer.sizing.planner import Capacity, plan, trainable

_DOWN_SECONDS = 30.0
_CANCEL_SECONDS = 60.0


def forward(call: Call) -> int:
    """Run the command on the head of the cluster whose dashboard URL was given."""
    words, skip = [], False
    for word in call.arguments:
        if skip or word.startswith("--address="):
            skip = False
        elif word == "--address":
            skip = True
        else:
            words.append(word)
    command = call.options.command
    if command == "submit" and "--yes" not in words:
        words.append("--yes")  # nobody is at that terminal
    if command in ("up", "down"):
        raise UserError(f"`{command}` starts and ends Ray on this machine only; leave --address out")
    assert call.address is not None

    def write(text: str) -> None:
        # A job's log has both streams of the command; under --json its answer is the line that is JSON.
        for line in text.splitlines(keepends=True):
            out = sys.stdout if not call.wants_json or _is_json(line) else sys.stderr
            out.write(line)
            out.flush()

    return ray_cluster.forward(call.address, words, CODE, travelling_source(), write)


def _is_json(line: str) -> bool:
    try:
        return isinstance(json.loads(line), dict | list)
    except ValueError:
        return False


def submit(call: Call) -> int:
    """Plan, show, ask, queue, follow."""
    config, begins = begun(compose(call.overrides, call.config_file), call.home)
    call.home.ensure()
    notes = _check_training(config) if config.workload == "train" else []
    address = _running(call)
    if address:
        ray_cluster.connect(address)
    try:
        submission = Submission(
            config, plan(config, _capacity(config, address), strict=True), call.options.priority
        )
        text, tree = shown(submission.plan, begins, call.home)
        call.note("\n".join([text, *notes]))
        if call.options.dry_run:
            call.say("dry run: nothing was started", {"plan": tree})
            return 0
        if not _agreed(call):
            call.say("nothing was started")
            return 1
        if not address:
            _start_for(call, submission)
        paths = write_run(call.home, submission, call.arguments)
        event = submission.event(ray_cluster.runtime_environment())
        ControllerClient.connect(call.home).submit(paths.run_id, event)
    finally:
        ray_cluster.disconnect()
    if call.options.detach:
        call.say(console.submitted(paths), {"run": paths.run_id, "path": str(paths.root)})
        return 0
    call.note(console.submitted(paths))
    return watch(call, paths.run_id)


def _check_training(config: RunConfig) -> list[str]:
    """Refuse before the queue what every rank would refuse after it; what of the data is left out."""
    refusal = trainable(config)
    if refusal:
        raise UserError(refusal)
    notes = prepare.check(config.data, config.model.vocab)
    if config.checkpoint.path:
        check_writable(config.checkpoint.path)
        beginnings.refuse_anothers(config.checkpoint.path)
    return notes


def _running(call: Call) -> str | None:
    """Address of the cluster to use; None where a local one is to be started."""
    if call.address:
        return call.address
    found = ray_cluster.local(call.home)
    return found.address if found else None


def _required(call: Call) -> str:
    address = _running(call)
    if not address:
        raise UserError(
            f"no Ray cluster is up for {call.home.home}; `python -m orchestrator up` starts one, "
            "--address HOST:PORT names another"
        )
    return address


def _capacity(config: RunConfig, address: str | None) -> Capacity | None:
    """Slots of the connected cluster by node; None where a local Ray is started to measure."""
    if not address:
        return None
    resource = slot_resource(config)
    nodes = ray_cluster.slots(resource)
    if not any(nodes):
        raise UserError(
            f"hardware={config.hardware.name} needs {resource} slots, and the cluster at {address} has none; "
            "choose hardware=cpu or another cluster"
        )
    return Capacity.of_nodes([n for n in nodes if n])


def _agreed(call: Call) -> bool:
    if call.options.yes or call.wants_json or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return True
    try:
        answer = input("Proceed? [Y/n] ").strip().lower()
    except EOFError:
        return False
    return answer in ("", "y", "yes")


def _start_for(call: Call, submission: Submission) -> None:
    """Start a local Ray that holds this run, and connect."""
    config = submission.plan.config
    if config.hardware.kind != "cpu":
        raise UserError(
            f"hardware={config.hardware.name} needs a Ray cluster with GPUs and none was named; "
            "start one with `ray start --head` and give --address HOST:PORT, or choose hardware=cpu"
        )
    slots = max(submission.plan.ranks, os.cpu_count() or 1)
    _up(call, slots, config.resilience.timeouts)


def _up(call: Call, slots: int, timeouts: Timeouts) -> ray_cluster.LocalCluster:
    call.note("starting a local Ray …")
    record = ray_cluster.up(call.home, slots, timeouts)
    ray_cluster.connect(record.address)
    cpus = os.cpu_count() or 1
    if slots > cpus:
        call.note(f"{slots} slots on {cpus} processors: ranks share them and run slower")
    return record


def up(call: Call) -> int:
    """Start a local Ray and its controller."""
    slots = call.options.slots if call.options.slots is not None else os.cpu_count() or 1
    if slots < 1:
        raise UserError(f"--slots {slots}: a cluster needs at least one; leave it out for one per processor")
    call.home.ensure()
    record = _up(call, slots, Timeouts())
    try:
        ControllerClient.connect(call.home)
    finally:
        ray_cluster.disconnect()
    call.say(
        f"local Ray is up at {record.address} with {record.slots} slots; dashboard {record.dashboard}\n"
        "next: python -m orchestrator submit, python -m orchestrator down",
        asdict(record),
    )
    return 0


def down(call: Call) -> int:
    """Cancel all runs of the local Ray and end it."""
    record = ray_cluster.local(call.home)
    if record is None:
        # What a crash has left behind goes too.
        ray_cluster.down(call.home)
        raise UserError(f"no local Ray is up for {call.home.home}; nothing to take down")
    active = [row.run_id for row in reading.summaries(call.home) if not row.terminal]
    if active:
        call.note(f"active: {', '.join(active)}; each is cancelled and can be resumed from its checkpoint")
    if active and not _agreed(call):
        call.say("nothing was ended")
        return 1
    ray_cluster.connect(record.address)
    client = ControllerClient.existing()
    deadline = time.monotonic() + _DOWN_SECONDS
    while client and client.shut_down() and time.monotonic() < deadline:
        time.sleep(0.2)
    ray_cluster.disconnect()
    ray_cluster.down(call.home)
    call.say("the local Ray is down", {"cancelled": active})
    return 0


def cancel(call: Call) -> int:
    """Stop a run and wait until nothing of it is left."""
    run = call.home.existing(call.options.run)
    _refuse_ended(call, run.run_id)
    client = _client(call)
    said = client.cancel(run.run_id)
    call.note(said)
    deadline = time.monotonic() + _CANCEL_SECONDS
    while not (row := reading.summary(run, {})).terminal:
        if time.monotonic() > deadline:
            raise UserError(
                f"run '{run.run_id}' is still {row.state}; `{PROGRAM} status {run.run_id}` shows when it ends"
            )
        time.sleep(0.2)
    ray_cluster.disconnect()
    call.say(f"{run.run_id} is {row.state}; {row.next_step} continues it", asdict(row))
    return 0


def _refuse_ended(call: Call, run_id: str) -> None:
    """Say that a run has ended before looking for a cluster, which may be down by then."""
    row = reading.summary(call.home.run(run_id), {})
    if row.terminal:
        raise UserError(f"run '{run_id}' is {row.state} already; nothing to cancel")


def resume(call: Call) -> int:
    """Queue a failed or cancelled run again, with what was typed changed, and follow it."""
    run = call.home.existing(call.options.run)
    row = reading.summary(run, {})
    if row.state == "succeeded":
        raise UserError(
            f"run '{run.run_id}' has succeeded: {row.step} of {row.steps} steps are done; a new run trains on from it: "
            f"`{PROGRAM} submit --config {run.newest_config} resume={run.run_id} train.steps={2 * max(1, row.steps)}`"
        )
    if not row.terminal:
        raise UserError(f"run '{run.run_id}' is {row.state}; only a failed or cancelled run resumes")
    resumption = Resumption.of(run, call.overrides)
    resumption.check()
    address = _running(call)
    if address:
        ray_cluster.connect(address)
    try:
        if call.overrides:
            resumption = resumption.planned(_capacity(resumption.config, address))
            call.note(console.amended(resumption.to_json()))
            if not _agreed(call):
                call.say("nothing was started")
                return 1
        if not address:
            _up(call, max(resumption.slots, os.cpu_count() or 1), Timeouts())
        client = ControllerClient.connect(call.home)
        client.resume(run.run_id, resumption.event(), dump(resumption.config))
    finally:
        ray_cluster.disconnect()
    said = f"resuming {run.run_id} from {resumption.start}"
    tree = resumption.to_json() if call.overrides else {}
    call.say(said, tree | {"run": run.run_id, "said": said} if call.options.detach else None)
    if call.options.detach:
        return 0
    return watch(call, run.run_id)


def nodes(call: Call) -> int:
    """Show nodes, slots and their holders."""
    _client(call)
    ray_cluster.disconnect()
    queue = reading.read_queue(call.home)
    call.say(console.nodes(queue), queue)
    return 0


def _client(call: Call) -> ControllerClient:
    ray_cluster.connect(_required(call))
    return ControllerClient.connect(call.home)
