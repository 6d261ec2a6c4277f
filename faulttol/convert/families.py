"""The names of published families' tensors, and where each lies in ours.

Sources: the files of mistralai/Mixtral-8x7B-v0.1, allenai/OLMoE-1B-7B-0924, Qwen/Qwen3-30B-A3B and deepseek-ai/DeepSeek-V3,
which `transformers` 5 turns into its own stacked tensors as it loads them (conversion_mapping.py).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from configs.model import ModelConfig
from faulttol.convert.hf_config import Family, family_of
from faulttol.convert.placed import DimOrder, PlacedTensor, part

_SPLIT = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}
_MIXTRAL = {"gate": "w1", "up": "w3", "down": "w2"}


def tensors(model: ModelConfig, interleaved: bool = True) -> list[PlacedTensor]:
    """All tensors of a model's published files.

    Args:
        interleaved: DeepSeek: whether channels 2j and 2j+1 are rotated together; else j and j + R/2, as in ours.

    Raises:
        UserError: where no family has such a model.
    """
    return list(_Names(model, family_of(model), interleaved).all())


class _Names:
    def __init__(self, model: ModelConfig, family: Family, interleaved: bool) -> None:
        self.model, self.family, self.interleaved = model, family, interleaved

    def all(self) -> Iterator[PlacedTensor]:
        m = self.model
        table = (m.vocab, m.hidden)
        yield part("model.embed_tokens.weight", table, "embedding.weight", table)
        for layer in range(m.layers):
            yield from self.block(f"blocks.{layer}", f"model.layers.{layer}", not m.is_moe(layer))
        yield from self.vector("model.norm.weight", "final_norm.weight", m.hidden)
        if not m.tie_embeddings:
            yield part("lm_head.weight", table, "head.weight", table)
        for depth in range(m.mtp_layers):
            yield from self.prediction(f"mtp.{depth}", f"model.layers.{m.layers + depth}")

    def vector(self, theirs: str, ours: str, width: int) -> Iterator[PlacedTensor]:
        yield part(theirs, (width,), ours, (width,))

    def matrix(
        self, theirs: str, ours: str, rows: int, columns: int, order: DimOrder | None = None
    ) -> Iterator[PlacedTensor]:
        yield replace(part(theirs, (rows, columns), ours, (rows, columns)), order=order)

    def prediction(self, ours: str, theirs: str) -> Iterator[PlacedTensor]:
        """DeepSeek's layer of multi-token prediction: its projection reads the token first, ours the hidden state."""
        D = self.model.hidden
        swapped = DimOrder(1, (*range(D, 2 * D), *range(D)))
        yield from self.vector(f"{theirs}.enorm.weight", f"{ours}.embedding_norm.weight", D)
        yield from self.vector(f"{theirs}.hnorm.weight", f"{ours}.hidden_norm.weight", D)
        yield from self.matrix(f"{theirs}.eh_proj.weight", f"{ours}.project.weight", D, 2 * D, swapped)
        yield from self.block(f"{ours}.block", theirs, dense=False)
        yield from self.vector(f"{theirs}.shared_head.norm.weight", f"{ours}.final_norm.weight", D)

    def block(self, ours: str, theirs: str, dense: bool) -> Iterator[PlacedTensor]:
        D = self.model.hidden
        yield from self.vector(f"{theirs}.input_layernorm.weight", f"{ours}.attention_norm.weight", D)
        attend = self.latent if self.model.attention == "mla" else self.grouped
        yield from attend(f"{ours}.attention", f"{theirs}.self_attn")
        yield from self.vector(f"{theirs}.post_attention_layernorm.weight", f"{ours}.feed_norm.weight", D)
        if dense:
            yield from self.feed(f"{ours}.feed", f"{theirs}.mlp", self.model.dense_width)
        else:
            yield from self.mixture(f"{ours}.feed", theirs)

    def grouped(self, ours: str, theirs: str) -> Iterator[PlacedTensor]:
        m = self.model
        query, key = m.heads * m.head_dim, m.kv_heads * m.head_dim
        yield from self.matrix(f"{theirs}.q_proj.weight", f"{ours}.query.weight", query, m.hidden)
        yield from self.matrix(f"{theirs}.k_proj.weight", f"{ours}.key.weight", key, m.hidden)
        yield from self.matrix(f"{theirs}.v_proj.weight", f"{ours}.value.weight", key, m.hidden)
        yield from self.matrix(f"{theirs}.o_proj.weight", f"{ours}.output.weight", m.hidden, query)
        if m.qk_norm != "none":
            widths = (m.head_dim, m.head_dim) if m.qk_norm == "head" else (query, key)
            yield from self.vector(f"{theirs}.q_norm.weight", f"{ours}.query_norm.weight", widths[0])
            yield from self.vector(f"{theirs}.k_norm.weight", f"{ours}.key_norm.weight", widths[1])

    def latent(self, ours: str, theirs: str) -> Iterator[PlacedTensor]:
        m = self.model
        rows = m.heads * (m.head_dim + m.rope_head_dim)
        if m.q_lora_rank:
            yield from self.matrix(
                f"{theirs}.q_a_proj.weight", f"{ours}.query_down.weight", m.q_lora_rank, m.hidden
            )
            yield from self.vector(
                f"{theirs}.q_a_layernorm.weight", f"{ours}.query_down_norm.weight", m.q_lora_rank
            )
            yield from self.matrix(
                f"{theirs}.q_b_proj.weight", f"{ours}.query_up.weight", rows, m.q_lora_rank, self.of_heads
            )
        else:
            yield from self.matrix(
                f"{theirs}.q_proj.weight", f"{ours}.query.weight", rows, m.hidden, self.of_heads
            )
        yield from self.matrix(
            f"{theirs}.kv_a_proj_with_mqa.weight", f"{ours}.key_value_down.weight",
            m.kv_lora_rank + m.rope_head_dim, m.hidden, self.of_keys,
        )  # fmt: skip
        yield from self.vector(
            f"{theirs}.kv_a_layernorm.weight", f"{ours}.key_value_norm.weight", m.kv_lora_rank
        )
        up = 2 * m.heads * m.head_dim
        yield from self.matrix(
            f"{theirs}.kv_b_proj.weight", f"{ours}.key_value_up.weight", up, m.kv_lora_rank
        )
        yield from self.matrix(
            f"{theirs}.o_proj.weight", f"{ours}.output.weight", m.hidden, m.heads * m.head_dim
        )

    @property
    def halves(self) -> list[int]:
        """DeepSeek rotates channels 2j and 2j+1 together, ours are j and j + R/2."""
        width = self.model.rope_head_dim
        return [*range(0, width, 2), *range(1, width, 2)]

    @property
    def of_heads(self) -> DimOrder | None:
        """The rotary rows of each head's query."""
        plain, width = self.model.head_dim, self.model.head_dim + self.model.rope_head_dim
        within = [*range(plain), *(plain + row for row in self.halves)]
        places = [head * width + row for head in range(self.model.heads) for row in within]
        return DimOrder(0, tuple(places)) if self.interleaved else None

    @property
    def of_keys(self) -> DimOrder | None:
        """The rotary rows of the key, behind the latent."""
        rank = self.model.kv_lora_rank
        places = [*range(rank), *(rank + row for row in self.halves)]
        return DimOrder(0, tuple(places)) if self.interleaved else None

    def feed(self, ours: str, theirs: str, width: int) -> Iterator[PlacedTensor]:
        D = self.model.hidden
        for mine, his in _SPLIT.items():
            rows, columns = (D, width) if mine == "down" else (width, D)
            yield from self.matrix(f"{theirs}.{his}.weight", f"{ours}.{mine}.weight", rows, columns)

    def mixture(self, ours: str, theirs: str) -> Iterator[PlacedTensor]:
        m = self.model
        D, E, F = m.hidden, m.experts, m.expert_width
        mixtral = self.family == "mixtral"
        place, names = (f"{theirs}.block_sparse_moe", _MIXTRAL) if mixtral else (f"{theirs}.mlp", _SPLIT)
        yield from self.matrix(f"{place}.gate.weight", f"{ours}.router.linear.weight", E, D)
        if self.family == "deepseek_v3":
            bias = part(f"{place}.gate.e_score_correction_bias", (E,), f"{ours}.router.bias", (E,))
            yield replace(bias, dtype="float32")
        for expert in range(E):
            there = f"{place}.experts.{expert}"
            for number, mine in enumerate(("gate", "up")):
                yield part(
                    f"{there}.{names[mine]}.weight", (F, D), f"{ours}.experts.gate_up", (E, 2, F, D),
                    (expert, number),
                )  # fmt: skip
            yield part(
                f"{there}.{names['down']}.weight", (D, F), f"{ours}.experts.down", (E, D, F), (expert,)
            )
        if m.shared_width:
            yield from self.feed(f"{ours}.shared", f"{place}.shared_experts", m.shared_width)
