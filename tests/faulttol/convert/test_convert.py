"""Parts of conversions: numbers, orders of rows, maps of names, settings of models, and growing."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import UserError
from configs.model import ModelConfig
from faulttol.checkpoint.boxes import Box
from faulttol.checkpoint.manifest import flat
from faulttol.checkpoint.store import CheckpointStore
from faulttol.convert import job
from faulttol.convert.facts import balances, model_of, nested, slots
from faulttol.convert.families import tensors
from faulttol.convert.grow import grow
from faulttol.convert.hf_config import config_of, family_of, model_in
from faulttol.convert.names import load, place
from faulttol.convert.placed import DimOrder, PlacedTensor
from faulttol.convert.target import ConversionTarget, Value, filled, zeros
from faulttol.convert.values import FLOATS, convert
from tests.faulttol.convert.converted import commit, read, told, trained
from tests.trainer.families import FAMILIES, family
from trainer.model.decoder import DecoderStage
from trainer.model.initial import build, kind

pytestmark = pytest.mark.dist


# ---- numbers ----


@pytest.mark.parametrize("given", FLOATS)
@pytest.mark.parametrize("wanted", FLOATS)
def test_numbers_become_what_torch_makes_of_them(given: str, wanted: str) -> None:
    torch.manual_seed(1)
    odd = [
        0.0,
        -0.0,
        1e-45,
        -1e-40,
        6.1e-5,
        65504.0,
        65520.0,
        3.4e38,
        -3.4e38,
        float("inf"),
        float("-inf"),
        float("nan"),
    ]
    # Halfway between two numbers of bf16: one that is rounded up to even, one down.
    odd += [1.00390625, 1.01171875, -1.00390625]
    values = torch.cat((torch.tensor(odd), torch.randn(4000) * torch.logspace(-40, 38, 4000))).to(
        getattr(torch, given)
    )
    if given == "float32":  # what isn't a number comes in many kinds
        values = torch.cat(
            (values, torch.tensor([0x7F800001, -1, -0x400000], dtype=torch.int32).view(torch.float32))
        )
    item = values.element_size()
    bits = values.view(torch.uint8).numpy().view(f"u{item}")
    target = getattr(torch, wanted)
    found = torch.from_numpy(convert(bits, given, wanted).view(np.uint8)).view(target)
    torch.testing.assert_close(found, values.to(target), rtol=0, atol=0, equal_nan=True)


def test_integers_stay_integers() -> None:
    numbers = np.arange(4, dtype=np.uint64)
    assert convert(numbers, "int64", "int64") is numbers
    with pytest.raises(ValueError, match="int64 doesn't become float32"):
        convert(numbers, "int64", "float32")


# ---- orders ----


def test_stretches_end_where_an_order_may_be_cut() -> None:
    order = DimOrder(0, (0, 2, 1, 3, 4, 6, 5, 7))
    assert order.cuts == [0, 1, 3, 4, 5, 7, 8]
    one = PlacedTensor("t", (8, 3), "o", Box.full((8, 3)), order)
    for most in (1, 3, 6, 7, 9, 12, 24, 99):
        stretches = list(one.rows(0, 8, most))
        assert [first for first, _ in stretches] == [0, *(last for _, last in stretches)][:-1]
        assert stretches[-1][1] == 8 and all(last in order.cuts for _, last in stretches)
        assert all(last - first <= max(most // 3, 2) for first, last in stretches)
    assert list(PlacedTensor("t", (8, 3), "o", Box.full((8, 3))).rows(2, 8, 9)) == [(2, 5), (5, 8)]
    assert not list(PlacedTensor("t", (8, 0), "o", Box.full((8, 0)), None).rows(0, 8, 9))


@pytest.mark.parametrize("name", ["mixtral", "olmoe", "qwen3", "deepseek"])
def test_a_familys_tensors_make_up_the_model(name: str) -> None:
    model = family(name)
    if name == "qwen3":
        model = _changed(model, **{"router.balance": "aux", "dense_layers": 1, "dense_width": 24})
    with torch.device("meta"):
        parameters = {n: tuple(p.shape) for n, p in DecoderStage(model, 0, model.layers).named_parameters()}
    listed = tensors(model)
    wholes = {one.name: one.box.whole for one in listed if not one.name.endswith("router.bias")}
    assert wholes == parameters
    for whole in wholes:
        mine = [one.box for one in listed if one.name == whole]
        assert sum(box.elements for box in mine) == mine[0].whole[0] * int(np.prod(mine[0].whole[1:]))
    assert len({one.foreign for one in listed}) == len(listed)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "lamb"])
def test_slots_are_those_of_the_trainers_optimizers(name: str, optimizer: Any) -> None:
    model = family(name)
    with torch.device("meta"):
        stage = DecoderStage(model, 0, model.layers)
    for parameter, _ in stage.named_parameters():
        matrix = optimizer == "muon" and kind(parameter) == "matrix"
        assert slots(parameter, optimizer) == (("momentum",) if matrix else ("exp_avg", "exp_avg_sq")), (
            parameter
        )
    assert sorted(v.name for v in balances(model, set())) == sorted(name for name, _ in stage.named_buffers())
    assert not list(balances(model, {name for name, _ in stage.named_buffers()}))


# ---- settings of models ----


def _changed(model: ModelConfig, **changes: Any) -> ModelConfig:
    return ModelConfig(**nested(flat(model.model_dump()) | changes))


PRESETS = ("mixtral_8x7b", "olmoe_1b_7b", "qwen3_30b_a3b", "deepseek_v3")


@pytest.mark.parametrize("preset", PRESETS)
def test_the_presets_go_out_and_come_back(preset: str) -> None:
    model = _preset(preset)
    tree = json.loads(json.dumps(config_of(model, "bfloat16", {})))
    tree["router_aux_loss_coef"] = model.router.aux_coefficient / (
        1 if preset == "olmoe_1b_7b" else model.top_k
    )
    again = model_in(tree, "config.json", preset, model.mtp_layers)
    assert again == model


def _preset(name: str) -> ModelConfig:
    import yaml

    import configs

    return ModelConfig(
        **yaml.safe_load((Path(configs.__file__).parent / "model" / f"{name}.yaml").read_text())
    )


CANNOT = [
    ("mixtral", {"gated": False}, "model.gated=False"),
    ("mixtral", {"parallel_block": True}, "model.parallel_block=True"),
    ("mixtral", {"router.balance": "bias"}, "model.router.balance=bias"),
    ("mixtral", {"router.renormalize": False}, "model.router.renormalize=False"),
    ("mixtral", {"top_k": 1}, "model.top_k=1"),
    ("mixtral", {"router.capacity_factor": 1.0}, "model.router.capacity_factor=1.0"),
    ("mixtral", {"rope_fraction": 0.5}, "model.rope_fraction=0.5"),
    ("mixtral", {"shared_width": 16}, "model.shared_width=16"),
    ("mixtral", {"router.score": "sigmoid"}, "model.router.score=sigmoid"),
    ("mixtral", {"router.scale": 2.0}, "model.router.scale=2.0"),
    ("mixtral", {"router.groups": 2}, "model.router.groups=2"),
    ("mixtral", {"dense_layers": 1, "dense_width": 8}, "model.dense_layers=1"),
    ("olmoe", {"window": 4}, "model.window=4"),
    ("olmoe", {"head_dim": 16}, "model.head_dim=16"),
    ("qwen3", {}, "model.router.balance=bias"),
    ("deepseek", {"router.score": "softmax"}, "model.router.score=softmax"),
    ("deepseek", {"shared_width": 0}, "model.shared_width=0"),
    ("deepseek", {"shared_width": 24}, "model.shared_width=24"),
    ("deepseek", {"kv_heads": 2}, "model.kv_heads=2"),
    ("zaya", {}, "model.attention=cca"),
]


@pytest.mark.parametrize(("name", "changes", "told"), CANNOT)
def test_what_no_family_computes_is_refused_by_name(name: str, changes: dict[str, Any], told: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(told)} can't be exported"):
        family_of(_changed(family(name), **changes))


WRONG = [
    ("mixtral", {"hidden_act": "gelu"}, "hidden_act='gelu' isn't known here"),
    ("mixtral", {"architectures": ["GptOssForCausalLM"]}, "architectures='GptOssForCausalLM' isn't known"),
    ("mixtral", {"num_local_experts": None}, "has no num_local_experts; add it"),
    ("mixtral", {"hidden_size": "32"}, "hidden_size='32' is not a whole number"),
    ("mixtral", {"rms_norm_eps": "x"}, "rms_norm_eps='x' is not a number"),
    ("mixtral", {"num_key_value_heads": 3}, "model.heads=4 is not a multiple of model.kv_heads=3"),
    ("mixtral", {"quantization_config": {"quant_method": "fp8"}}, "quantised weights aren't read"),
    ("qwen3", {"attention_bias": True}, "attention_bias=True isn't known here"),
    ("olmoe", {"clip_qkv": 8.0}, "clip_qkv=8.0 isn't known here"),
    ("qwen3", {"mlp_only_layers": [2]}, r"mlp_only_layers=\[2\] gives experts to layers 0, 1"),
    ("qwen3", {"use_sliding_window": True}, "use_sliding_window=True"),
    (
        "qwen3",
        {"rope_parameters": {"rope_type": "llama3", "factor": 8}},
        "rope_parameters: .*llama3.* isn't known",
    ),
    ("deepseek", {"v_head_dim": 4}, "v_head_dim=4 isn't known here, 8 is"),
    ("deepseek", {"scoring_func": "softmax"}, "scoring_func='softmax'"),
    (
        "deepseek",
        {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "mscale": 0.7}},
        "isn't known here",
    ),
]


@pytest.mark.parametrize(("name", "changes", "told"), WRONG)
def test_a_config_that_says_something_else_is_refused_by_name(
    name: str, changes: dict[str, Any], told: str
) -> None:
    model = family(name)
    model = _changed(model, **{"router.balance": "aux"}) if name == "qwen3" else model
    tree = config_of(model, "float32", {}) | changes
    with pytest.raises(UserError, match=f"^config.json.*{told}"):
        model_in(tree, "config.json", "x")


def test_older_configs_are_read() -> None:
    """`rope_theta` and `rope_scaling` instead of `rope_parameters`, as the published files have it."""
    model = _changed(family("deepseek"), mtp_layers=0)
    tree = config_of(model, "float32", {})
    rope = tree.pop("rope_parameters")
    tree["rope_scaling"] = {
        "type" if k == "rope_type" else k: v for k, v in rope.items() if k != "rope_theta"
    }
    again = model_in(tree, "config.json", "x")
    assert (again.yarn, again.rope_theta) == (model.yarn, model.rope_theta) and again.yarn.factor == 4
    del tree["rope_scaling"], tree["rope_theta"]
    assert model_in(tree, "config.json", "x").yarn.factor == 1


# ---- maps of names ----


class Names:
    bytes = 0

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        self.shapes = {name.replace("__", "."): shape for name, shape in shapes.items()}

    def names(self) -> list[str]:
        return list(self.shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.shapes[name]

    def dtype(self, name: str) -> str:
        return "float32"

    def read(self, name: str, first: int, last: int) -> Any:
        return np.zeros(last - first, np.uint32)


BAD_MAPS = [
    ("[]", "is not a map of names"),
    ("{", "is not a map of names"),
    ('{"rules": {}}', "rules is not a list"),
    ('{"rules": [{"from": "a"}]}', "rule 1 is .*it takes from, to and perhaps at"),
    ('{"rules": [{"from": "a", "to": "b", "in": 3}]}', "rule 1 is .*it takes"),
    (
        '{"rules": [{"from": "a", "to": null}, {"from": "(", "to": "b"}]}',
        "rule 2: from='\\(' is not a regular expression",
    ),
    ('{"rules": [{"from": "(a)", "to": "{2}"}]}', r"rule 1: \{2\} in '\{2\}', and from has 1 groups"),
    ('{"rules": [{"from": "a", "to": "b", "at": 3}]}', "rule 1: from and to are texts and at is a list"),
]


@pytest.mark.parametrize(("text", "told"), BAD_MAPS)
def test_a_map_that_is_none_is_refused(text: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(text)
    with pytest.raises(UserError, match=told):
        load(tmp_path / "map.json")
    with pytest.raises(UserError, match="can't be read: No such file"):
        load(tmp_path / "none.json")


BAD_RULES = [
    ([{"from": "w.*", "to": "w"}], {"x": (2,)}, "no rule of the map of names matches x"),
    (
        [{"from": "w(.*)", "to": "w", "at": ["{1}"]}],
        {"wa": (2,)},
        "the place of wa in w is not a whole number",
    ),
    (
        [{"from": "w(.*)", "to": "w", "at": ["{1}"]}],
        {"w0": (2,), "w1": (3,)},
        r"w0 of \[2\] and w1 of \[3\] can't make up w",
    ),
]


@pytest.mark.parametrize(("rules", "shapes", "told"), BAD_RULES)
def test_names_that_do_not_fit_a_map_are_told(rules: Any, shapes: Any, told: str, tmp_path: Path) -> None:
    (tmp_path / "map.json").write_text(json.dumps({"rules": rules}))
    with pytest.raises(UserError, match=told):
        place(Names(**shapes), load(tmp_path / "map.json"))


def test_places_that_are_missing_or_doubled_are_refused(tmp_path: Path) -> None:
    from faulttol.convert.assemble import ImportDestination, imported

    (tmp_path / "map.json").write_text(
        json.dumps({"rules": [{"from": r"e\.(\d+)\.w", "to": "all", "at": ["{1}"]}]})
    )
    for there, told_ in (
        ((0, 2), r"all\[1:2, 0:3\] of \[3, 3\] has no source"),
        ((0, 1, 1), "has two sources"),
    ):
        names = Names(**{f"e__{'0' * at}{number}__w": (3,) for at, number in enumerate(there)})
        placed, _ = place(names, load(tmp_path / "map.json"))
        with pytest.raises(UserError, match=told_):
            imported(names, placed, ImportDestination(CheckpointStore(str(tmp_path / "out")), "run", 0, {}))


# ---- what is written ----


def test_large_tensors_are_spread_over_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from faulttol.convert import target as writing
    from faulttol.convert.job import ConversionProgress, no_progress

    monkeypatch.setattr(writing, "_PIECE", 600)
    monkeypatch.setattr(writing, "_FILE", 1000)
    whole = np.arange(600, dtype=np.uint32)

    def rows(box: Box) -> Any:
        yield memoryview(whole.reshape(100, 6)[box.slices_within(Box.full((100, 6)))].tobytes())

    values = [
        Value("w", "float32", (100, 6), rows),
        zeros("n", "bfloat16", (9, 0)),
        filled("one", "float32", (3,), b"\0\0\x80\x3f"),
        zeros("number", "float32", ()),
    ]
    target = ConversionTarget(CheckpointStore(str(tmp_path)), "run", 3, values)
    _, size = target.write({}, ConversionProgress(no_progress, target.bytes))
    files = list(tmp_path.glob("*/*.r*.safetensors"))
    assert len(files) == 3 and size == target.size == sum(file.stat().st_size for file in files)
    found, _ = read(tmp_path)
    assert torch.equal(found["w"].view(torch.int32).flatten(), torch.arange(600, dtype=torch.int32))
    assert found["one"].tolist() == [1, 1, 1] and found["number"].item() == 0 and found["n"].shape == (9, 0)
    with pytest.raises(UserError, match="has step 3 of run run already"):
        ConversionTarget(CheckpointStore(str(tmp_path)), "run", 3, values)
    with pytest.raises(UserError, match="belongs to run run"):
        ConversionTarget(CheckpointStore(str(tmp_path)), "another", 3, values)


def test_chunks_of_any_size_become_whole_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "BLOCK", 8)
    noise = random.Random(1)
    for _ in range(50):
        chunks = [noise.randbytes(noise.randrange(30)) for _ in range(noise.randrange(9))]
        found = [bytes(chunk) for chunk in job.blocked(memoryview(chunk) for chunk in chunks)]
        assert b"".join(found) == b"".join(chunks)
        assert all(chunk and len(chunk) % 8 == 0 for chunk in found[:-1])


# ---- growing ----


def _state(model: ModelConfig) -> dict[str, torch.Tensor]:
    built = {name: torch.randn_like(t) for name, t in build(model, 1).state_dict().items()}
    values = {n: t for n, t in built.items() if not n.endswith(("bias_avg", "bias_avg_sq"))}
    return trained(model, values) | built


@pytest.mark.parametrize("optimizer", ["reset", "copy"])
@pytest.mark.parametrize(
    ("name", "fixed", "layers"),
    [
        ("deepseek", 1, 7),
        ("zaya", 0, 8),
        ("megascale", 0, 12),
        ("maverick", 0, 8),
        ("zaya-interleaved", 0, 12),
    ],
)
def test_layers_are_stacked(name: str, fixed: int, layers: int, optimizer: Any, tmp_path: Path) -> None:
    model = family(name)
    before = _state(model)
    commit(tmp_path / "run", before, told(model, lineage=[{"run": "older"}]))
    growing = grow(
        CheckpointStore(str(tmp_path / "run")),
        CheckpointStore(str(tmp_path / "out")),
        "grown",
        layers,
        optimizer=optimizer,
    )
    done = growing.run()
    after, source = read(tmp_path / "out")
    grown = model_of(source)
    assert grown == model.model_copy(update={"layers": layers})
    # Exactly what training of the deeper model wants.
    assert sorted(after) == sorted(_state(grown))
    for new, tensor in after.items():
        match = re.fullmatch(r"blocks\.(\d+)\.(.*)", new)
        layer = int(match[1]) if match else 0
        old = new
        if match and layer >= fixed:
            old = f"blocks.{fixed + (layer - fixed) % (model.layers - fixed)}.{match[2]}"
        slot = "/" in new or new.endswith(("bias_avg", "bias_avg_sq"))
        if old not in before:  # the first layer's router takes no state from another
            assert "state_scale" in old and (tensor == (0 if slot else 1)).all()
        elif slot and optimizer == "reset":
            assert not tensor.any(), new
        else:
            assert torch.equal(tensor, before[old]), new
    facts = source.manifest.facts
    assert (source.manifest.step, source.manifest.run, facts["samples"]) == (7, "grown", 70)
    assert facts["lineage"][0] == {"run": "older"}
    entry = facts["lineage"][1]
    assert (entry["how"], entry["layers"], entry["optimizer"]) == ("grow", [model.layers, layers], optimizer)
    assert ("begin at zero" in done.notes[0]) == (optimizer == "reset")
    files = (tmp_path / "out").glob("*/*.r*.safetensors")
    assert sum(file.stat().st_size for file in files) == growing.estimate.bytes_written
    assert done.bytes_read <= growing.estimate.bytes_read


def test_what_cannot_be_stacked_is_refused(tmp_path: Path) -> None:
    model = family("deepseek")
    commit(tmp_path / "run", _state(model), told(model))
    store, out = CheckpointStore(str(tmp_path / "run")), CheckpointStore(str(tmp_path / "out"))
    for layers in (3, 4, 5, 8):
        with pytest.raises(
            UserError, match=f"^layers={layers} .*first 1 are dense and stay; type layers= one of 7, 10, 13"
        ):
            grow(store, out, "grown", layers)
    with pytest.raises(UserError, match="method=interleave isn't known"):
        grow(store, out, "grown", 7, method="interleave")
    with pytest.raises(UserError, match="optimizer=keep isn't known"):
        grow(store, out, "grown", 7, optimizer="keep")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="belongs to run run-1"):
        grow(store, store, "grown", 7)
    odd = family("maverick").model_copy(update={"layers": 3})
    commit(tmp_path / "odd", _state(odd), told(odd))
    with pytest.raises(
        UserError, match=r"^the model's 3 layers after .* is not a multiple of model.moe_every=2"
    ):
        grow(CheckpointStore(str(tmp_path / "odd")), out, "grown", 6)
    commit(tmp_path / "bare", {"w": torch.zeros(3)}, {})
    with pytest.raises(UserError, match="doesn't tell its model"):
        grow(CheckpointStore(str(tmp_path / "bare")), out, "grown", 7)
    with pytest.raises(UserError, match="holds no committed checkpoint"):
        grow(CheckpointStore(str(tmp_path / "none")), out, "grown", 7)
