"""Published parameter counts as golden vectors, FLOPs by hand, memory that adds up."""

from __future__ import annotations

import pytest

from configs.compose import compose
from configs.schema import ModelConfig
from trainer.sizing.model import flops, parameters
from trainer.sizing.model.layout import spreads

pytestmark = pytest.mark.unit


def model(name: str) -> ModelConfig:
    return compose([f"model={name}"]).model


@pytest.mark.parametrize(
    ("name", "total", "active"),
    [
        # Billions, as the models' own papers and cards round them.
        ("olmoe_1b_7b", 6.92, 1.28),  # arXiv 2409.02060, table 1
        ("mixtral_8x7b", 46.7, 12.9),  # arXiv 2401.04088, section 1
        ("qwen3_30b_a3b", 30.5, 3.3),  # model card
        ("deepseek_v3", 671.0, 37.0),  # arXiv 2412.19437, abstract
    ],
)
def test_published_counts(name: str, total: float, active: float) -> None:
    counts = parameters.count(model(name))
    assert counts.total / 1e9 == pytest.approx(total, rel=0.005)
    assert counts.active / 1e9 == pytest.approx(active, rel=0.02)


def test_zaya1_counts_leave_the_embeddings_apart() -> None:
    counts = parameters.count(model("zaya1_base"))
    assert counts.total_without_embeddings / 1e9 == pytest.approx(8.30, abs=0.005)
    assert counts.active_without_embeddings / 1e9 == pytest.approx(0.753, abs=0.001)
    assert counts.embedding / 1e9 == pytest.approx(0.537, abs=0.0005) and counts.output == 0


def test_an_mlp_without_a_gate_has_two_matrices() -> None:
    gated = model("olmoe_1b_7b")
    plain = parameters.count(gated.model_copy(update={"gated": False}))
    assert plain.experts * 3 == parameters.count(gated).experts * 2


def test_parts_make_up_the_total() -> None:
    for name in ("demo", "olmoe_1b_7b", "deepseek_v3"):
        counts = parameters.count(model(name))
        parts = (counts.embedding, counts.output, counts.attention, counts.router, counts.experts, counts.shared,
                 counts.dense, counts.norms)  # fmt: skip
        assert sum(parts) == counts.total


def test_flops_of_a_model_by_hand() -> None:
    config = model("demo")
    matmul = parameters.count(config).matmul
    per_layer = 2 * 2 * config.heads * config.head_dim * (64 + 1) / 2
    by_hand = 6 * matmul + 3 * config.layers * per_layer
    assert flops.train_flops_per_token(config, 64) == pytest.approx(by_hand)


def test_an_unknown_device_has_no_peak_and_says_so() -> None:
    hardware = compose([]).hardware
    assert flops.peak(hardware, "fp32") is None
    assert flops.basis(hardware, "fp32").startswith("none: cpu")


def test_a_known_device_names_numerator_peak_and_precision() -> None:
    basis = flops.basis(compose(["hardware=mi300x"]).hardware, "bf16")
    assert "1307 TFLOP/s bf16" in basis and "mi300x" in basis and "6 FLOPs" in basis


def test_spreads_are_even_and_fewest_nodes_first() -> None:
    assert spreads(8, (4, 4, 4, 4)) == [(2, 4), (4, 2)]
    assert spreads(3, (2, 2)) == []
