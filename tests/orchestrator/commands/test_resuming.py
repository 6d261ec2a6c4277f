"""What a run continues from, what a resume may change, and what is shown before it starts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.compose import amend, compose, dump, load
from configs.errors import UserError
from configs.paths import HomePaths
from configs.schema import RunConfig
from orchestrator.cli import main
from orchestrator.commands import changes, console, resume_source
from orchestrator.commands.resumption import Resumption
from orchestrator.record.events import Amended
from orchestrator.record.states import State
from tests.orchestrator.commands.saved import commit, stopped
from tests.orchestrator.logs import Writer
from trainer.sizing.search.planner import Capacity, plan

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

RUN = "first-20260101-000000-abcd"
ASKED = compose(["experiment=smoke", "train.steps=100", "train.global_batch=8", "optim.schedule=cosine"])
PLANNED = plan(ASKED, Capacity.of_nodes([2]))
CONFIG = PLANNED.config


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> HomePaths:
    """A home with one stopped run of two ranks, saved at steps 20 and 40."""
    monkeypatch.setenv("MEGARAY_HOME", str(tmp_path / "a home"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.chdir(tmp_path)
    home = HomePaths(tmp_path / "a home")
    run = home.run(RUN)
    stopped(run, CONFIG, ranks=2)
    run.config.write_text(dump(CONFIG))
    run.plan.write_text(json.dumps(PLANNED.to_json()))
    for step in (20, 40):
        commit(str(run.checkpoints), RUN, step, CONFIG)
    return home


def amended(
    *overrides: str, chosen: tuple[str, ...] = ("parallel.dp",), nodes: int | None = None
) -> RunConfig:
    changes.refuse_fixed(CONFIG, overrides, RUN)
    return changes.amended(CONFIG, overrides, chosen, nodes)


# ---- what a resume may change ----


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("model.experts=8", "its model"), ("model=olmoe_1b_7b", "its model"), ("data.path=/x", "its data"),
        ("data.sequence=128", "its data"), ("train.seed=7", "its seed"), ("optim.kind=muon", "its optimizer"),
        ("optim.moments=bf16", "its optimizer's moments"), ("name=other", "its name"),
        ("workload=collectives", "what it does"), ("resume=/x", "what it began from"),
        ("experiment=demo", "its model and data"),
    ],
)  # fmt: skip
def test_what_a_run_keeps_is_refused_by_name_with_what_to_type(override: str, words: str) -> None:
    with pytest.raises(UserError) as refused:
        amended(override)
    told = str(refused.value)
    assert told.startswith(f"{override}: run {RUN} keeps {words}") and f"submit {override}" in told
    assert "\n" not in told


def test_a_preset_changes_nothing_that_a_run_keeps() -> None:
    other = changes.amended(CONFIG, ["optim.lr=0.1"], (), None)
    assert changes.amended(other, ["optim=adamw", "train.steps=300"], (), None).optim.lr == CONFIG.optim.lr
    with pytest.raises(UserError, match=r"model\.layers would be 4 and was 2: a run keeps its model"):
        changes.amended(CONFIG, ["model=demo"], (), None)


@pytest.mark.parametrize(
    "override",
    ["train.seed=1234", "model.name=demo", f"data.sequence={CONFIG.data.sequence}", "train.steps=300", "optim.lr=0.01",
     "checkpoint.keep=5", "resilience.max_restarts=9", "tracking.project=other", "train.micro_batch=4"],
)  # fmt: skip
def test_the_value_it_has_and_what_is_free_may_be_typed(override: str) -> None:
    made = amended(override)
    name, _, value = override.partition("=")
    assert changes.as_typed(changes.flatten(made)[name]) == value
    assert made.parallel == CONFIG.parallel and made.cluster == CONFIG.cluster, (
        "a gang of the same shape runs it"
    )
    assert not changes.layout_changed(CONFIG, made)


def test_what_followed_from_the_layout_is_chosen_anew_and_what_was_typed_stays() -> None:
    made = amended("parallel.ep=4")
    assert (made.parallel.dp, made.cluster.nodes, made.cluster.slots_per_node) == (None, None, None)
    assert made.train.global_batch == 8, "another batch would be another run"
    assert amended("parallel.ep=2", chosen=()).parallel.dp == 2
    assert amended("parallel.ep=4", "parallel.dp=4").parallel.dp == 4
    fixed = amended("parallel.ep=4", nodes=3)
    assert (fixed.cluster.nodes, fixed.cluster.slots_per_node) == (3, None)
    assert amended("cluster.nodes=2", nodes=3).cluster.nodes == 2
    assert amended("cluster.slots_per_node=2", nodes=3).cluster.nodes is None


def test_timeouts_follow_a_new_dial_and_one_that_was_set_stays() -> None:
    before = amend(ASKED, ["resilience.timeouts.start=400"])
    made = changes.amended(before, ["resilience.timeouts.patience=60"], (), None).resilience.timeouts
    assert (made.seconds("hang"), made.seconds("collective"), made.seconds("start")) == (60.0, 600.0, 400.0)


@pytest.mark.parametrize(
    "override", ["parallel.ep=3", "train.global_batch=7", "parallel.xp=2", "train.steps"]
)
def test_wrong_values_are_refused_as_at_a_submission(override: str) -> None:
    with pytest.raises(UserError):
        amended(override)


def test_the_consequences_count_samples_tokens_and_the_rate() -> None:
    assert changes.consequences(CONFIG, CONFIG, 40, 320) == []
    new = amended("train.global_batch=16", "train.steps=200")
    samples, tokens, rate = changes.consequences(CONFIG, new, 40, 320)
    assert (
        "320 are consumed up to step 40" in samples and "2560 follow in 160 steps, where 480 would" in samples
    )
    length = CONFIG.data.sequence
    assert tokens == f"tokens: {2880 * length} in all, where it would have been {800 * length}"
    assert rate.startswith("learning rate of step 41: ")
    assert changes.consequences(CONFIG, new, 40, None)[0] == samples, (
        "counted where the checkpoint doesn't say"
    )


# ---- from the run to the event ----


def test_a_resume_finds_the_newest_checkpoint_in_the_folder_and_not_in_the_log(home: HomePaths) -> None:
    """A save may be committed and its line never be written: the rank was killed in between."""
    resumption = Resumption.of(home.run(RUN), [])
    assert resumption.start == "step 40" and resumption.event() is None
    head = next(home.run(RUN).checkpoints.glob("step-0000000040/*.manifest.json"))
    head.write_bytes(head.read_bytes()[:-20])
    assert Resumption.of(home.run(RUN), []).start == "step 20", (
        "a damaged one is passed over, as the ranks do"
    )


def test_another_layout_makes_an_event_with_another_gang(home: HomePaths) -> None:
    words = ("parallel.ep=4", "train.global_batch=16", "checkpoint.every=5")
    made = Resumption.of(home.run(RUN), words).planned(Capacity.of_nodes([4]))
    event = made.event()
    assert event is not None and event.number == 1 and event.overrides == words
    assert (event.gang.ranks, event.gang.nodes, event.layout["ep"], event.layout["dp"]) == (4, None, 4, 4)
    told = {name: (before, now) for name, before, now in event.changes}
    assert told["parallel.ep"] == ("1", "4") and told["parallel.dp"] == ("2", "4")
    assert told["train.global_batch"] == ("8", "16") and told["checkpoint.every"][1] == "5"
    text = console.amended(made.to_json())
    assert "from step 40" in text and "samples: 320 are consumed" in text
    rows = [line.split() for line in text.splitlines()]
    assert ["parallel.ep", "1", "->", "4"] in rows and ["train.global_batch", "8", "->", "16"] in rows


def test_the_gang_stays_where_the_layout_does(home: HomePaths) -> None:
    made = Resumption.of(home.run(RUN), ["train.steps=200", "resilience.max_restarts=7"]).planned(
        Capacity.of_nodes([9])
    )
    event = made.event()
    assert event is not None and (event.gang, event.layout) == (
        made.view.submitted.gang,
        made.view.submitted.layout,
    )  # type: ignore[union-attr]
    assert (event.steps, event.max_restarts) == (200, 7)
    assert [name for name, _, _ in event.changes] == ["train.steps", "resilience.max_restarts"]


def test_a_second_resume_goes_on_from_the_first_ones_settings(home: HomePaths) -> None:
    run = home.run(RUN)
    first = Resumption.of(run, ["parallel.dp=1", "train.steps=200"]).planned(Capacity.of_nodes([4]))
    log, event = Writer(run), first.event()
    assert event is not None
    log.append(event, 5.0)
    log.close()
    run.config_of(1).write_text(dump(first.config))
    assert run.newest_config == run.config_of(1)
    second = Resumption.of(run, ["parallel.ep=1", "train.steps=300"]).planned(Capacity.of_nodes([4]))
    assert second.old.train.steps == 200 and second.config.parallel.dp == 1, (
        "dp was typed, so nothing chooses it anew"
    )
    again = second.event()
    assert again is not None and again.number == 2
    assert [name for name, _, _ in again.changes] == ["train.steps"]


def test_too_few_slots_and_no_step_left_are_refused(home: HomePaths) -> None:
    with pytest.raises(UserError, match="needs 4 slots"):
        Resumption.of(home.run(RUN), ["parallel.ep=4"]).planned(Capacity.of_nodes([2]))
    with pytest.raises(UserError, match=r"train.steps=40: step 40 is trained and saved; set it above 40"):
        Resumption.of(home.run(RUN), ["train.steps=40"]).planned(Capacity.of_nodes([2]))


def test_another_folder_for_checkpoints_still_begins_from_the_old_one(
    home: HomePaths, tmp_path: Path
) -> None:
    run, words = home.run(RUN), [f"checkpoint.path={tmp_path / 'new'}"]
    made = Resumption.of(run, words).planned(Capacity.of_nodes([2]))
    assert made.config.resume == str(run.checkpoints) and made.config.checkpoint.path == str(tmp_path / "new")
    commit(str(tmp_path / "theirs"), "other-20260101-000000-abcd", 5, CONFIG)
    with pytest.raises(UserError, match="belongs to run other-20260101-000000-abcd"):
        Resumption.of(run, [f"checkpoint.path={tmp_path / 'theirs'}"]).planned(Capacity.of_nodes([2]))


@pytest.mark.parametrize(
    "words", [["resume", RUN, "train.seed=7"], ["resume", RUN, "--yes", "model.experts=8"]]
)
def test_a_refused_resume_is_one_line_before_any_cluster(
    home: HomePaths, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert main(words) == 2
    told = capsys.readouterr().err.strip()
    assert told.startswith("megaray: ") and told.count("\n") == 0 and "keeps its" in told


def test_a_folder_that_cannot_be_written_is_told_before_any_cluster(
    home: HomePaths, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").write_text("no folder")
    assert main(["resume", RUN, f"checkpoint.path={tmp_path / 'file' / 'ck'}"]) == 2
    told = capsys.readouterr().err
    assert "checkpoint.path=" in told and told.count("\n") == 1


# ---- a new run that begins from another ----


def begun(home: HomePaths, *words: str) -> tuple[RunConfig, resume_source.ResumeSource]:
    return resume_source.resolve(amend(ASKED, words), home)


def test_a_run_a_folder_and_a_step_are_found(home: HomePaths, tmp_path: Path) -> None:
    folder = home.run(RUN).checkpoints
    for word in (RUN, RUN[:9], str(home.run(RUN).root), str(folder), f"{folder}/"):
        config, found = begun(home, f"resume={word}")
        assert (config.resume, found.step, found.run, found.samples) == (str(folder), 40, RUN, 320), word
    for word in (f"{folder}/step-0000000020", f"{folder}/step-0000000020/", f"{RUN}/step-0000000020"):
        config, found = begun(home, f"resume={word}")
        assert (config.resume, found.step) == (f"{folder}/step-0000000020", 20)
    commit(str(tmp_path / "elsewhere"), "far-20260101-000000-abcd", 7, CONFIG)
    config, found = begun(home, "resume=./elsewhere")
    assert (config.resume, found.step) == (str(tmp_path / "elsewhere"), 7)
    commit((memory := "memory://far/away"), "far-20260101-000000-abcd", 9, CONFIG)
    assert begun(home, f"resume={memory}")[1].step == 9


def test_a_runs_own_checkpoint_path_is_heeded(home: HomePaths, tmp_path: Path) -> None:
    run = home.run("moved-20260101-000000-abcd")
    moved = CONFIG.model_copy(
        update={"checkpoint": CONFIG.checkpoint.model_copy(update={"path": str(tmp_path / "ck")})}
    )
    stopped(run, moved, 2)
    run.config.write_text(dump(moved))
    commit(str(tmp_path / "ck"), run.run_id, 60, moved)
    assert begun(home, "resume=moved")[0].resume == str(tmp_path / "ck")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["resume=nothing"], "does not exist"),
        (["resume=/nowhere/at/all"], "there is no folder /nowhere/at/all"),
        ([f"resume={RUN}/step-0000000030"], "no step 30 is committed"),
        ([f"resume={RUN}", "train.seed=7"], "train.seed was 1234 and is 7"),
        ([f"resume={RUN}", "model.experts=8"], "model.experts was 4 and is 8"),
        ([f"resume={RUN}", "optim.moments=bf16"], "optim.moments was"),
        ([f"resume={RUN}", "data.sequence=32"], "data.sequence: 64 then, 32 now"),
        ([f"resume={RUN}", "data.mixture={a: 1, b: 2}"], "data.mixture: 1 corpora then, 2 now"),
        ([f"resume={RUN}", "train.steps=40"], "set train.steps above 40"),
    ],
)
def test_what_cannot_be_gone_on_from_is_one_line(home: HomePaths, words: list[str], told: str) -> None:
    with pytest.raises(UserError) as refused:
        begun(home, *words)
    assert told in str(refused.value) and "resume=" in str(refused.value) and "\n" not in str(refused.value)


def test_a_refusal_names_the_configuration_that_would_do(home: HomePaths) -> None:
    with pytest.raises(UserError, match="--config") as refused:
        begun(home, f"resume={RUN}", "train.seed=7")
    path = Path(str(refused.value).rpartition("--config ")[2])
    config = compose([f"resume={RUN}", "train.steps=300"], path)
    assert resume_source.resolve(config, home)[1].step == 40


def test_the_plan_shows_from_where_and_what_differs(
    home: HomePaths, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "experiment=smoke",
        "train.steps=100",
        "train.global_batch=16",
        "optim.schedule=cosine",
        f"resume={RUN}",
    ]
    for command in (["plan"], ["submit", "--dry-run"]):
        assert main([*command, *words]) == 0
        text = capsys.readouterr().out
        assert (
            f"step 40 of {RUN} (320 samples, {320 * CONFIG.data.sequence / 1000:.3g} k tokens, loss 2.5000)"
            in text
        )
        rows = [line.split() for line in text.splitlines()]
        assert ["changes", "from", "that", "run"] in rows and ["train.global_batch", "8", "->", "16"] in rows
        assert not [row for row in rows if row[:1] in (["train.engine"], ["train.seed"]) and "->" in row]
    assert main(["plan", *words, "--json"]) == 0
    tree = json.loads(capsys.readouterr().out)
    assert tree["resume"]["step"] == 40 and ["train.global_batch", "8", "16"] in tree["resume"]["differences"]


def test_without_the_other_runs_settings_the_layouts_are_compared(home: HomePaths, tmp_path: Path) -> None:
    commit(str(tmp_path / "far"), "far-20260101-000000-abcd", 9, CONFIG)
    config, found = begun(home, f"resume={tmp_path / 'far'}", "parallel.dp=4", "parallel.ep=2")
    assert resume_source.differences(config, found, home) == [
        ("parallel.dp", "2", "4"),
        ("parallel.ep", "1", "2"),
    ]


def test_a_folder_that_another_run_owns_is_refused_before_the_queue(
    home: HomePaths, capsys: pytest.CaptureFixture[str]
) -> None:
    path = home.run(RUN).checkpoints
    assert main(["submit", "experiment=smoke", f"checkpoint.path={path}", "--yes"]) == 2
    told = capsys.readouterr().err
    assert f"belongs to run {RUN}" in told and f"resume={path}" in told and told.count("\n") == 1
    assert home.run_ids() == [RUN]


def test_the_succeeded_runs_hint_can_be_typed(home: HomePaths, capsys: pytest.CaptureFixture[str]) -> None:
    run = home.run("done-20260101-000000-abcd")
    stopped(run, CONFIG, 2, State.SUCCEEDED)
    run.config.write_text(dump(CONFIG))
    commit(str(run.checkpoints), run.run_id, 100, CONFIG)
    assert main(["resume", run.run_id]) == 2
    told = capsys.readouterr().err
    words = told.partition("orchestrator submit ")[2].partition("`")[0]
    assert f"resume={run.run_id}" in words and "train.steps=" in words
    _, _, path = words.partition("--config ")
    config = compose(
        [f"resume={run.run_id}", "train.steps=200"], Path(path.partition(" resume=")[0].strip("'\""))
    )
    assert resume_source.resolve(config, home)[1].step == 100


def test_an_event_holds_what_a_log_line_can(home: HomePaths) -> None:
    event = Resumption.of(home.run(RUN), ["train.steps=200"]).planned(None).event()
    assert isinstance(event, Amended)
    assert load(home.run(RUN).config).train.steps == 100, "the submission's configuration stays"
