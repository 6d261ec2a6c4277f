"""Initial weights: their distribution, and that they depend on nothing but seed, name and place."""

from __future__ import annotations

import math

import pytest
import torch

from configs.compose import compose
from tests.trainer.model.small_models import KINDS, shape
from trainer.model.decoder import DecoderStage
from trainer.model.initial import build, initial, initialize, kind
from trainer.sizing.model import parameters
from trainer.state import Box

pytestmark = pytest.mark.dist

MODEL = shape(init_std=1.0, layers=8)
NAME = "blocks.1.feed.experts.gate_up"


def _whole(*dims: int, name: str = NAME, seed: int = 1) -> torch.Tensor:
    return initial(name, Box.full(dims), MODEL, seed, "cpu")


def test_values_are_normal() -> None:
    x = _whole(16, 2, 256, 200).double().flatten()
    count = x.numel()
    assert abs(x.mean()) < 4 / math.sqrt(count) and abs(x.var() - 1) < 4 * math.sqrt(2 / count)
    assert abs(x.pow(3).mean()) < 4 * math.sqrt(15 / count)
    assert abs(x.pow(4).mean() - 3) < 4 * math.sqrt(96 / count)
    for bound, share in ((0.5, 0.382925), (1.0, 0.682689), (2.0, 0.954500), (3.5, 0.999535)):
        found = (x.abs() < bound).double().mean().item()
        assert abs(found - share) < 4 * math.sqrt(share * (1 - share) / count), bound
    assert 4 < x.abs().max() < 4.7


def test_neighbours_in_every_dim_are_independent() -> None:
    x = _whole(16, 2, 256, 200).double()
    for dim in range(4):
        length = x.shape[dim]
        product = x.narrow(dim, 0, length - 1) * x.narrow(dim, 1, length - 1)
        assert abs(product.mean()) < 4 / math.sqrt(product.numel()), dim
        assert abs((product.square()).mean() - 1) < 0.02


def test_a_box_is_a_slice_of_the_whole() -> None:
    dims = (6, 2, 10, 14)
    whole = _whole(*dims)
    for start, shape_ in (((0, 0, 0, 0), dims), ((2, 1, 3, 5), (3, 1, 4, 7)), ((5, 0, 9, 0), (1, 2, 1, 14))):
        box = Box(dims, start, shape_)
        assert torch.equal(initial(NAME, box, MODEL, 1, "cpu"), whole[box.slices_within(Box.full(dims))])
    assert initial(NAME, Box(dims, (0, 0, 0, 0), (0, 2, 10, 14)), MODEL, 1, "cpu").shape == (0, 2, 10, 14)
    row = _whole(40)
    assert torch.equal(initial(NAME, Box((40,), (7,), (5,)), MODEL, 1, "cpu"), row[7:12])


def test_boxes_larger_than_a_chunk_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    whole = _whole(6, 2, 10, 14)
    monkeypatch.setattr("trainer.model.initial._CHUNK_CPU", 30)
    assert torch.equal(_whole(6, 2, 10, 14), whole)


def test_an_expert_is_the_same_in_a_model_with_more_of_them() -> None:
    assert torch.equal(_whole(4, 2, 8, 8), _whole(32, 2, 8, 8)[:4])


@pytest.mark.parametrize("seeds", [(0, 1), (1, 1 + (1 << 32)), (3, 3 + (1 << 63)), (5, 5 + (1 << 64))])
def test_every_bit_of_the_seed_counts(seeds: tuple[int, int]) -> None:
    one, other = (_whole(64, 64, seed=seed).flatten() for seed in seeds)
    assert abs((one * other).mean()) < 4 / 64 and (one != other).double().mean() > 0.99


def test_every_name_has_values_of_its_own() -> None:
    names = [name for name, p in DecoderStage(MODEL, 0, 8).named_parameters() if p.dim() > 1]
    firsts = [_whole(4, 4, name=name)[0, 0].item() for name in names]
    assert len(set(firsts)) == len(names) > 50


def test_values_are_those_of_the_first_time() -> None:
    """A change of the values would be a change of every run's beginning: it has to be meant."""
    found = _whole(2, 3, name="blocks.0.attention.query.weight", seed=1234).flatten().tolist()
    assert found == pytest.approx([1.18759, 0.08438, 1.04038, -0.21399, 1.90514, 0.25248], abs=1e-5)


def test_deviations_and_constants() -> None:
    for name, std in (
        ("embedding.weight", 1.0), ("head.weight", 1.0), ("blocks.0.feed.router.linear.weight", 1.0),
        ("blocks.0.attention.output.weight", 0.25), ("blocks.0.feed.experts.down", 0.25),
        ("blocks.0.feed.shared.down.weight", 0.25), ("blocks.0.attention.query_down.weight", 1.0),
        ("blocks.0.attention.key_mix.weight", 1.0), ("blocks.0.feed.router.last.weight", 1.0),
    ):  # fmt: skip
        assert _whole(64, 64, name=name).std().item() == pytest.approx(std, rel=0.05), name
    for name in ("final_norm.weight", "blocks.0.attention.key_scale", "blocks.0.feed_residual.stream.scale"):
        assert _whole(9, name=name).unique().tolist() == [1.0]
    for name in ("blocks.0.attention.key_mix.bias", "blocks.0.feed.router.compress.bias"):
        assert _whole(9, name=name).unique().tolist() == [0.0]


def test_kinds_of_parameters() -> None:
    found: dict[str, set[str]] = {}
    for changes in KINDS.values():
        for name, _ in DecoderStage(shape(**changes), 0, 2).named_parameters():
            found.setdefault(kind(name), set()).add(name.rpartition("blocks.0.")[2])
    assert found["embedding"] == {"embedding.weight", "head.weight"}
    assert {"attention_norm.weight", "attention.key_conv.weight", "attention.query_mix.weight"} < found[
        "vector"
    ]
    assert {"attention.key_scale", "feed.router.compress.bias", "feed.router.norm.weight"} < found["vector"]
    assert {"attention.query.weight", "feed.experts.gate_up", "feed.router.linear.weight"} < found["matrix"]
    assert {"mtp.0.project.weight", "attention.key_value_down.weight", "feed.experts.up"} < found["matrix"]


def test_stages_begin_as_the_whole_model_does() -> None:
    model = shape(**KINDS["zaya"], layers=3)
    whole = build(model, 9).state_dict()
    for first, last in ((0, 1), (1, 3)):
        part = DecoderStage(model, first, last)
        initialize(part, 9)
        for name, value in part.state_dict().items():
            assert torch.equal(value, whole[name]), name


@pytest.mark.parametrize("preset", ["demo", "olmoe_1b_7b", "mixtral_8x7b", "qwen3_30b_a3b", "deepseek_v3"])
def test_sizing_counts_the_parameters_that_there_are(preset: str) -> None:
    model = compose([f"model={preset}"]).model.model_copy(update={"mtp_layers": 0})
    with torch.device("meta"):
        built = DecoderStage(model, 0, model.layers)
    assert sum(p.numel() for p in built.parameters()) == parameters.count(model).total


def test_what_sizing_leaves_out_of_zaya1() -> None:
    """Its vectors: biases of convolutions and router, key and depth scales, residual scaling."""
    model = compose(["model=zaya1_base"]).model.model_copy(update={"residual_scaling": True})
    with torch.device("meta"):
        built = DecoderStage(model, 0, model.layers)
    found = sum(p.numel() for p in built.parameters()) - parameters.count(model).total
    channels, width, layers, hidden = 1280, 256, 40, 2048
    convolutions, routers = layers * (2 * channels + 2), layers * 3 * width + (layers - 1) * width
    assert found == convolutions + routers + (8 * layers + 2) * hidden
    assert found / sum(p.numel() for p in built.parameters()) < 1e-4
