"""Another layout where nodes are gone: legal, with the same token batch, and the way back."""

from __future__ import annotations

from dataclasses import replace

import pytest

from configs.compose import compose, dump, load
from configs.errors import UserError
from configs.schema import RunConfig
from orchestrator.commands.submission import Submission
from orchestrator.decide import elastic
from orchestrator.decide.elastic import ElasticChoice, SmallerLayoutSearch, regrow, smaller_layout
from orchestrator.decide.placement import Node, Unschedulable, fits, place, with_slots_taken
from orchestrator.decide.queue import QueuePolicy, RunningRun, WaitingRun
from orchestrator.record.events import GangShape
from orchestrator.record.states import Reason, State
from tests.orchestrator.decide.cluster_sim import ClusterSim, make_nodes
from trainer.sizing.model.layout import Layout
from trainer.sizing.search import runnable
from trainer.sizing.search.planner import Capacity, RunPlan, plan

pytestmark = [pytest.mark.sim, pytest.mark.timeout(120)]
OLMOE = ("model=olmoe_1b_7b", "hardware=h100", "parallel.dp=8", "parallel.ep=8", "train.global_batch=1536")


def asked(*overrides: str, slots: list[int]) -> tuple[RunConfig, GangShape]:
    """A run as it is submitted: its resolved configuration and its gang."""
    config = compose(list(overrides), None)
    made = plan(config, Capacity.of_nodes(slots), strict=True)
    return made.config, Submission(config, made, priority=0).gang()


def on(config: RunConfig, gang: GangShape, *slots: int) -> ElasticChoice:
    found = smaller_layout(config, Capacity.of_nodes(list(slots)), gang)
    assert found is not None
    return found


def check(config: RunConfig, choice: ElasticChoice, slots: tuple[int, ...]) -> None:
    """What holds for every choice."""
    new = choice.config
    assert runnable.refusal(new) is None, "the trainer runs it"
    assert choice.gang.ranks == new.parallel.size("pp") * (new.parallel.dp or 0) * new.parallel.size(
        "cp"
    ) * new.parallel.size("tp")
    assert choice.layout == {axis: new.parallel.size(axis) for axis in choice.layout}
    assert fits(choice.gang, slots) and choice.gang.nodes is None
    kept = ("model", "data", "optim", "checkpoint", "resilience", "hardware", "tracking", "resume", "name")
    assert all(getattr(new, name) == getattr(config, name) for name in kept)
    learned = {"micro_batch", "recompute"}
    assert new.train.model_dump(exclude=learned) == config.train.model_dump(exclude=learned)
    assert "slots on" in choice.reason


def test_a_gang_on_cpus_goes_on_with_what_is_left(tmp_path: object) -> None:
    """Four hosts with two slots each; two are gone, then one."""
    config, gang = asked(
        "experiment=demo", "parallel.dp=8", "parallel.ep=4", "train.global_batch=64", slots=[2] * 4
    )
    two, three = on(config, gang, 2, 2), on(config, gang, 2, 2, 2)
    for choice, slots in ((two, (2, 2)), (three, (2, 2, 2))):
        check(config, choice, slots)
    assert (two.layout["dp"], two.layout["ep"], two.gang) == (4, 4, GangShape(4, 1, None, "CPU"))
    assert two.reason.startswith("4 of 4 slots on 2 nodes: next to the layout before; cpu has no ")
    assert three.gang.ranks > 4, "more than half is used where some axis divides"
    assert two.config.train.global_batch == 64 and two.config.train.micro_batch == 8


def test_without_times_the_fewest_axes_change() -> None:
    """With two of eight slots gone, giving up ep alone changes more than a third stage and half of ep, but one axis."""
    config, gang = asked(
        "experiment=demo", "parallel.dp=4", "parallel.ep=4", "parallel.pp=2", "train.global_batch=192", slots=[2] * 4
    )  # fmt: skip
    six = on(config, gang, 2, 2, 2)
    assert {axis: six.layout[axis] for axis in ("pp", "dp", "ep")} == {"pp": 2, "dp": 3, "ep": 1}


def test_a_smaller_layout_lends_where_it_can() -> None:
    """Of OLMoE's experts a token goes to 8: what a plan chose for a layout must not stop a run from getting another."""
    config, gang = asked(
        *OLMOE, "parallel.lend_rows=64", "train.micro_batch=1", "data.sequence=4096", slots=[8]
    )
    small = on(config, gang, 4)
    check(config, small, (4,))
    assert small.config.parallel.lend_rows == 64
    free = elastic._with_open_layout(config, 1)
    kept = {"zero": 1, "schedule": "1f1b", "chunks": 1}
    for layout, lends in (
        (Layout(1, 4, 1, 4, 1, 1), 64),
        (Layout(1, 16, 1, 16, 1, 1), None),
        (Layout(1, 4, 1, 2, 2, 2), None),
    ):
        choice = elastic._choice(config, free, layout, {"parallel": kept}, (16,), gang)
        assert choice is not None and choice.config.parallel.lend_rows == lends


def test_the_fastest_layout_wins_where_times_are_known() -> None:
    words = ["model=olmoe_1b_7b", "hardware=h100", "parallel.dp=16", "parallel.ep=8", "train.global_batch=64"]
    config, gang = asked(*words, "train.micro_batch=1", "data.sequence=4096", slots=[8, 8])
    one = on(config, gang, 8)
    check(config, one, (8,))
    assert one.gang.ranks == 8 and "s a step by prediction" in one.reason
    seconds = plan(one.config, Capacity.of_nodes([8])).step_time["seconds"]
    same = config.model_copy(
        update={"parallel": config.parallel.model_copy(update={"dp": 8}), "cluster": one.config.cluster}
    )
    assert seconds <= plan(same, Capacity.of_nodes([8])).step_time["seconds"], (
        "no slower than with dp halved alone"
    )


def test_what_does_not_fit_is_recomputed_or_split_and_none_is_said_where_nothing_helps() -> None:
    words = ["model=olmoe_1b_7b", "hardware=h100", "parallel.dp=8", "parallel.ep=8", "train.global_batch=64"]
    config, gang = asked(*words, "train.micro_batch=4", "data.sequence=4096", slots=[8])
    two = on(config, gang, 2)
    check(config, two, (2,))
    have = config.hardware.memory_gib
    assert have is not None
    assert sum(plan(two.config, Capacity.of_nodes([2])).memory.values()) < have * 2**30
    assert (two.config.train.recompute, two.config.train.micro_batch) != ("none", 4)
    assert smaller_layout(config, Capacity.of_nodes([1]), gang) is None, (
        "its states alone are larger than one device"
    )


def test_the_micro_batch_shrinks_where_nothing_fits_with_it() -> None:
    config, gang = asked(*OLMOE, "train.micro_batch=48", "data.sequence=4096", slots=[8])
    assert [on(config, gang, slots).config.train.micro_batch for slots in (4, 3)] == [48, 24]


def test_a_smaller_layout_is_smaller_however_many_slots_there_are() -> None:
    config, gang = asked("experiment=demo", "parallel.dp=4", "train.global_batch=96", slots=[2, 2])
    choice = on(config, gang, 2, 2, 2)
    check(config, choice, (2, 2, 2))
    assert choice.gang.ranks == 3


def test_blocks_fit_the_nodes_that_are_left() -> None:
    """Seven and five slots: expert groups of four can't be cut out of five and a half."""
    config, gang = asked(
        "experiment=demo", "parallel.dp=16", "parallel.ep=4", "train.global_batch=128", slots=[8, 8]
    )
    choice = on(config, gang, 7, 5)
    check(config, choice, (7, 5))
    assert not isinstance(place(choice.gang, make_nodes(2, 8, free=lambda i: (7, 5)[i])), Unschedulable)


def test_other_engines_and_schedules_stay_what_they_are() -> None:
    config, gang = asked(
        "experiment=demo", "parallel.dp=4", "train.engine=deepspeed", "train.global_batch=64", slots=[2, 2]
    )
    choice = on(config, gang, 2, 1)
    check(config, choice, (2, 1))
    assert choice.layout == {"pp": 1, "dp": 2, "cp": 1, "ep": choice.layout["ep"], "etp": 1, "tp": 1}
    words = ["model=olmoe_1b_7b", "hardware=h100", "parallel.pp=2", "parallel.dp=4", "parallel.ep=4"]
    config, gang = asked(
        *words, "parallel.schedule=zbv", "train.micro_batch=1", "train.global_batch=64", "data.sequence=4096", slots=[8]
    )  # fmt: skip
    choice = on(config, gang, 4)
    check(config, choice, (4,))
    assert (choice.layout["pp"], choice.config.parallel.schedule) == (2, "zbv")


def test_a_batch_that_grows_divides_at_every_size() -> None:
    config, gang = asked(
        "experiment=demo", "parallel.dp=4", "train.global_batch=96", "train.ramp_batch=32", "train.ramp_steps=10",
        slots=[2, 2],
    )  # fmt: skip
    choice = on(config, gang, 2, 1)
    check(config, choice, (2, 1))
    assert 32 % (choice.config.train.micro_batch * choice.layout["dp"]) == 0


def test_a_measurement_waits() -> None:
    config, gang = asked("workload=collectives", "parallel.dp=4", slots=[2, 2])
    assert smaller_layout(config, Capacity.of_nodes([2]), gang) is None


def test_a_search_is_done_in_pieces_and_an_answer_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    config, gang = asked(*OLMOE, "train.micro_batch=24", "data.sequence=4096", slots=[4, 4])
    question = config, Capacity.of_nodes([2, 4]), gang
    search = SmallerLayoutSearch(*question)
    pieces = 0
    while not search.done:
        assert search.choice is None, "nobody takes a choice that isn't the last word"
        search.step()
        pieces += 1
    assert pieces > 2 and search.choice is not None and search.choice == smaller_layout(*question)
    monkeypatch.setattr(elastic, "plan", None)  # whatever is worked out again fails
    before = search.choice
    search.step()
    assert search.done and search.choice is before
    assert search.matches(config, Capacity.of_nodes([4, 2]), gang), "the order of the nodes doesn't matter"
    assert not search.matches(config, Capacity.of_nodes([4, 1]), gang)
    assert not search.matches(config, Capacity.of_nodes([4, 2]), replace(gang, ranks=7))
    other = config.model_copy(update={"name": "other"})
    assert not search.matches(other, Capacity.of_nodes([4, 2]), gang)


def test_many_numbers_of_ranks_without_a_layout_are_passed_over_in_pieces() -> None:
    words = ["experiment=demo", "parallel.dp=1024", "train.global_batch=1024", "train.micro_batch=1"]
    config, gang = asked(*words, slots=[8] * 128)
    search = SmallerLayoutSearch(config, Capacity.of_nodes([8] * 127), gang)
    pieces = 0
    while not search.done:
        search.step()
        pieces += 1
    assert (
        search.choice is not None
        and search.choice.gang.ranks < 1016 - elastic._RANK_COUNTS_PER_PIECE
        and pieces > 1
    )


def test_what_the_trainer_refuses_is_not_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fastest of all that it takes, though it refuses the fastest, or the first numbers of ranks altogether."""
    words = [
        "model=olmoe_1b_7b",
        "hardware=h100",
        "parallel.dp=16",
        "parallel.ep=8",
        "train.global_batch=5040",
    ]
    config, gang = asked(*words, "train.micro_batch=1", "data.sequence=4096", slots=[8, 8])
    real, allowed = elastic.plan, 16

    def picky(config: RunConfig, capacity: Capacity, strict: bool) -> RunPlan:
        made = real(config, capacity, strict=strict)
        if made.ranks > allowed:
            raise UserError("too many")
        return made

    monkeypatch.setattr(elastic, "plan", picky)
    assert on(config, gang, 8, 7).gang.ranks > 13
    allowed = 10
    choice = on(config, gang, 8, 7)
    assert choice.gang.ranks <= 10, "further numbers are tried"
    check(config, choice, (8, 7))


def test_the_choice_is_read_back_as_it_was_written(tmp_path: object) -> None:
    config, gang = asked("experiment=demo", "parallel.dp=4", "train.global_batch=32", slots=[2, 2])
    choice = on(config, gang, 2)
    path = tmp_path / "config.yaml"  # type: ignore[operator]
    path.write_text(dump(choice.config))
    assert load(path) == choice.config


# ---- the way back ----


def running(nodes: list[Node], *runs: tuple[str, int, str]) -> tuple[list[RunningRun], list[Node]]:
    """Runs by id, ranks and node, and the nodes beside them."""
    found = []
    for run_id, ranks, at in runs:
        placed = place(GangShape(ranks, ranks), [n for n in nodes if n.node_id == at])
        assert not isinstance(placed, Unschedulable)
        found.append(RunningRun(run_id, 0, "", GangShape(ranks, ranks), placed))
    return found, with_slots_taken(nodes, [("CPU", r.shares) for r in found])


def test_a_run_grows_back_where_all_of_it_fits_beside_the_others() -> None:
    nodes = make_nodes(2, 8)
    run = WaitingRun("a", 0, 5.0, 0.0, GangShape(16, 8))
    held, free = running(nodes, ("a", 8, "n00000"))
    assert regrow(run, held, [], free, QueuePolicy())
    other, busy = running(nodes, ("a", 8, "n00000"), ("b", 4, "n00001"))
    assert not regrow(run, other, [], busy, QueuePolicy())
    assert not regrow(run, held, [], [free[0], replace(free[1], barred="cordoned: a fan")], QueuePolicy())
    assert not regrow(run, held, [], free, QueuePolicy(quotas={"*": 8}))
    assert regrow(
        replace(run, recovering=True), held, [], [free[0], replace(free[1], spare=True)], QueuePolicy()
    )


def test_a_run_stays_small_where_another_one_would_take_what_it_frees() -> None:
    nodes = make_nodes(2, 8)
    run = WaitingRun("a", 0, 5.0, 0.0, GangShape(16, 8))
    held, free = running(nodes, ("a", 8, "n00000"))
    ahead = WaitingRun("b", 1, 9.0, 100.0, GangShape(16, 8))
    assert not regrow(run, held, [ahead], free, QueuePolicy())
    assert regrow(run, held, [replace(ahead, priority=-1)], free, QueuePolicy())
    half, able = replace(ahead, gang=GangShape(8, 8)), replace(run, smaller=(GangShape(8, 8),))
    assert not regrow(able, held, [half], free, QueuePolicy()), "in a smaller shape it wouldn't have grown"


# ---- on the simulated cluster ----


def test_two_of_four_nodes_gone_and_the_run_goes_on_smaller_and_grows_back_at_a_save() -> None:
    nodes = make_nodes(4, 8)
    sim = ClusterSim(nodes, QueuePolicy(), shrink_after=60.0)
    sim.submit("a", GangShape(32, 8), 1000, smaller=(GangShape(16, 8),), every=50)
    sim.kill_node("n00001", at=100.0)
    sim.kill_node("n00003", at=100.0)
    sim.revive_node(replace(nodes[1], node_id="new1"), at=300.0)
    sim.revive_node(replace(nodes[3], node_id="new3"), at=410.0)
    sim.go(until=159.0)
    run = sim.runs["a"]
    assert run.state is State.QUEUED, "it waits for the nodes first"
    sim.go()
    assert [ranks for ranks, _ in run.placements()] == [32, 16, 32]
    assert run.placements()[1][1] == {"n00000", "n00002"}
    assert run.placements()[2][1] == {"n00000", "n00002", "new1", "new3"}
    (stop,) = run.of_kind("stop_began")
    assert stop.payload.reason is Reason.REGROWN  # type: ignore[union-attr]
    resumed = [e.payload.step for e in run.of_kind("resumed")]  # type: ignore[union-attr]
    assert resumed[1] == 50 and resumed[2] % 50 in (0, 3), "from the save, with the steps until it stopped"
    assert run.state is State.SUCCEEDED and len(run.view.incidents) == 1
    outcome = run.view.incidents[0].outcome
    assert outcome is not None and outcome.downtime_seconds == 65.0
