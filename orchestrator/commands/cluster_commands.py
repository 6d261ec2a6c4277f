"""The commands that talk to a Ray cluster; loaded only when one of them is typed."""

from __future__ import annotations

import contextlib
import sys
import time
from dataclasses import asdict, replace

from configs.compose import compose, dump
from configs.errors import UserError, from_json
from configs.paths import RunPaths
from configs.schema import RunConfig
from configs.timeouts import Timeouts
from faulttol.checkpoint.store import check_writable
from orchestrator import PROGRAM, ray_cluster, ray_jobs
from orchestrator.commands import cluster_target, console, resume_source
from orchestrator.commands.calls import CommandCall, plan_answer, watch, with_resume_source
from orchestrator.commands.code_snapshot import CODE, PACKAGES, snapshot_code
from orchestrator.commands.node_commands import cordon, drain, spare, uncordon, unspare
from orchestrator.commands.resumption import Resumption
from orchestrator.commands.submission import Submission, code_state, owner_of, source_variables, write_run
from orchestrator.local import cluster, machine, supervisor
from orchestrator.local.lock import file_lock
from orchestrator.ray_controller import ControllerClient
from orchestrator.record import summaries
from orchestrator.record.events import Submitted
from orchestrator.record.summaries import RunReader
from trainer.data import prepare
from trainer.sizing.search import runnable
from trainer.sizing.search.planner import plan

__all__ = [
    "cancel", "cordon", "down", "drain", "forward", "nodes", "resume", "serve", "spare", "submit", "uncordon", "unspare",
    "up",
]  # fmt: skip

_DOWN_SECONDS = 30.0
_CANCEL_SECONDS = 60.0
"""That a cancelled run may take beyond the grace of its ranks."""
_HERE = ("up", "down", "serve")
"""Commands about Ray on this machine."""


def forward(call: CommandCall) -> int:
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
    if command in ("submit", "resume") and "--yes" not in words:
        words.append("--yes")  # nobody is at that terminal
    if command in _HERE:
        raise UserError(f"`{command}` is about Ray on this machine only; leave the URL out")
    assert call.address is not None

    def write(text: str) -> None:
        # A job's log has both streams of the command; under --json its answer is the line that is JSON.
        for line in text.splitlines(keepends=True):
            out = sys.stdout if not call.wants_json or _is_json(line) else sys.stderr
            out.write(line)
            out.flush()

    code = ray_jobs.JobWorkingDir(CODE, PACKAGES)
    return ray_jobs.forward(call.address, words, code, source_variables(), write)


def _is_json(line: str) -> bool:
    try:
        return isinstance(from_json(line), dict | list)
    except ValueError:
        return False


def submit(call: CommandCall) -> int:
    """Plan, show, ask, queue, follow."""
    config, begins = with_resume_source(compose(call.overrides, call.config_file), call.home)
    owner = owner_of(call.options.owner)
    call.home.ensure()
    notes = _check_training(config) if config.workload == "train" else []
    place = cluster_target.target(call)
    if place:
        place.connect()
    try:
        submission = Submission(
            config,
            plan(config, cluster_target.capacity(config, place), strict=True),
            call.options.priority,
            owner,
        )
        text, tree = plan_answer(submission.plan, begins, call.home)
        call.note("\n".join([text, *notes]))
        if call.options.dry_run:
            call.say("dry run: nothing was started", {"plan": tree})
            return 0
        if not _agreed(call):
            call.say("nothing was started")
            return 1
        controller = ControllerClient.connect(call.home) if place else None
        if controller is None:
            controller, submission = _started_for(call, submission)
        paths, code = write_run(call.home, submission, call.arguments)
        _queue(controller, paths, submission.event(ray_cluster.runtime_environment(), code))
    finally:
        ray_cluster.disconnect()
    if call.options.detach:
        call.say(console.submitted(paths), {"run": paths.run_id, "path": str(paths.root)})
        return 0
    call.note(console.submitted(paths))
    return watch(call, paths.run_id)


def _queue(controller: ControllerClient, paths: RunPaths, event: Submitted) -> None:
    """Queue a run whose folder is written; where the controller is just being replaced, it is asked again.

    Raises:
        UserError: where it doesn't answer; the run is queued all the same if it has heard, so its folder stays.
    """
    for wait in (1.0, 4.0, 10.0, None):
        try:
            return controller.submit(paths.run_id, event)
        except UserError as error:
            if paths.events.exists() and RunReader(paths).view.state is not None:
                return None  # only the answer was lost
            if wait is None:
                raise UserError(f"{error} (its folder is {paths.root})") from None
            time.sleep(wait)
    return None


def _check_training(config: RunConfig) -> list[str]:
    """Refuse before the queue what every rank would refuse after it; what of the data is left out."""
    refusal = runnable.refusal(config)
    if refusal:
        raise UserError(refusal)
    notes = prepare.check(config.data, config.model.vocab)
    if config.checkpoint.path:
        check_writable(config.checkpoint.path)
        resume_source.refuse_foreign_folder(config.checkpoint.path)
    return notes


def _agreed(call: CommandCall) -> bool:
    if call.options.yes or call.wants_json or not (sys.stdin.isatty() and sys.stdout.isatty()):
        return True
    try:
        answer = input("Proceed? [Y/n] ").strip().lower()
    except EOFError:
        return False
    return answer in ("", "y", "yes")


def _started_for(call: CommandCall, submission: Submission) -> tuple[ControllerClient, Submission]:
    """A local Ray that holds this run. Where another command has just started one, the run is planned for that."""
    made = submission.plan
    slots = max(made.ranks if made.config.hardware.kind == "cpu" else 1, machine.processors())
    controller, record, mine = cluster_target.start_local(
        call, slots, machine.gpus(), made.config.resilience.timeouts
    )
    if not mine:
        config = submission.config
        given = cluster_target.capacity(config, cluster_target.ClusterTarget.of(record))
        submission = replace(submission, plan=plan(config, given, strict=True))
        call.note(f"another command has just started Ray at {record.address}; the run is planned for that")
    return controller, submission


def up(call: CommandCall) -> int:
    """Start a local Ray and its controller."""
    slots = call.options.slots if call.options.slots is not None else machine.processors()
    if slots < 1:
        raise UserError(f"--slots {slots}: a cluster needs at least one; leave it out for one per processor")
    if running := cluster.live_cluster(call.home):
        raise UserError(
            f"a local Ray with {running.slots} slots is up at {running.address}; `{PROGRAM} down` ends it"
        )
    call.home.ensure()
    try:
        _, record, mine = cluster_target.start_local(call, slots, machine.gpus(), Timeouts())
    finally:
        ray_cluster.disconnect()
    if not mine:
        call.note("another command has just started it")
    gpus = f" and {record.gpus} GPUs" if record.gpus else ""
    call.say(
        f"local Ray is up at {record.address} with {record.slots} slots{gpus}; Ray's own dashboard {record.dashboard}\n"
        f"next: {PROGRAM} submit, {PROGRAM} dashboard, {PROGRAM} down",
        asdict(record),
    )
    return 0


def down(call: CommandCall) -> int:
    """Cancel all runs of the local Ray and end it, as far as it can be reached; what is left of a crash goes too."""
    record = cluster.live_cluster(call.home)
    _, damage = cluster.read_record(call.home)
    if record is None:
        with (
            file_lock(call.home.cluster_lock, call.note)
            if call.home.home.is_dir()
            else contextlib.nullcontext()
        ):
            if cluster.stop_cluster(call.home):
                call.say(
                    f"what was left of a local Ray is ended{f': {damage}' if damage else ''}",
                    {"cancelled": []},
                )
                return 0
        removal = f"; {damage}, and is removed" if damage else ""
        raise UserError(f"no local Ray is up for {call.home.home}; nothing to take down{removal}")
    active = _active(call)
    if active:
        call.note(f"active: {', '.join(active)}; each is cancelled and can be resumed from its checkpoint")
    if active and not _agreed(call):
        call.say("nothing was ended")
        return 1
    with file_lock(call.home.cluster_lock, call.note):
        try:
            _cancel_all(call, record)
        except UserError as error:
            call.note(f"its runs can't be cancelled: {error}")
        finally:
            ray_cluster.disconnect()
        cluster.stop_cluster(call.home)
    left = _active(call)
    if left:
        names = ", ".join(left)
        call.note(
            f"not cancelled: {names}; its ranks have ended with Ray, and the next `{PROGRAM} up` continues it"
        )
    call.say("the local Ray is down", {"cancelled": [run for run in active if run not in left], "left": left})
    return 0


def _active(call: CommandCall) -> list[str]:
    """Runs of the home that haven't ended."""
    return [row.run_id for row in summaries.summaries(call.home).rows if not row.terminal]


def _cancel_all(call: CommandCall, record: cluster.LocalCluster) -> None:
    cluster_target.ClusterTarget.of(record).connect()
    controller = ControllerClient.existing(call.home)
    deadline = time.monotonic() + _DOWN_SECONDS
    while controller and controller.shut_down() and time.monotonic() < deadline:
        time.sleep(0.2)


def serve(call: CommandCall) -> int:
    """Keep the controller of a cluster that something else keeps up."""
    if not call.address:
        raise UserError("`serve` needs --address HOST:PORT of the Ray head whose controller it keeps")
    ray_cluster.check_address(call.address)
    call.home.ensure()
    call.note(f"keeping the controller of {call.address} for {call.home.home}; Ctrl-C ends this, and no run")
    supervisor.serve(call.home, call.address, call.note)
    return 0


def cancel(call: CommandCall) -> int:
    """Stop a run and wait until nothing of it is left."""
    run = call.home.existing(call.options.run)
    _refuse_ended(call, run.run_id)
    with cluster_target.client(call) as controller:
        said = controller.cancel(run.run_id, call.options.now, owner_of(None))
    call.note(said)
    began, reader = time.monotonic(), RunReader(run)
    while not (row := reader.summary({})).terminal:
        # Its ranks finish their step and save.
        grace = reader.view.stopping.grace if reader.view.stopping else 0.0
        if time.monotonic() - began > grace + _CANCEL_SECONDS:
            raise UserError(
                f"run '{run.run_id}' is still {row.state}; `{PROGRAM} status {run.run_id}` shows when it ends"
            )
        time.sleep(0.2)
    call.report(f"{run.run_id} is {row.state}; {console.continue_hint(row)}", asdict(row))
    return 0


def _refuse_ended(call: CommandCall, run_id: str) -> None:
    """Say that a run has ended before looking for a cluster, which may be down by then."""
    row = summaries.summary(call.home.run(run_id), {})
    if row.terminal:
        raise UserError(f"run '{run_id}' has ended already ({row.state}); nothing to cancel")


def resume(call: CommandCall) -> int:
    """Queue a failed or cancelled run again, with what was typed changed, and follow it."""
    run = call.home.existing(call.options.run)
    row = summaries.summary(run, {})
    if row.state == "succeeded":
        raise UserError(
            f"run '{run.run_id}' has succeeded: {row.step} of {row.steps} steps are done; a new run can continue from it: "
            f"`{PROGRAM} submit --config {run.newest_config} resume={run.run_id} train.steps={2 * max(1, row.steps)}`"
        )
    if not row.terminal:
        raise UserError(f"run '{run.run_id}' is {row.state}; only a failed or cancelled run resumes")
    resumption = Resumption.of(run, call.overrides)
    resumption.check()
    place = cluster_target.target(call)
    if place:
        place.connect()
    try:
        if call.overrides:
            resumption = resumption.planned(cluster_target.capacity(resumption.config, place))
            call.note(console.amended(resumption.to_json()))
            if not _agreed(call):
                call.say("nothing was started")
                return 1
        resumption = replace(resumption, code=str(snapshot_code(call.home, code_state())))
        if resumption.code_changed:
            before = resumption.view.request.code or "the installed packages"
            call.note(f"it continues with the code as it is now, {resumption.code}; before: {before}")
        if place:
            controller = ControllerClient.connect(call.home)
        else:
            slots = max(resumption.slots, machine.processors())
            controller, _, _ = cluster_target.start_local(call, slots, machine.gpus(), Timeouts())
        controller.resume(run.run_id, resumption.event(), dump(resumption.config), owner_of(None))
    finally:
        ray_cluster.disconnect()
    said = f"resuming {run.run_id} from {resumption.start}"
    tree = resumption.to_json() if call.overrides else {}
    call.say(said, tree | {"run": run.run_id, "said": said} if call.options.detach else None)
    if call.options.detach:
        return 0
    return watch(call, run.run_id)


def nodes(call: CommandCall) -> int:
    """Show nodes, slots and their holders."""
    with cluster_target.client(call):
        pass  # the controller publishes what is shown
    queue = summaries.read_queue(call.home)
    call.say(console.nodes(queue), queue)
    return 0
