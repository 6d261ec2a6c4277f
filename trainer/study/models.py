"""Shapes of the models in published tables, from their papers and `config.json` files, and the devices that they ran on.

What a row prints of its model takes precedence; this says what tables leave out.
"""

from __future__ import annotations

import re
from functools import lru_cache
from typing import Any

from pydantic import ValidationError

from configs.compose import compose
from configs.hardware import HardwareConfig
from configs.schema import ModelConfig
from trainer.study.cases import Row, whole

Shape = dict[str, Any]


def _dense(layers: int, hidden: int, heads: int, kv_heads: int, width: int, vocab: int, **more: Any) -> Shape:
    """A dense model; `more`: what differs from SwiGLU with an output projection of its own."""
    return {"layers": layers, "hidden": hidden, "heads": heads, "kv_heads": kv_heads, "dense_width": width,
            "dense_layers": layers, "vocab": vocab, "experts": 1, "top_k": 1, "expert_width": width} | more  # fmt: skip


def _moe(
    layers: int,
    hidden: int,
    heads: int,
    kv_heads: int,
    vocab: int,
    experts: tuple[int, int, int],
    **more: Any,
) -> Shape:
    """A mixture of experts: their number, how many a token goes to, and their width."""
    return {"layers": layers, "hidden": hidden, "heads": heads, "kv_heads": kv_heads, "vocab": vocab,
            "experts": experts[0], "top_k": experts[1], "expert_width": experts[2]} | more  # fmt: skip


_MLA = {"attention": "mla", "q_lora_rank": 1536, "kv_lora_rank": 512, "rope_head_dim": 64, "head_dim": 128}
_GPT = {"gated": False}
_MPT = {"gated": False, "tie_embeddings": True}

KNOWN: dict[str, Shape] = {
    "Llama2-7B": _dense(32, 4096, 32, 32, 11008, 32000),
    "Llama2-13B": _dense(40, 5120, 40, 40, 13824, 32000),
    "Llama2-70B": _dense(80, 8192, 64, 8, 28672, 32000),
    "Llama3-8B": _dense(32, 4096, 32, 8, 14336, 128256),
    "Llama3.1-8B": _dense(32, 4096, 32, 8, 14336, 128256),
    "Llama3-13B": _dense(40, 5120, 40, 8, 17920, 128256),  # not printed: the width that gives its 14.84 B parameters
    "Llama3-70B": _dense(80, 8192, 64, 8, 28672, 128256),
    "Llama3.1-70B": _dense(80, 8192, 64, 8, 28672, 128256),
    "Llama3.1-405B": _dense(126, 16384, 128, 8, 53248, 128256),
    "GPT3-5B": _dense(24, 4096, 32, 32, 16384, 51200, **_GPT),
    "GPT3-20B": _dense(44, 6144, 48, 48, 24576, 51200, **_GPT),
    "GPT3-175B": _dense(96, 12288, 96, 96, 49152, 51200, **_GPT),
    "GPT-NeoX-20B": _dense(44, 6144, 64, 64, 24576, 50432, **_GPT),
    "Nemotron4-15B": _dense(32, 6144, 48, 8, 24576, 256000, **_GPT),
    "Nemotron4-340B": _dense(96, 18432, 96, 8, 73728, 256000, **_GPT),
    "Nemotron-340B": _dense(96, 18432, 96, 8, 73728, 256000, **_GPT),
    "MPT-350m": _dense(24, 1024, 16, 16, 4096, 50368, **_MPT),
    "MPT-1b": _dense(24, 2048, 16, 16, 8192, 50368, **_MPT),
    "MPT-3b": _dense(32, 2560, 20, 20, 10240, 50368, **_MPT),
    "MPT-7b": _dense(32, 4096, 32, 32, 16384, 50368, **_MPT),
    "MPT-13b": _dense(40, 5120, 40, 40, 20480, 50368, **_MPT),
    "MPT-30b": _dense(48, 7168, 56, 56, 28672, 50368, **_MPT),
    "MPT-70b": _dense(80, 8192, 64, 64, 32768, 50368, **_MPT),
    "Mixtral-8x7B": _moe(32, 4096, 32, 8, 32000, (8, 2, 14336)),
    "Mixtral-8x22B": _moe(56, 6144, 48, 8, 32768, (8, 2, 16384)),
    "Mixtral-8x22B-G8T8": _moe(56, 6144, 48, 8, 32768, (64, 8, 2048)),  # cut in eight, arXiv 2504.14960 section 4.1
    "Llama3-8x70B": _moe(80, 8192, 64, 8, 128256, (8, 2, 28672)),  # eight copies of Llama 3 70B's MLP, same
    "Qwen2-57B-A14B": _moe(28, 3584, 28, 4, 151936, (64, 8, 2560), shared_width=20480),
    "Qwen3-30B-A3B": _moe(48, 2048, 32, 4, 151936, (128, 8, 768), head_dim=128),
    "Qwen3-235B-A22B": _moe(94, 4096, 64, 4, 151936, (128, 8, 1536), head_dim=128),
    "GPT-OSS-20B": _moe(24, 2880, 64, 8, 201088, (32, 4, 2880), head_dim=64),
    "GPT-OSS-120B": _moe(36, 2880, 64, 8, 201088, (128, 4, 2880), head_dim=64),
    "DeepSeek-V2": _moe(60, 5120, 128, 128, 102400, (160, 6, 1536), shared_width=3072, dense_layers=1,
                        dense_width=12288, **_MLA),
    "DeepSeek-V2-Lite": _moe(27, 2048, 16, 16, 102400, (64, 6, 1408), shared_width=2816, dense_layers=1,
                             dense_width=10944, **(_MLA | {"q_lora_rank": 0})),
    "DeepSeek-V3": _moe(61, 7168, 128, 128, 129280, (256, 8, 2048), shared_width=2048, dense_layers=3,
                        dense_width=18432, **_MLA),
    "DeepSeek-V3-16B": _moe(27, 2048, 16, 16, 102400, (64, 6, 1408), shared_width=2816, dense_layers=1,
                            dense_width=10944, **(_MLA | {"q_lora_rank": 0})),
    "Kimi-K2": _moe(61, 7168, 64, 64, 163840, (384, 8, 2048), shared_width=2048, dense_layers=1, dense_width=18432,
                    **_MLA),
    "Llama4-Scout": _moe(48, 5120, 40, 8, 202048, (16, 1, 8192), shared_width=8192, head_dim=128),
    "Llama4-Maverick": _moe(48, 5120, 40, 8, 202048, (128, 1, 8192), shared_width=8192, head_dim=128,
                            moe_every=2, dense_width=16384),
    "DBRX": _moe(40, 6144, 48, 8, 100352, (16, 4, 10752)),
    "Grok-1": _moe(64, 6144, 48, 8, 131072, (8, 2, 32768)),
    "Phi-3.5-MoE": _moe(32, 4096, 32, 8, 32064, (16, 2, 6400)),
    "OLMoE-1B-7B": _moe(16, 2048, 16, 16, 50304, (64, 8, 1024)),
    "352B": _moe(60, 4096, 32, 8, 65536, (32, 3, 14336)),  # MegaScale-MoE, arXiv 2505.11432 section 6; rows print the sizes
}  # fmt: skip
HYBRID = ("nemotron3nano", "nemotron3super", "qwen3next", "mamba", "jamba")
"""Models with layers that aren't attention, which sizing has no time for."""


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())


@lru_cache
def known(name: str) -> Shape | None:
    """The shape of a name that is in a table's words; the longest that it contains."""
    names = [key for key in KNOWN if _plain(key) in _plain(name)]
    return KNOWN[max(names, key=len)] if names else None


@lru_cache
def shape(name: str, printed: tuple[tuple[str, int], ...]) -> ModelConfig | None:
    """A model by its name and the sizes that its row prints; None where they don't make one."""
    sizes, base = dict(printed), known(name)
    width = sizes.pop("ffn", None)
    if base is None:
        if width is None or not {"layers", "hidden", "heads", "vocab"} <= set(sizes):
            return None
        base = _dense(
            sizes["layers"], sizes["hidden"], sizes["heads"], sizes["heads"], width, sizes["vocab"], **_GPT
        )
    dense = base["experts"] == 1
    made = base | sizes
    if width:
        made |= {"expert_width": width} | ({"dense_width": width} if dense else {})
    if dense:
        made["dense_layers"] = made["layers"]
    if base["kv_heads"] == base["heads"]:
        made["kv_heads"] = made["heads"]
    made.setdefault("head_dim", made["hidden"] // made["heads"])
    try:
        return ModelConfig.model_validate({"name": name} | made)
    except ValidationError:
        return None


def model(row: Row) -> ModelConfig | str:
    """The row's model, or why there is none."""
    name = f"MPT-{row['model']}" if row.get("block") == "llmfoundry" else row["model"]
    if any(word in _plain(name) for word in HYBRID):
        return f"{row['model']} has state-space layers, which aren't modelled"
    columns = ("layers", "hidden", "heads", "ffn", "vocab")
    shaped = shape(name, tuple((c, size) for c in columns if (size := whole(row, c))))
    return shaped or f"the shape of {row['model']} is neither printed in full nor on record"


PRESETS = (
    "gb300", "gb200", "b300", "b200", "h200", "h800", "h100", "a100", "mi355x", "mi325x", "mi300x", "mi250x",
)  # fmt: skip
"""Of the catalogue, the longer names first."""
UNITS = 148
"""Compute units of a B200, which its relatives are taken to have where the catalogue doesn't say."""
RACK = 64
"""Devices of an NVL72 rack that jobs use: all are in one NVLink domain, which is a node for forecasts."""


@lru_cache
def device(name: str) -> HardwareConfig | str:
    """The catalogue's device of a table's words, as that table had it, or why there is none."""
    catalogued = next((preset for preset in PRESETS if preset in name.lower()), None)
    if catalogued is None:
        return f"{name or 'the device'} isn't in the catalogue"
    hardware = compose([f"hardware={catalogued}"]).hardware
    changes: dict[str, Any] = {}
    if catalogued == "a100" and "40" in name:  # HBM2 of 1,555 GB/s, by NVIDIA's datasheet
        changes = {"memory_gib": 40.0, "memory_gbps": 1555.0, "memory_achieved_gbps": None}
    # HBM2e, as torchtitan's paper describes its devices (arXiv 2410.06511)
    if catalogued == "h100" and "96" in name:
        changes = {"memory_gib": 94.0, "memory_gbps": 2400.0, "memory_achieved_gbps": None}
    if catalogued.startswith(("b", "gb")) and hardware.compute_units is None:
        changes["compute_units"] = UNITS
    if catalogued.startswith("gb"):
        changes |= {"devices_per_node": RACK, "nic": hardware.nic.model_copy(update={"per_node": RACK})}
    per_node = re.search(r"\((\d+)/node\)", name)
    if per_node:
        count = int(per_node[1])
        changes |= {"devices_per_node": count, "nic": hardware.nic.model_copy(update={"per_node": count})}
    return hardware.model_copy(update=changes)
