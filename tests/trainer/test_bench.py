"""What the bench counts and prints, and how it forces routes."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from configs.compose import compose
from configs.errors import UserError
from tests.trainer.model.small_models import micro, shape, tokens
from trainer.bench import kernels, routing, variants
from trainer.bench.cases import BatchTokens, Options, config_of, flops_of
from trainer.bench.command import options_of
from trainer.bench.masters import Masters
from trainer.bench.measure import timed
from trainer.bench.plain import PlainDecoder
from trainer.cli import main
from trainer.model.decoder import inputs
from trainer.model.initial import build

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
    assert "nothing ran for 0.5 ms, communication alone for 0.5 ms" in kernels.lines(found)[0]


def test_nothing_on_the_device_is_an_empty_profile() -> None:
    assert kernels.of_spans([]).span == 0.0


@pytest.mark.parametrize(("name", "part"), [
    ("void cutlass::device_kernel<enable_3x_kernel_for_sm90<cutlass::gemm::GroupProblemShape>>", "experts' matmuls"),
    ("cudnn_generated_fort_native_sdpa_sm90_flash_bprop", "attention"), ("_move", "optimizer and norm"),
    ("_collect", "rows to experts and back"), ("_entropy", "loss"), ("_turn_back", "norms, rotation, activation"),
    ("vectorized_elementwise_kernel<4, CUDAFunctor_add>", "elementwise"),
])  # fmt: skip
def test_kernels_have_their_part(name: str, part: str) -> None:
    assert kernels.part_of(name) == part


@pytest.mark.parametrize("kind", ("balanced", "zipf"))
def test_forced_routes(kind: str) -> None:
    """No expert twice for a token; even to within one, or falling by rank."""
    table = routing.table_of(kind, (2, 60, 3), 8, seed=1)
    assert table.shape == (2, 60, 3)
    assert all(len(set(row)) == 3 for row in table.flatten(0, 1).tolist())
    loads = table.flatten().bincount(minlength=8).sort(descending=True).values
    if kind == "balanced":
        assert loads[0] - loads[-1] <= 1
    else:
        assert loads[0] > 1.5 * loads[3] > 1.5 * loads[-1]


def test_forcing_changes_where_tokens_go_and_what_is_counted() -> None:
    model = shape(router={"balance": "aux", "aux_coefficient": 0.02})
    built = build(model, 1)
    routing.force(built, "balanced")
    batch = micro(tokens())
    built(inputs(batch), batch).backward()
    for counts in batch.tally.counts.values():
        assert counts.max() - counts.min() <= 1
    assert len(batch.tally.losses) == model.layers
    assert all(router.linear.weight.grad.abs().sum() > 0 for router in built.routers().values())


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


def test_the_plain_decoder_refuses_what_it_has_not() -> None:
    with pytest.raises(UserError, match="--baselines plain has grouped-query attention"):
        PlainDecoder(shape(shared_width=16))


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
    one, other = Masters(wide, optim), Masters(narrow, optim)
    for _ in range(3):
        timed(lambda mark: one.step(lambda: F.mse_loss(wide(x), x[:, :4]), mark), CPU, 1, warm=0)
        timed(
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

    times = timed(step, CPU, 3, warm=1)
    assert len(times.step) == 3 and set(times.parts) == {"forward", "backward"}
    assert times.median >= times.part("forward", "backward") > 0


def test_an_unknown_baseline_is_refused() -> None:
    with pytest.raises(
        UserError, match="--baselines megatron: no such baseline; use some of plain, hf, deepspeed"
    ):
        options_of("demo", None, "real", 1, "plain,megatron", None, [])


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


def test_variants_are_overrides_on_top() -> None:
    """A word without a dot is an axis, but for the bench's own."""
    found = variants.parse(
        "ep=2 | routing=zipf tp=2 | layers=3 optim.kind=muon", options("train.micro_batch=2")
    )
    assert [one.options.overrides for one in found] == [
        ("train.micro_batch=2", "parallel.ep=2"), ("train.micro_batch=2", "parallel.tp=2"),
        ("train.micro_batch=2", "optim.kind=muon"),
    ]  # fmt: skip
    assert [one.options.routing for one in found] == ["real", "zipf", "real"]
    assert [one.options.layers for one in found] == [2, 2, 3]


def test_the_planner_sets_the_axes_of_auto(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its layout fills the ranks, and what else it settled is in the configuration."""
    monkeypatch.setattr("trainer.bench.cases._hardware", lambda: "h100")
    asked = options("train.global_batch=16", model="qwen3_30b_a3b")
    config, said = variants.chosen(variants.parse("auto", asked)[0].options, 4, True)
    sizes = [config.parallel.size(axis) for axis in ("pp", "dp", "cp", "tp")]
    assert math.prod(sizes) == 4 and f"parallel.dp={sizes[1]}" in said
    seconds, size = variants.forecast(config, 4)
    assert seconds is not None and 0.01 < seconds < 10 and 1e9 < size < 1e12


def test_a_table_of_variants_has_a_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["bench", "--model", "demo", "--baselines", "none", "--steps", "1", "--layers", "2"]
    assert (
        main([*words, "--variants", "zero=1 | optim.kind=muon", "data.sequence=16", "model.vocab=256"]) == 0
    )
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("optim.kind=muon ") for line in lines) == 2 and "no forecast" in lines[-1]
    assert main(["bench", "--model", "demo", "--variants", "zero=1"]) != 0
