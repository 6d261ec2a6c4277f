"""What the bench counts and prints, and how it forces routes."""

from __future__ import annotations

import contextlib
import os
import re
import signal
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
import torch.nn.functional as F

from configs.compose import compose
from configs.errors import EndedBySignal, UserError
from configs.model import ModelConfig
from configs.rank import RankContext
from tests.collectives.ranks import together
from tests.trainer.model.small_models import micro, shape, tokens
from trainer.bench import baselines, command, hugging_face, kernels, routing, variants
from trainer.bench.cases import BatchTokens, config_of, flops_of, preset_of
from trainer.bench.master_weights import MasterWeightTrainer
from trainer.bench.measure import Times, time_steps
from trainer.bench.options import Options, options_of
from trainer.bench.plain import PlainDecoder
from trainer.cli import main
from trainer.model.decoder import inputs
from trainer.model.initial import build
from trainer.parallel.mesh import join

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]

CPU = torch.device("cpu")


def options(*overrides: str, model: str = "demo") -> Options:
    return Options(tuple(overrides), model, 2, "real", 2, (), None)


def test_idle_and_exposed_times_of_a_timeline() -> None:
    """Microseconds: a matmul, communication that begins under it and outlasts it, a gap, a copy."""
    found = kernels.of_spans(
        [("nvjet_x", 0, 1000), ("ncclDevKernel_SendRecv", 500, 1500), ("Memcpy DtoD", 2000, 2500), ("nvjet_x", 2500, 3000)]
    )  # fmt: skip
    assert (found.span, found.idle, found.exposed) == (3.0, 0.5, 0.5)
    assert found.parts() == {"matmuls": 1.5, "communication": 1.0, "copies": 0.5}
    assert found.kernels[0].count == 2
    assert "idle for 0.5 ms, exposed communication 0.5 ms" in kernels.lines(found)[0]


def test_a_bound_on_exposed_communication_is_that_of_the_timed_step() -> None:
    """Of a recorded step of 3 ms something computed for 2: a step that took 2.5 without a recorder was exposed or idle for
    half a millisecond at most, however long the recorded one was."""
    profiled = kernels.of_spans(
        [("nvjet_x", 0, 1000), ("ncclDevKernel_SendRecv", 500, 1500), ("Memcpy DtoD", 2000, 2500), ("_norm", 2400, 3000)]
    )  # fmt: skip
    assert profiled.computing == 2.0 and profiled.uncovered(2.5) == 0.5 and profiled.uncovered(1.9) == 0.0
    config = config_of(options("data.sequence=64", "train.micro_batch=2"), 1, on_gpu=False)
    (line,) = variants.report_lines("a", config, 1, variants.Outcome(Times([2.5]), profiled))
    assert "exposed communication 0.5 ms (16.7 %), idle 0.5 ms" in line
    assert "at most 0.5 ms (20.0 %) of communication exposed or idle" in line


def test_what_a_collective_takes_longer_than_where_it_is_shortest_is_waiting() -> None:
    """Microseconds: one that moves for 400 behind 600 of waiting, of which a matmul covers 300; one that moves beside the
    end of another's waiting; and one that no rank waits for."""
    spans = [
        ("nvjet_x", 0, 300), ("ncclDevKernel_AllGather", 0, 1000), ("ncclDevKernel_ReduceScatter", 700, 900),
        ("ncclDevKernel_AllReduce", 1200, 1300),
    ]  # fmt: skip
    other = [400.0, 200.0, 150.0]
    mine, messages = kernels.calls(spans)
    assert [took for *_, took in mine] == [1000, 900, 1300] and not messages

    def waiting(*by_rank: list[float]) -> float | None:
        return kernels.waiting(spans, [(one, []) for one in by_rank])

    assert waiting([1000.0, 200.0, 100.0], other) == pytest.approx(0.3)
    assert waiting([1000.0, 200.0, 100.0], [1000.0, 50.0, 100.0]) == 0.0
    assert waiting([1000.0, 200.0, 100.0], [400.0, 50.0, 100.0]) == pytest.approx(0.3)
    assert waiting([1000.0, 200.0, 100.0], other[:2]) is None
    assert kernels.waiting([], [([], []), ([], [])]) == 0.0


def test_messages_wait_where_all_ranks_send_as_many() -> None:
    """Ranks that lend experts send what others don't: nobody knows which messages belong together, but collectives do."""
    spans = [("ncclDevKernel_AllGather", 0, 1000), ("ncclDevKernel_SendRecv", 2000, 2600)]
    mine = [1000.0], [600.0]
    assert kernels.waiting(spans, [mine, ([400.0], [100.0])]) == pytest.approx(1.1)
    assert kernels.waiting(spans, [mine, ([400.0], [])]) == pytest.approx(0.6)
    assert kernels.waiting(spans, [mine, ([], [100.0])]) is None


def _of_stage(rank: RankContext) -> list[kernels.RankTimes]:
    config = compose(
        ["model=demo", "hardware=cpu", "parallel.pp=2", "parallel.dp=2", "train.global_batch=64"]
    )
    mesh = join(config, rank, CPU)
    return command._gather_stage(mesh, ([float(rank.rank)], []))


def test_ranks_of_one_stage_wait_for_each_other(tmp_path: Path) -> None:
    stages = together(4, tmp_path, _of_stage)
    assert [[took[0] for took, _ in one] for one in stages] == [[0, 1], [0, 1], [2, 3], [2, 3]]


def test_waiting_is_printed_where_it_is_known() -> None:
    spans = [("nvjet_x", 0, 1000), ("ncclDevKernel_SendRecv", 500, 1500)]
    found = kernels.of_spans(spans)
    assert "waiting" not in kernels.lines(found)[0] + kernels.of_waiting(replace(found, waiting=0.0))
    late = replace(found, waiting=0.4)
    assert kernels.lines(late)[0].endswith("exposed communication 0.5 ms, 0.4 of them waiting for stragglers")
    config = config_of(options("data.sequence=64", "train.micro_batch=2"), 1, on_gpu=False)
    (line,) = variants.report_lines("a", config, 1, variants.Outcome(Times([2.5]), late))
    assert "0.5 ms (33.3 %), 0.4 of them waiting for stragglers, idle 0.0 ms" in line


def test_nothing_on_the_device_is_an_empty_profile() -> None:
    assert kernels.of_spans([]).span == 0.0


@pytest.mark.parametrize(("name", "part"), [
    ("void cutlass::device_kernel<enable_3x_kernel_for_sm90<cutlass::gemm::GroupProblemShape>>", "experts' matmuls"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", "attention"), ("_adamw", "optimizer and norm"),
    ("_combine", "rows to experts and back"), ("_entropy", "loss"), ("_norm_rotate_back", "norms, rotation, activation"),
    ("_route_back", "router"), ("_count_pairs", "rows to experts and back"), ("_cca_pairs", "norms, rotation, activation"),
    ("vectorized_elementwise_kernel<4, CUDAFunctor_add>", "elementwise"),
])  # fmt: skip
def test_kernels_have_their_part(name: str, part: str) -> None:
    assert kernels.part_of(name) == part


@pytest.mark.parametrize("kind", ("balanced", "zipf"))
def test_forced_routes(kind: str) -> None:
    """No expert twice for a token; even to within one, or falling by rank."""
    table = routing.routing_table(kind, (2, 60, 3), 8, seed=1)
    assert table.shape == (2, 60, 3)
    assert all(len(set(row)) == 3 for row in table.flatten(0, 1).tolist())
    loads = table.flatten().bincount(minlength=8).sort(descending=True).values
    if kind == "balanced":
        assert loads[0] - loads[-1] <= 1
    else:
        assert loads[0] > 1.5 * loads[3] > 1.5 * loads[-1]


def test_another_routing_is_refused() -> None:
    with pytest.raises(ValueError, match="routing 'ziff' can't be forced; balanced and zipf can"):
        routing.routing_table("ziff", (2, 60, 3), 8, seed=1)


def test_forcing_changes_where_tokens_go_and_what_is_counted() -> None:
    model = shape(router={"balance": "aux", "aux_coefficient": 0.02})
    built = build(model, 1)
    routing.force_routing(built, "balanced")
    batch = micro(tokens())
    built(inputs(batch), batch).backward()
    for counts in batch.tally.counts.values():
        assert counts.max() - counts.min() <= 1
    assert len(batch.tally.losses) == model.layers
    assert all(router.linear.weight.grad.abs().sum() > 0 for router in built.routers().values())


@pytest.mark.parametrize("kind", ["balanced", "zipf"])
def test_another_s_tokens_go_where_ours_go(kind: str) -> None:
    """Or a baseline beside `--routing zipf` would have other experts' loads, and another time."""
    pytest.importorskip("transformers")
    model = shape(qk_norm="head", router={"balance": "none"})
    ours = build(model, 1)
    routing.force_routing(ours, kind)
    batch = micro(tokens())
    ours(inputs(batch), batch)
    wanted = [batch.tally.counts[layer].tolist() for layer in range(model.layers)]
    given = batch.tokens_BS
    config = compose(["model=demo", "hardware=cpu"])
    config = config.model_copy(update={
        "model": model, "train": config.train.model_copy(update={"global_batch": len(given)}),
        "data": config.data.model_copy(update={"sequence": given.shape[1] - 1}),
    })  # fmt: skip
    plain, theirs = PlainDecoder(model), hugging_face.build(model, CPU)
    for made, routers, call in (
        (plain, plain.routers(), lambda: plain(given)),
        (theirs, hugging_face.routers(theirs, model), lambda: theirs(input_ids=given[:, :-1], labels=given[:, :-1]).loss),
    ):  # fmt: skip
        command._force_baseline_routing(routers, replace(options(), routing=kind), config)
        loads: list[list[int]] = []

        def counted(_router: Any, _given: Any, made: Any, loads: list[list[int]] = loads) -> None:
            loads.append(torch.bincount(made[-1].flatten(), minlength=model.experts).tolist())

        hooks = [router.register_forward_hook(counted) for router in routers]
        call().backward()
        for hook in hooks:
            hook.remove()
        assert loads == wanted, type(made).__name__
        assert all(router.weight.grad.abs().sum() > 0 for router in routers)
    compiled = torch.compile(plain, backend="eager", fullgraph=True)
    assert float(compiled(given)) == pytest.approx(float(plain(given)))


def test_the_step_that_is_measured() -> None:
    config = config_of(
        options("data.sequence=64", "train.micro_batch=2", "train.global_batch=4"), 1, on_gpu=False
    )
    assert (config.model.layers, config.train.precision, config.parallel.dp) == (2, "fp32", 1)
    assert config_of(options(), 1, on_gpu=False).data.sequence == 4096
    from trainer.sizing.model.flops import train_flops_per_token

    assert flops_of(config) == 4 * 64 * train_flops_per_token(config.model, 64)


def test_ranks_that_do_not_divide_are_refused() -> None:
    with pytest.raises(UserError, match=r"--gpus 3 doesn't divide by parallel.pp\*cp\*tp=2"):
        config_of(options("parallel.tp=2"), 3, on_gpu=False)


@pytest.mark.parametrize("several", [None, "ep=1"])
@pytest.mark.parametrize(("words", "why"), [
    (("parallel.dp=2",), r"--gpus 4, but parallel.pp\*dp\*cp\*tp=2 ranks are laid out; type --gpus 2"),
    (("parallel.tp=4", "model.vocab=254"), "parallel.tp=4 does not divide model"),
])  # fmt: skip
def test_a_layout_that_does_not_run_is_refused_before_ranks_start(
    words: tuple[str, ...], why: str, several: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("subprocess.Popen", lambda *_, **__: pytest.fail("ranks were started"))
    with pytest.raises(UserError, match=why):
        command.run(options(*words), 4, [], print, several)


_LAUNCHER = """
import os, pathlib, signal, subprocess, sys, time
def report(*_): raise RuntimeError("a report of the launcher's own")
signal.signal(signal.SIGTERM, report)
rank = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
pathlib.Path(sys.argv[1]).write_text(f"{rank.pid} {os.getsid(0) == os.getpid()}")
time.sleep(60)
"""


def test_a_bench_that_is_asked_to_end_leaves_no_rank_of_a_launcher_that_forgets_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nor a traceback, as torchrun prints one where it is asked to end."""
    monkeypatch.setattr(command, "_GRACE_SECONDS", 0.3)
    told = tmp_path / "pid"

    def end() -> None:
        while not (told.exists() and told.read_text()):
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=end).start()
    with pytest.raises(EndedBySignal) as ended:
        command.run_launcher([sys.executable, "-c", _LAUNCHER, str(told)])
    assert ended.value.code == 143
    rank, own_session = told.read_text().split()
    with contextlib.suppress(psutil.NoSuchProcess):
        psutil.Process(int(rank)).wait(5)
    assert own_session == "True", (
        "what is sent to this process's group, as by `timeout`, reaches the launcher"
    )
    assert not capfd.readouterr().err
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL


@pytest.mark.parametrize(("device", "preset"), [
    ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA H100 PCIe", "h100_pcie"), ("NVIDIA H200", "h200"), ("NVIDIA H800", "h800"),
    ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA B200", "b200"), ("NVIDIA GB200", "gb200"), ("NVIDIA GB300", "gb300"),
    ("AMD Instinct MI300X", "mi300x"), ("AMD Instinct MI300X VF", "mi300x"), ("AMD Instinct MI250X/MI250", "mi250x"),
    ("AMD Instinct MI325X", "mi325x"), ("AMD Instinct MI355X", "mi355x"),
])  # fmt: skip
def test_a_device_has_its_own_preset(device: str, preset: str) -> None:
    assert preset_of(device) == preset


@pytest.mark.parametrize("device", [
    "NVIDIA L40S", "NVIDIA H20", "NVIDIA GH200 480GB", "NVIDIA H100 NVL", "NVIDIA H200 NVL", "NVIDIA A100-SXM4-40GB",
    "NVIDIA A100 80GB PCIe", "AMD Instinct MI300A", "AMD Instinct MI210", "AMD Radeon Graphics", "NVIDIA H100 96GB HBM3",
])  # fmt: skip
def test_a_device_without_a_preset_is_refused(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And named where its figures are to be another's."""
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: device)
    with pytest.raises(UserError, match=f"the device '{device}' has no hardware preset; type hardware=NAME"):
        config_of(options(), 1, on_gpu=True)
    assert config_of(options("hardware=h100"), 1, on_gpu=True).hardware.name == "h100"


def test_batches_differ_and_are_text() -> None:
    config = compose(["model=demo", "data.sequence=32"])
    drawn = BatchTokens(config, CPU, real=True, seed=0)
    first, second = drawn.draw(2), drawn.draw(2)
    assert first.shape == (2, 33) and not first.equal(second)
    assert bytes(first[0].tolist()).decode("utf-8", "replace").isprintable() or b"\n" in bytes(
        first[0].tolist()
    )
    assert not BatchTokens(config, CPU, real=False, seed=0).draw(2).equal(first)


def test_the_plain_decoder_is_ours_without_the_routers_losses() -> None:
    """So that what is compared computes the same."""
    model = shape(qk_norm="projection", router={"balance": "none", "renormalize": False})
    ours, plain = build(model, 1), PlainDecoder(model)
    named = dict(ours.named_parameters())
    with torch.no_grad():
        plain.embedding.weight.copy_(named["embedding.weight"])
        plain.head.weight.copy_(named["head.weight"])
        plain.norm.weight.copy_(named["final_norm.weight"])
        for number, block in enumerate(plain.blocks):
            for theirs, name in (
                (block.first, "attention_norm"), (block.second, "feed_norm"), (block.q, "attention.query"),
                (block.k, "attention.key"), (block.v, "attention.value"), (block.out, "attention.output"),
                (block.norms[0], "attention.query_norm"), (block.norms[1], "attention.key_norm"),
                (block.router, "feed.router.linear"),
            ):  # fmt: skip
                theirs.weight.copy_(named[f"blocks.{number}.{name}.weight"])
            block.up.copy_(named[f"blocks.{number}.feed.experts.gate_up"].flatten(1, 2))
            block.down.copy_(named[f"blocks.{number}.feed.experts.down"])
    given = tokens()
    batch = micro(given)
    assert float(plain(given)) == pytest.approx(float(ours(inputs(batch), batch)), rel=1e-5)


def _checked(baseline: str, model: ModelConfig, world: int = 1) -> None:
    config = compose(["model=demo", "hardware=cpu"]).model_copy(update={"model": model})
    baselines.check(baseline, config, world)


_ROUTED = shape(qk_norm="head")
_OTHERS: dict[str, dict[str, Any]] = {
    "model.window=3": {"window": 3}, "model.yarn.factor=4": {"yarn": {"factor": 4.0}},
    "model.mtp_layers=2": {"mtp_layers": 2},
    "model.attention=mla": {"attention": "mla", "kv_lora_rank": 10, "rope_head_dim": 4, "qk_norm": "none"},
    "model.attention=cca": {"attention": "cca", "qk_norm": "none"}, "model.rope_fraction=0.5": {"rope_fraction": 0.5},
    "model.residual_scaling=true": {"residual_scaling": True}, "model.parallel_block=true": {"parallel_block": True},
    "model.dense_layers=1": {"dense_layers": 1, "dense_width": 48}, "model.gated=false": {"gated": False},
    "model.moe_every=2": {"moe_every": 2, "dense_width": 48}, "model.shared_width=16": {"shared_width": 16},
    "model.router.score=sigmoid": {"router": {"score": "sigmoid"}}, "model.router.kind=mlp": {"router": {"kind": "mlp"}},
    "model.router.scale=2.5": {"router": {"scale": 2.5}},
    "model.router.groups=4": {"router": {"groups": 4, "top_groups": 2}},
    "model.router.capacity_factor=1.0": {"router": {"capacity_factor": 1.0}},
}  # fmt: skip


@pytest.mark.parametrize("baseline", ["plain", "hf"])
@pytest.mark.parametrize("setting", _OTHERS)
def test_a_baseline_that_would_be_another_model_is_refused(setting: str, baseline: str) -> None:
    """By the name of what it lacks."""
    _checked(baseline, _ROUTED)
    changed = shape(**{"qk_norm": "head"} | _OTHERS[setting])
    with pytest.raises(
        UserError, match=rf"--baselines {baseline} would measure another model, .*{re.escape(setting)}"
    ):
        _checked(baseline, changed)


@pytest.mark.parametrize(("baseline", "setting", "changes"), [
    ("plain", "model.tie_embeddings=true", {"tie_embeddings": True}),
    ("hf", "model.head_dim=16", {"qk_norm": "projection", "head_dim": 16}),
    ("hf", "model.router.renormalize=false", {"router": {"renormalize": False}}), ("hf", "model.top_k=1", {"top_k": 1}),
])  # fmt: skip
def test_what_one_baseline_alone_lacks_is_refused(
    baseline: str, setting: str, changes: dict[str, Any]
) -> None:
    with pytest.raises(UserError, match=setting):
        _checked(baseline, shape(**changes))
    _checked("hf" if baseline == "plain" else "plain", shape(**changes))


@pytest.mark.parametrize("changes", [
    {"qk_norm": "projection", "router": {"renormalize": False}}, {"qk_norm": "projection", "tie_embeddings": True},
    {"qk_norm": "head", "head_dim": 16, "top_k": 1}, {"qk_norm": "none", "head_dim": 16},
], ids=str)  # fmt: skip
def test_hugging_face_has_as_many_parameters_and_renormalizes_likewise(changes: dict[str, Any]) -> None:
    transformers = pytest.importorskip("transformers")
    model = shape(**changes)
    _checked("hf", model)
    theirs = hugging_face.build(model, CPU)
    assert isinstance(theirs, transformers.PreTrainedModel)
    ours = sum(parameter.numel() for parameter in build(model, 1).parameters())
    assert sum(parameter.numel() for parameter in theirs.parameters()) == ours
    assert getattr(theirs.config, "norm_topk_prob", True) == baselines.renormalizes(model)


def test_a_baseline_of_one_device_or_another_layout_is_refused_at_once() -> None:
    with pytest.raises(UserError, match="--baselines hf runs on one device; leave it out with --gpus 2"):
        _checked("hf", _ROUTED, world=2)
    split = config_of(options("parallel.tp=2"), 2, on_gpu=False)
    with pytest.raises(UserError, match="--baselines deepspeed: parallel.tp=2 with train.engine=deepspeed"):
        baselines.check("deepspeed", split, 2)


def test_one_weight_is_not_divided_by_itself() -> None:
    """By the plain decoder neither, whose router would never learn."""
    block = PlainDecoder(shape(top_k=1)).blocks[0]
    x = torch.randn(5, 32)
    assert not torch.autograd.grad(block.experts(x).sum(), block.router.weight)[0].eq(0).all()


def test_masters_of_bf16_weights_move_as_fp32_ones() -> None:
    torch.manual_seed(0)
    optim = compose(["model=demo"]).optim
    wide = torch.nn.Linear(8, 4)
    narrow = torch.nn.Linear(8, 4).to(torch.bfloat16)
    x = torch.randn(5, 8)
    with torch.no_grad():
        for parameter in wide.parameters():
            parameter.copy_(parameter.bfloat16())
    narrow.load_state_dict(wide.state_dict())
    one, other = MasterWeightTrainer(wide, optim), MasterWeightTrainer(narrow, optim)
    for _ in range(3):
        time_steps(lambda mark: one.step(lambda: F.mse_loss(wide(x), x[:, :4]), mark), CPU, 1, warm=0)
        time_steps(
            lambda mark: other.step(lambda: F.mse_loss(narrow(x.bfloat16()).float(), x[:, :4]), mark), CPU, 1, warm=0
        )  # fmt: skip
    for left, right in zip(wide.parameters(), narrow.parameters(), strict=True):
        assert (left - right.float()).abs().max() < 4e-3 * left.abs().max()
        assert right.grad is None


def test_times_are_summed_by_part() -> None:
    def step(mark: object) -> None:
        for name in ("forward", "forward", "backward"):
            with mark(name):  # type: ignore[operator]
                pass

    times = time_steps(step, CPU, 3, warm=1)
    assert len(times.step) == 3 and set(times.parts) == {"forward", "backward"}
    assert times.median >= times.part("forward", "backward") > 0


def test_an_unknown_baseline_is_refused() -> None:
    for others, why in (
        ("plain,megatron", "megatron: no such baseline; use some of plain, hf, deepspeed, or none"),
        ("", "'': no such baseline; use some of"),
        ("plain,none", "none: none can't be combined with others"),
        ("hf,plain,hf", "hf,plain,hf names hf twice; type it once"),
    ):
        with pytest.raises(UserError, match=f"--baselines {why}"):
            options_of("demo", None, "real", 1, others, None, [])


def test_a_timeline_without_a_gpu_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(
        UserError, match=r"--timeline .* records a GPU's kernels, and torch sees no GPU; leave it out"
    ):
        command.run(replace(options(), timeline=tmp_path), 1, [], print)


def test_the_command_prints_ours_and_the_baseline(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    words = ["--model", "demo", "--layers", "1", "--steps", "2", "--baselines", "plain", "data.sequence=16"]
    import os
    import subprocess
    import sys

    done = subprocess.run(
        [sys.executable, "-m", "trainer", "bench", *words, "train.micro_batch=1"], capture_output=True, text=True,
        timeout=100, env=os.environ | {"MEGARAY_HOME": str(tmp_path), "OMP_NUM_THREADS": "1"}, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "kernels: torch's operators, since" in done.stdout
    assert "megaray    step" in done.stdout and "plain      / megaray: step" in done.stdout
    assert main(["bench", "--baselines", "nobody"]) == 2
    assert "--baselines nobody" in capsys.readouterr().err
