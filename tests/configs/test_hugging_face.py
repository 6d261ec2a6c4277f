"""`model=path/config.json`: each family's parameters beside those of its own code, and what is named as left out."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from configs.compose import compose, dump, load
from configs.errors import UserError
from configs.hugging_face.read import left_out, model_section, name_of, read
from tests.source_tree import ROOT
from trainer.sizing.ask.answer import answer, configured
from trainer.sizing.ask.screen import sized
from trainer.sizing.model.parameters import count
from trainer.sizing.search.planner import plan

pytestmark = pytest.mark.unit

Tree = dict[str, Any]
COMMON: Tree = {
    "vocab_size": 512, "hidden_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "intermediate_size": 96, "tie_word_embeddings": False,
}  # fmt: skip
LATENT: Tree = {
    "num_key_value_heads": 4, "moe_intermediate_size": 40, "n_routed_experts": 8, "n_shared_experts": 2,
    "num_experts_per_tok": 2, "kv_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "first_k_dense_replace": 1,
}  # fmt: skip
QWEN_MOE: Tree = {"moe_intermediate_size": 40, "num_experts": 8, "num_experts_per_tok": 2}
GRANITE: Tree = {"model_type": "granitemoe", "num_local_experts": 8, "num_experts_per_tok": 2}
GLM: Tree = {
    "moe_intermediate_size": 40, "n_routed_experts": 8, "num_experts_per_tok": 2, "head_dim": 16,
    "first_k_dense_replace": 1,
}  # fmt: skip
LLAMA4: Tree = {"num_local_experts": 8, "num_experts_per_tok": 1, "head_dim": 16, "intermediate_size_mlp": 56}
MAVERICK: Tree = {
    "attention_bias": False, "attention_chunk_size": 8192, "attention_dropout": 0.0, "attn_scale": 0.1,
    "attn_temperature_tuning": True, "floor_scale": 8192, "for_llm_compressor": False, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 5120, "initializer_range": 0.02, "interleave_moe_layer_step": 2,
    "intermediate_size": 8192, "intermediate_size_mlp": 16384, "max_position_embeddings": 1048576,
    "model_type": "llama4_text", "no_rope_layers": [], "num_attention_heads": 40, "num_experts_per_tok": 1,
    "num_hidden_layers": 48, "num_key_value_heads": 8, "num_local_experts": 128, "output_router_logits": False,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 500000.0, "router_aux_loss_coef": 0.001,
    "router_jitter_noise": 0.0, "tie_word_embeddings": False, "use_cache": True, "use_qk_norm": False,
    "vocab_size": 202048,
}  # fmt: skip
"""Llama 4 Maverick's decoder: `text_config` of meta-llama/Llama-4-Maverick-17B-128E's file."""


def _none(_: Tree) -> int:
    return 0


def _qkv(c: Tree, head: int = 16) -> int:
    """Biases of query, key and value in every layer."""
    return c["num_hidden_layers"] * (c["num_attention_heads"] + 2 * c["num_key_value_heads"]) * head


def _qwen2_moe(c: Tree) -> int:
    return _qkv(c) + c["num_hidden_layers"] * c["hidden_size"]  # and the gate of the shared expert


def _gpt_oss(c: Tree) -> int:
    experts, width, inner = c["num_local_experts"], c["hidden_size"], c["intermediate_size"]
    # Sinks, output, router, experts.
    of_layer = c["num_attention_heads"] + width + experts + experts * (2 * inner + width)
    return _qkv(c) + c["num_hidden_layers"] * of_layer


def _phimoe(c: Tree) -> int:
    width, layers = c["hidden_size"], c["num_hidden_layers"]
    return _qkv(c) + layers * width + c["vocab_size"] + (2 * layers + 1) * width  # attention, head and norms


FAMILIES: dict[str, tuple[str, Tree, Callable[[Tree], int]]] = {
    "mixtral": ("Mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16}, _none),
    "olmoe": ("Olmoe", {"num_experts": 8, "num_experts_per_tok": 2}, _none),
    "qwen2_moe": ("Qwen2Moe", QWEN_MOE | {"shared_expert_intermediate_size": 72}, _qwen2_moe),
    "qwen2_moe/sparse": (
        "Qwen2Moe", QWEN_MOE | {"shared_expert_intermediate_size": 72, "decoder_sparse_step": 3, "num_hidden_layers": 7},
        lambda c: _qkv(c) + 2 * c["hidden_size"],
    ),
    "qwen3_moe": ("Qwen3Moe", QWEN_MOE | {"head_dim": 24, "mlp_only_layers": [0]}, _none),
    "qwen3_moe/sparse": ("Qwen3Moe", QWEN_MOE | {"head_dim": 24, "decoder_sparse_step": 2}, _none),
    "qwen3_moe/both": (
        "Qwen3Moe", QWEN_MOE | {"decoder_sparse_step": 2, "mlp_only_layers": [1, 2], "num_hidden_layers": 6}, _none,
    ),
    "qwen3_moe/listed": ("Qwen3Moe", QWEN_MOE | {"mlp_only_layers": [0, 1, 3, 4], "num_hidden_layers": 6}, _none),
    "deepseek_v2": ("DeepseekV2", LATENT | {"q_lora_rank": None, "topk_method": "greedy"}, _none),
    "deepseek_v3": ("DeepseekV3", LATENT | {"q_lora_rank": 32, "n_group": 4, "topk_group": 2}, _none),
    "gpt_oss": ("GptOss", {"num_local_experts": 8, "num_experts_per_tok": 2, "head_dim": 16}, _gpt_oss),
    "llama4": ("Llama4", LLAMA4, _none),
    "llama4/interleaved": ("Llama4", LLAMA4 | {"interleave_moe_layer_step": 3, "num_hidden_layers": 7}, _none),
    "llama4/listed": ("Llama4", LLAMA4 | {"moe_layers": [3, 1]}, _none),
    "llama4/dense": ("Llama4", LLAMA4 | {"moe_layers": []}, _none),
    "llama4/maverick": ("Llama4", MAVERICK, _none),
    "phimoe": (
        "Phimoe", {"num_local_experts": 8, "num_experts_per_tok": 2, "attention_bias": True, "lm_head_bias": True}, _phimoe,
    ),
    "mistral": ("Mistral", {"head_dim": 16, "sliding_window": 32}, _none),
    "glm4_moe": ("Glm4Moe", GLM, _none),
    "glm4_moe/norm": ("Glm4Moe", GLM | {"use_qk_norm": True, "attention_bias": True, "n_shared_experts": 2}, _qkv),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 8, "num_experts_per_tok": 2}, _none),
    "llama": ("Llama", {"head_dim": 16, "tie_word_embeddings": True}, _none),
    "qwen2": ("Qwen2", {}, _qkv),
    "qwen3": ("Qwen3", {"head_dim": 24}, _none),
}  # fmt: skip
"""`model_type`, and what is special -> prefix of its classes, its own settings, parameters that are named as left out."""


@pytest.mark.timeout(180)
def test_parameters_are_those_of_the_familys_own_code() -> None:
    """In a process of its own, on the meta device: a unit test loads no torch."""
    import subprocess
    import sys

    script = (
        "import json, sys, torch, transformers\n"
        "for line in sys.stdin:\n"
        "    name, tree = json.loads(line)\n"
        "    kind = 'Llama4TextConfig' if name == 'Llama4' else name + 'Config'\n"
        "    config = getattr(transformers, kind)(**tree)\n"
        "    with torch.device('meta'):\n"
        "        model = getattr(transformers, name + 'ForCausalLM')(config)\n"
        "    print(json.dumps([model.num_parameters(), config.to_dict()]), flush=True)\n"
    )
    lines = "".join(json.dumps([name, COMMON | own]) + "\n" for name, own, _ in FAMILIES.values())
    done = subprocess.run(
        [sys.executable, "-c", script], input=lines, capture_output=True, text=True, timeout=150, check=True
    )
    for (family, (_, own, extra)), line in zip(FAMILIES.items(), done.stdout.splitlines(), strict=True):
        theirs, written = json.loads(line)
        typed = COMMON | own | {"model_type": family.partition("/")[0]}
        for tree in (typed, written):  # a file as short as can be, and the one that `save_pretrained` writes
            found = read(tree, "config.json", "x", predictions=0)
            assert count(found.model).total + extra(COMMON | own) == theirs, family
            assert bool(found.differences) >= bool(extra(COMMON | own)) and not found.unknown, (
                family,
                found.unknown,
            )


PUBLISHED: list[tuple[str, Tree, float, float]] = [
    ("Llama4ForCausalLM", MAVERICK, 400, 17),
    ("DeepseekV2ForCausalLM", {
        "hidden_size": 5120, "intermediate_size": 12288, "moe_intermediate_size": 1536, "num_hidden_layers": 60,
        "num_attention_heads": 128, "n_routed_experts": 160, "n_shared_experts": 2, "num_experts_per_tok": 6,
        "n_group": 8, "topk_group": 3, "first_k_dense_replace": 1, "kv_lora_rank": 512, "q_lora_rank": 1536,
        "vocab_size": 102400, "topk_method": "group_limited_greedy", "routed_scaling_factor": 16.0,
    }, 236, 21),
    ("GptOssForCausalLM", {
        "hidden_size": 2880, "intermediate_size": 2880, "num_hidden_layers": 36, "num_attention_heads": 64,
        "num_key_value_heads": 8, "head_dim": 64, "num_local_experts": 128, "num_experts_per_tok": 4, "vocab_size": 201088,
        "sliding_window": 128,
    }, 116.8, 5.7),
    ("PhiMoEForCausalLM", {
        "hidden_size": 4096, "intermediate_size": 6400, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "num_local_experts": 16, "num_experts_per_tok": 2, "vocab_size": 32064,
        "attention_bias": True, "lm_head_bias": True,
    }, 41.9, 6.6),
    ("Glm4MoeForCausalLM", {
        "hidden_size": 4096, "intermediate_size": 10944, "moe_intermediate_size": 1408, "num_hidden_layers": 46,
        "num_attention_heads": 96, "num_key_value_heads": 8, "head_dim": 128, "n_routed_experts": 128,
        "n_shared_experts": 1, "num_experts_per_tok": 8, "first_k_dense_replace": 1, "vocab_size": 151552,
        "attention_bias": True, "partial_rotary_factor": 0.5, "use_qk_norm": False,
    }, 106.8, 12.0),
    ("GraniteMoeForCausalLM", {
        "hidden_size": 1536, "intermediate_size": 512, "num_hidden_layers": 32, "num_attention_heads": 24,
        "num_key_value_heads": 8, "num_local_experts": 40, "num_experts_per_tok": 8, "vocab_size": 49155,
        "tie_word_embeddings": True, "embedding_multiplier": 12.0, "attention_multiplier": 0.015625,
        "residual_multiplier": 0.22, "logits_scaling": 6.0,
    }, 3.3, 0.88),
    ("LlamaForCausalLM", {
        "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32,
        "num_key_value_heads": 8, "vocab_size": 128256, "rope_theta": 500000.0,
        "rope_scaling": {"rope_type": "llama3", "factor": 8.0},
    }, 8.03, 8.03),
]  # fmt: skip
"""Files as published, and the billions of parameters, all and active, that their papers or cards name."""


@pytest.mark.parametrize(("architecture", "tree", "total", "active"), PUBLISHED, ids=lambda x: str(x)[:20])
def test_published_sizes(architecture: str, tree: Tree, total: float, active: float) -> None:
    found = count(read(tree | {"architectures": [architecture]}, "config.json", "x").model)
    assert found.total / 1e9 == pytest.approx(total, rel=0.01)
    # Papers leave out the embedding (GPT-OSS), the output projection too (GLM-4.5), or count both: one of the three it is.
    sizes = (found.active, found.active - found.embedding, found.active_without_embeddings)
    counts = [size / 1e9 for size in sizes]
    assert min(abs(one / active - 1) for one in counts) < 0.03, counts


def write(folder: Path, tree: Tree, name: str = "config.json") -> Path:
    """A file of a model."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(json.dumps(tree))
    return folder / name


OLMOE = COMMON | {"model_type": "olmoe", "num_experts": 8, "num_experts_per_tok": 2}


def test_a_file_a_folder_and_a_configuration_that_names_it_are_the_same(tmp_path: Path) -> None:
    file = write(tmp_path / "My model", OLMOE)
    yaml = tmp_path / "mine.yaml"
    yaml.write_text(f"model: {file}\ntrain: {{micro_batch: 2}}\n")
    models = [
        compose([f"model={file}"]).model, compose([f"model={file.parent}"]).model, compose([], yaml).model,
        compose([], file).model,
    ]  # fmt: skip
    assert all(model == models[0] for model in models)
    assert (models[0].name, models[0].hidden, models[0].qk_norm) == ("My_model", 64, "projection")
    assert models[0].left_out == () and left_out(models[0]) == []
    assert compose([f"model={file}", "model.layers=2"]).model.layers == 2


def test_a_configuration_that_was_read_from_a_file_is_saved_whole(tmp_path: Path) -> None:
    config = compose([f"model={write(tmp_path, OLMOE | {'clip_qkv': 8.0})}"])
    saved = tmp_path / "saved.yaml"
    saved.write_text(dump(config))
    assert load(saved) == config and config.model.left_out == ("clip_qkv=8.0 (here: no clipping)",)


def test_what_is_not_known_is_named(tmp_path: Path) -> None:
    tree = OLMOE | {
        "embedding_multiplier": 12.0,
        "attention_bias": True,
        "use_mamba": False,
        "hidden_act": "gelu",
    }
    (line,) = left_out(compose([f"model={write(tmp_path / 'odd', tree)}"]).model)
    assert line == (
        "model odd is trained without what else its config.json has: hidden_act='gelu' (here: 'silu' or 'swish'); "
        "attention_bias=True (here: False); embedding_multiplier=12.0 (unknown key)"
    )


def test_a_model_of_text_and_images_is_read_as_its_text_model() -> None:
    inner = COMMON | {"model_type": "llama4_text", "num_local_experts": 8, "num_experts_per_tok": 1}
    tree = {
        "architectures": ["Llama4ForConditionalGeneration"],
        "text_config": inner,
        "vision_config": {"hidden_size": 7},
    }
    found = read(tree, "config.json", "x")
    assert (found.model.hidden, found.model.shared_width, found.model.router.score) == (64, 96, "sigmoid")
    assert str(found.differences[0]) == "vision_config (here: the text model alone)" and not found.unknown


PLACES: list[tuple[Tree, tuple[int, int, int], tuple[int, ...]]] = [
    (MAVERICK, (0, 2, 16384), tuple(range(1, 48, 2))),
    (MAVERICK | {"moe_layers": [*range(1, 48, 2)], "interleave_moe_layer_step": 1}, (0, 2, 16384), tuple(range(1, 48, 2))),
    (MAVERICK | {"interleave_moe_layer_step": 1}, (0, 1, 0), tuple(range(48))),
    (COMMON | QWEN_MOE | {"model_type": "qwen3_moe", "decoder_sparse_step": 2}, (0, 2, 96), (1, 3)),
    (COMMON | QWEN_MOE | {"model_type": "qwen3_moe", "decoder_sparse_step": 2, "mlp_only_layers": [0]}, (1, 2, 96), (1, 3)),
    (COMMON | QWEN_MOE | {"model_type": "qwen3_moe", "decoder_sparse_step": 2, "mlp_only_layers": [1]}, (3, 1, 96), (3,)),
    (COMMON | QWEN_MOE | {"model_type": "qwen3_moe", "mlp_only_layers": [2, 0]}, (0, 2, 96), (1, 3)),
    (COMMON | QWEN_MOE | {"model_type": "qwen3_moe", "mlp_only_layers": [1, 0]}, (2, 1, 96), (2, 3)),
]  # fmt: skip
"""Files, the fields that come of them (`dense_layers`, `moe_every`, `dense_width`), and the layers with experts."""


@pytest.mark.parametrize(("tree", "fields", "moe"), PLACES)
def test_dense_layers_lie_where_the_file_has_them(
    tree: Tree, fields: tuple[int, int, int], moe: tuple[int, ...]
) -> None:
    model = read(tree, "config.json", "x").model
    assert (model.dense_layers, model.moe_every, model.dense_width) == fields
    assert model.moe_layers == moe


def test_what_llama_4_maverick_has_besides_is_named() -> None:
    left = [str(one) for one in read(MAVERICK, "config.json", "x").differences]
    assert left == [
        "sigmoid weights on the experts' inputs (here: on their outputs)",
        "no_rope_layers (here: rotary positions in every layer)",
        "attention_chunk_size=8192 (here: full attention)",
        "attn_temperature_tuning=True (here: False or None)",
    ]


def test_layers_of_multi_token_prediction_are_those_of_the_file() -> None:
    tree = COMMON | LATENT | {"model_type": "deepseek_v3", "num_nextn_predict_layers": 1}
    assert read(tree, "config.json", "x").model.mtp_layers == 1
    assert read(tree, "config.json", "x", predictions=0).model.mtp_layers == 0


def test_size_and_plan_name_what_was_left_out(tmp_path: Path) -> None:
    file = write(tmp_path / "odd", OLMOE | {"clip_qkv": 8.0})
    line = "model odd is trained without what else its config.json has: clip_qkv=8.0 (here: no clipping)"
    assert line in plan(compose([f"model={file}"]), None).notes
    by_file, by_field = configured(["hardware=h100"], file), configured(["hardware=h100", f"model={file}"])
    assert by_file == by_field and by_file[1], "what is assumed of the training is the same"
    shown = " ".join(word for text in sized(answer(["hardware=h100"], file)) for word in text.split())
    assert line in shown
    assert plan(compose(["model=demo"]), None).notes == ()


MISSING: list[tuple[str, Tree, str, dict[str, Any]]] = [
    ("mixtral", {"num_local_experts": 8, "num_experts_per_tok": 2}, "num_key_value_heads", {"kv_heads": 8}),
    ("qwen3_moe", QWEN_MOE, "num_key_value_heads", {"kv_heads": 4}),
    ("qwen3", {}, "head_dim", {"head_dim": 128}),
    ("gpt_oss", {"num_local_experts": 8, "num_experts_per_tok": 2}, "head_dim", {"head_dim": 64}),
    ("mistral", {}, "sliding_window", {"window": 4096}),
    ("olmoe", {"num_experts": 8, "num_experts_per_tok": 2}, "num_key_value_heads", {"kv_heads": 16}),
    ("deepseek_v2", LATENT, "q_lora_rank", {"q_lora_rank": 1536}),
    ("deepseek_v2", LATENT | {"q_lora_rank": None}, "", {"q_lora_rank": 0}),
    ("deepseek_v3", LATENT | {"q_lora_rank": 32}, "n_shared_experts", {"shared_width": 40}),
]  # fmt: skip
"""`model_type`, settings, the key that is missing, and what the family's own class then has."""


@pytest.mark.parametrize(("family", "own", "missing", "fields"), MISSING)
def test_a_missing_key_is_what_the_familys_class_has(
    family: str, own: Tree, missing: str, fields: dict[str, Any]
) -> None:
    tree = COMMON | {"num_attention_heads": 16, "num_key_value_heads": 16} | own | {"model_type": family}
    tree.pop(missing, None)
    model = read(tree, "config.json", "x").model
    assert {name: getattr(model, name) for name in fields} == fields


def test_what_a_familys_class_has_without_being_asked_is_named() -> None:
    tree = COMMON | {"num_local_experts": 8, "num_experts_per_tok": 2}
    gpt, phi = (
        [str(one) for one in read(tree | {"model_type": kind}, "config.json", "x").differences]
        for kind in ("gpt_oss", "phimoe")
    )
    assert "sliding_window=128 in every second layer (here: full attention in all)" in gpt
    assert "router_jitter_noise=0.01 (here: 0.0)" in phi
    four = read(COMMON | LLAMA4 | {"model_type": "llama4"}, "config.json", "x").differences
    assert {"attention_chunk_size=8192", "attn_temperature_tuning=True"} <= {one.setting for one in four}


def test_settings_of_the_rotation_that_are_not_known_are_named() -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5, "mrope_section": [1, 2]}
    tree = OLMOE | {"rope_parameters": rope}
    left = [str(one) for one in read(tree, "config.json", "x").differences]
    assert left == [
        "partial_rotary_factor=0.5 (here: whole heads are rotated)",
        "rope_parameters: mrope_section=[1, 2] (here: the default)",
    ]
    for place in (
        {"rope_parameters": rope | {"partial_rotary_factor": 0.25}},
        {"partial_rotary_factor": 0.25},
        {},
    ):
        glm = read(COMMON | GLM | place | {"model_type": "glm4_moe"}, "config.json", "x")
        assert glm.model.rope_fraction == (0.25 if place else 0.5)


WRONG: list[tuple[Tree | str, str]] = [
    ({"model_type": "gemma3"}, "architecture 'gemma3' is not supported; write its shape as YAML"),
    ({"architectures": ["MixtralForCausal"]}, "did you mean 'MixtralForCausalLM'"),
    ({}, "architecture None is not supported"),
    ({"model_type": ["mixtral"]}, "architecture ['mixtral'] is not supported"),
    ({"model_type": {"text": "mixtral"}}, "architecture {'text': 'mixtral'} is not supported"),
    ("[1]", "holds a list; a config.json holds an object"),
    ("{", "not valid JSON"),
    ("[" * 50_000 + "]" * 50_000, "not valid JSON: nested too deeply"),
    (OLMOE | {"num_experts": None}, "has no num_local_experts; add it"),
    (OLMOE | {"hidden_size": "64"}, "hidden_size='64' is not a whole number"),
    (OLMOE | {"rms_norm_eps": "x"}, "rms_norm_eps='x' is not a number"),
    (OLMOE | {"num_key_value_heads": 3}, "model.heads=4 is not a multiple of model.kv_heads=3"),
    (OLMOE | {"num_experts_per_tok": 0}, "top_k"),
    # Layers are gone through one by one: a slip of the finger took all of a machine's memory.
    (COMMON | QWEN_MOE | {"model_type": "qwen3_moe", "num_hidden_layers": 4_800_000_000},
     "num_hidden_layers=4800000000 is above 100000; correct the file"),
    (OLMOE | {"num_nextn_predict_layers": 4_800_000_000}, "model.mtp_layers=4800000000: input should be less than"),
    (OLMOE | {"rope_scaling": "linear"}, "rope_scaling='linear' is not an object; correct the file"),
    (OLMOE | {"rope_parameters": [1]}, "rope_parameters=[1] is not an object"),
    (OLMOE | {"rope_scaling": {"type": "yarn"}}, "rope_scaling has no factor; add it"),
    (OLMOE | {"rope_scaling": {"type": "yarn", "factor": "2"}}, "rope_scaling: factor='2' is not a number"),
    (OLMOE | {"rope_parameters": {"rope_theta": "1e6"}}, "rope_parameters: rope_theta='1e6' is not a number"),
    (COMMON | LLAMA4 | {"model_type": "llama4", "no_rope_layers": 4}, "no_rope_layers=4 is not a list of whole numbers"),
    (
        COMMON | LATENT | {"model_type": "deepseek_v3", "v_head_dim": 8},
        "v_head_dim=8 isn't known here, 16 is",
    ),
    (
        COMMON | LATENT | {"model_type": "deepseek_v2", "moe_layer_freq": 2, "num_hidden_layers": 5},
        "first_k_dense_replace=1 with moe_layer_freq=2 gives experts to layers 2, 4 of 5, counted from 0; known are",
    ),
    (
        COMMON | QWEN_MOE | {"model_type": "qwen3_moe", "mlp_only_layers": [2]},
        "decoder_sparse_step=1 with mlp_only_layers=[2] gives experts to layers 0, 1, 3 of 4, counted from 0; known are",
    ),
    (
        COMMON | LLAMA4 | {"model_type": "llama4_text", "moe_layers": [*range(9), 10], "num_hidden_layers": 12},
        "gives experts to layers 0, 1, 2, 3, 4, 5, … of 12, counted from 0; known are leading dense layers",
    ),
    (COMMON | QWEN_MOE | {"model_type": "qwen3_moe", "decoder_sparse_step": 0}, "decoder_sparse_step=0 is not above 0"),
    (
        COMMON | LLAMA4 | {"model_type": "llama4", "moe_layers": ["1"]},
        "moe_layers=['1'] is not a list of whole numbers; correct the file",
    ),
    (
        COMMON | QWEN_MOE | {"model_type": "qwen3_moe", "decoder_sparse_step": 2, "intermediate_size": None},
        "has no intermediate_size; add it",
    ),
    *(
        (COMMON | QWEN_MOE | {"model_type": "qwen3_moe", name: value}, f"{name}={str(value)[:30]}")
        for name in ("rms_norm_eps", "head_dim", "num_experts_per_tok", "hidden_size", "rope_theta")
        for value in (10**400, -(10**400))
    ),
    (COMMON | GRANITE | {"hidden_size": 0}, "model.hidden=0"),
]  # fmt: skip


@pytest.mark.parametrize(("tree", "told"), WRONG, ids=lambda x: str(x)[:30])
def test_what_cannot_be_read_is_one_clear_line(tree: Tree | str, told: str, tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(tree if isinstance(tree, str) else json.dumps(tree))
    with pytest.raises(UserError) as error:
        compose([f"model={file}"])
    assert told in str(error.value) and str(file) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("typed", "told"),
    [
        (
            "model=./nowhere/config.json",
            "model=nowhere/config.json: No such file or directory; name a preset",
        ),
        ("model=./configs", "model=configs/config.json: No such file or directory; name a preset"),
        ("model=", "model= has no value; use one of deepseek_v3, demo, "),
        ("hardware=", "hardware= has no value; use one of a100, "),
        ("model=olmoe_1b", "did you mean 'olmoe_1b_7b'?); use one of"),
        ("model=unheard_of", "or the path of a Hugging Face config.json"),
        ("hardware=./h100.yaml", "hardware=./h100.yaml is not a preset"),
    ],
)
def test_a_path_that_leads_nowhere_is_refused(typed: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        compose([typed])
    assert told in str(error.value)


def test_the_nearest_field_is_one_of_the_section() -> None:
    with pytest.raises(UserError, match=r"^unknown field 'model.unheard_of'; model has model.name"):
        compose(["model.unheard_of=2"])
    with pytest.raises(UserError, match=r"did you mean 'model.layers'"):
        compose(["model.layer=2"])


def test_names_are_made_of_letters_that_a_run_id_may_have() -> None:
    assert name_of(Path("/a/Qwen3 30B (A3B)/config.json")) == "Qwen3_30B_A3B"
    assert name_of(Path("/a/dsv3.json")) == "dsv3"


def test_every_preset_with_a_published_file_is_what_its_file_says(tmp_path: Path) -> None:
    """The file of DeepSeek-V3, as far as a report of a user had it."""
    tree = {
        "architectures": ["DeepseekV3ForCausalLM"], "hidden_size": 7168, "intermediate_size": 18432,
        "moe_intermediate_size": 2048, "num_hidden_layers": 61, "num_attention_heads": 128, "num_key_value_heads": 128,
        "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8, "n_group": 8, "topk_group": 4,
        "first_k_dense_replace": 3, "kv_lora_rank": 512, "q_lora_rank": 1536, "qk_rope_head_dim": 64,
        "qk_nope_head_dim": 128, "v_head_dim": 128, "vocab_size": 129280, "tie_word_embeddings": False,
    }  # fmt: skip
    mine = model_section(write(tmp_path / "deepseek_v3", tree))
    preset = compose(["model=deepseek_v3"]).model.model_dump(mode="json")
    # Not in the file: what initialisation and balancing were in training.
    assert {key for key in preset if preset[key] != mine[key]} <= {"init_std"}, mine
    assert (ROOT / "configs" / "model" / "deepseek_v3.yaml").exists()
