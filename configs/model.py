"""The shape of a model: attention, experts, router, positions."""

from __future__ import annotations

from functools import lru_cache
from typing import Annotated, Any, Literal, Self

from pydantic import BeforeValidator, Field, model_validator

from configs.section import AsWords, Fraction, NonNegative, Positive, Section

MOST_PARTS = 100_000
"""Of layers, and of experts in one: estimates go through them, and none has been built of a hundredth."""


def _norm_kind(value: Any) -> Any:
    """`true` and `false`, which files of earlier versions hold, as the kinds they meant."""
    return (
        {"true": "head", "false": "none"}.get(str(value).lower(), value)
        if isinstance(value, bool | str)
        else value
    )


class RouterConfig(Section):
    """How tokens choose experts, and what keeps the experts' loads even."""

    kind: Literal["linear", "mlp"] = "linear"
    """`linear`: one matrix; `mlp`: ZAYA1's down-projection, average over depth and three-layer MLP."""
    hidden: Positive = 256
    """Width of the `mlp` router."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Function from router logits to expert scores."""
    renormalize: bool = True
    """Divide the chosen experts' scores by their sum, so that the weights of a token add up to `scale`. Has no effect with
    `top_k=1`, where it would make every weight 1 and the router would never learn."""
    scale: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the combined expert output (DeepSeek-V3 uses 2.5)."""
    groups: Positive = 1
    """Groups that the experts are divided into; a token chooses among the experts of its best `top_groups` groups."""
    top_groups: Positive = 1
    """Groups that a token may choose experts from (DeepSeek-V3 section 2.1.2: 4 of 8)."""
    balance: Literal["bias", "aux", "both", "none"] = "bias"
    """`bias`: aux-loss-free, a per-expert bias on the choice only; `aux`: auxiliary loss; `both`, as DeepSeek-V3."""
    bias_rule: Literal["sign", "load_error"] = "sign"
    """`sign`: a step of fixed size towards even load (DeepSeek-V3); `load_error`: AdamW on the load error (ZAYA1)."""
    bias_update_rate: Annotated[float, Field(ge=0)] | None = None
    """Step of the balancing bias after each training step; auto: 0.2 % of the mean score, which is DeepSeek-V3's 0.001
    for sigmoid scores and 0.002/experts for softmax."""
    aux_coefficient: Annotated[float, Field(ge=0)] = 1e-2
    """Weight of the auxiliary loss under `aux` and `both`."""
    z_coefficient: Annotated[float, Field(ge=0)] = 0.0
    """Weight of the router z-loss: the mean square of the logits' log-sum-exp (ST-MoE, equation 5)."""
    losses_over_layers: Literal["sum", "mean"] = "sum"
    """Whether the auxiliary losses of the layers are added (Megatron, DeepSeek) or averaged (MegaBlocks, so OLMoE)."""
    capacity_factor: Annotated[float, Field(gt=0)] | None = None
    """Expert capacity per sample, as a multiple of the even share; tokens beyond it are dropped and counted. None: nothing
    is dropped."""

    def bias_rate(self, experts: int) -> float:
        """Step of the balancing bias, with the automatic value worked out."""
        if self.bias_update_rate is not None:
            return self.bias_update_rate
        return 1e-3 if self.score == "sigmoid" or self.bias_rule == "load_error" else 2e-3 / experts


class YarnConfig(Section):
    """YaRN: rotary frequencies stretched for a longer context (Peng et al. 2023)."""

    factor: Annotated[float, Field(ge=1)] = 1.0
    """New context over the original one; 1 turns it off."""
    original: Positive = 4096
    """Context that the model was first trained on, in tokens."""
    beta_fast: Annotated[float, Field(gt=0)] = 32.0
    """Turns within the original context above which a frequency is kept."""
    beta_slow: Annotated[float, Field(gt=0)] = 1.0
    """Turns within the original context below which a frequency is divided by `factor`."""


def has_experts(layer: int, leading: int, every: int) -> bool:
    """The rule of Llama 4 (`moe_layers`) and of Qwen (`decoder_sparse_step`), after so many leading dense layers."""
    return layer >= leading and (layer + 1) % every == 0


@lru_cache(maxsize=1024)
def _moe_layers(layers: int, leading: int, every: int) -> tuple[int, ...]:
    return tuple(layer for layer in range(layers) if has_experts(layer, leading, every))


class ModelConfig(Section):
    """Shape of a decoder-only mixture-of-experts model."""

    name: str
    """Preset name, shown in tables and used in run ids."""
    layers: Annotated[int, Field(gt=0, le=MOST_PARTS)]
    """Transformer blocks."""
    hidden: Positive
    """Model width."""
    heads: Positive
    """Query heads."""
    kv_heads: Positive
    """Key/value heads; `heads` must be a multiple (grouped-query attention)."""
    head_dim: Positive
    """Width of one head."""
    vocab: Positive
    """Rows of the embedding table."""
    experts: Annotated[int, Field(gt=0, le=MOST_PARTS)]
    """Routed experts per MoE layer."""
    top_k: Positive
    """Experts that each token goes to."""
    expert_width: Positive
    """Inner width of a routed SwiGLU expert."""
    shared_width: NonNegative = 0
    """Inner width of the shared expert that sees every token; 0 for none."""
    dense_layers: NonNegative = 0
    """Leading layers with a dense SwiGLU instead of experts."""
    moe_every: Positive = 1
    """After those, only layers whose number in the whole model, counted from 1, is a multiple of it have experts (Llama 4
    Maverick: 2). The others are dense."""
    dense_width: NonNegative = 0
    """Inner width of the dense layers."""
    gated: bool = True
    """MLPs and experts are SwiGLU (gate, up, down); false: two matrices and GELU."""
    attention: Literal["gqa", "mla", "cca"] = "gqa"
    """`gqa`: grouped queries; `mla`: latent keys and values (DeepSeek); `cca`: compressed and convolved (ZAYA1)."""
    q_lora_rank: NonNegative = 0
    """MLA: rank of the query compression; 0 for none."""
    kv_lora_rank: NonNegative = 0
    """MLA: rank of the key/value compression."""
    rope_head_dim: NonNegative = 0
    """MLA: width of the decoupled rotary part of a head; `head_dim` is the part without position."""
    window: NonNegative = 0
    """Tokens that a query sees, itself among them (sliding window, MegaScale section 3.1); 0 for all before it."""
    parallel_block: bool = False
    """Attention and feed-forward read the same normed input and are added together (MegaScale section 3.1)."""
    residual_scaling: bool = False
    """Learned scale and bias vectors on each residual and layer output (ZAYA1)."""
    qk_norm: Annotated[Literal["none", "head", "projection"], BeforeValidator(_norm_kind)] = "none"
    """RMSNorm on queries and keys: of each head (Qwen3), or of the whole projection (OLMoE)."""
    rope_theta: Annotated[float, Field(gt=0)] = 10_000.0
    """Base of the rotary position frequencies."""
    rope_fraction: Annotated[Fraction, Field(gt=0)] = 1.0
    """Share of a head's width that is rotated, its first part (ZAYA1: 0.5)."""
    yarn: YarnConfig = YarnConfig()
    """Stretching of the rotary frequencies."""
    mtp_layers: Annotated[int, Field(ge=0, le=MOST_PARTS)] = 0
    """Multi-token prediction: extra blocks that predict the tokens after the next (DeepSeek-V3 section 2.2)."""
    mtp_coefficient: Annotated[float, Field(ge=0)] = 0.3
    """Weight of their mean loss."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Epsilon of every RMSNorm."""
    tie_embeddings: bool = False
    """Use the embedding table as the output projection."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the initial weights; output projections are scaled by 1/sqrt(2*layers)."""
    router: RouterConfig = RouterConfig()
    """Routing and balancing."""
    left_out: Annotated[tuple[str, ...], AsWords] = ()
    """What the model's `config.json` has and this trainer lacks; the plan and `size` name it. Empty for presets."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.heads % self.kv_heads:
            raise ValueError(
                f"model.heads={self.heads} is not a multiple of model.kv_heads={self.kv_heads}; "
                "grouped-query attention shares each key/value head among equally many query heads"
            )
        if self.top_k > self.experts:
            raise ValueError(
                f"model.top_k={self.top_k} is more than model.experts={self.experts}; "
                f"set model.top_k to at most {self.experts}"
            )
        if self.head_dim % 2:
            raise ValueError(f"model.head_dim={self.head_dim} is odd; rotary position needs an even width")
        if round(self.head_dim * self.rope_fraction) % 2 or round(self.head_dim * self.rope_fraction) < 2:
            raise ValueError(
                f"model.rope_fraction={self.rope_fraction} rotates {self.head_dim * self.rope_fraction:g} of "
                f"model.head_dim={self.head_dim}; choose a fraction that gives an even number of 2 or more"
            )
        if self.attention == "mla" and not (self.kv_lora_rank and self.rope_head_dim):
            raise ValueError(
                f"model.attention=mla with model.kv_lora_rank={self.kv_lora_rank} and "
                f"model.rope_head_dim={self.rope_head_dim}, which must be above 0; set both, as in model=deepseek_v3"
            )
        if self.attention == "mla" and self.rope_head_dim % 2:
            raise ValueError(
                f"model.rope_head_dim={self.rope_head_dim} is odd; rotary position needs an even width"
            )
        if self.attention != "gqa" and self.qk_norm != "none":
            raise ValueError(
                f"model.qk_norm={self.qk_norm} acts on grouped queries alone, and model.attention={self.attention}; "
                "type model.qk_norm=none"
            )
        if self.attention == "mla" and self.rope_fraction != 1:
            raise ValueError(
                f"model.rope_fraction={self.rope_fraction} has no meaning under model.attention=mla, which rotates "
                "model.rope_head_dim; type model.rope_fraction=1"
            )
        self._check_layers()
        self._check_groups()
        return self

    def is_moe(self, layer: int) -> bool:
        """Whether a layer has experts, counted from 0; those of multi-token prediction, which count on from the last
        layer, all have."""
        return layer >= self.layers or has_experts(layer, self.dense_layers, self.moe_every)

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Layers with experts, ascending; without multi-token prediction."""
        return _moe_layers(self.layers, self.dense_layers, self.moe_every)

    @property
    def router_layers(self) -> tuple[int, ...]:
        """Layers that have a router, ascending, those of multi-token prediction at the end: the rows of expert loads."""
        return self.moe_layers + tuple(range(self.layers, self.layers + self.mtp_layers))

    def _check_layers(self) -> None:
        if self.dense_layers > self.layers:
            raise ValueError(
                f"model.dense_layers={self.dense_layers} is more than model.layers={self.layers}; "
                f"set it to at most {self.layers}"
            )
        if self.moe_every > 1 and not self.moe_layers:
            raise ValueError(
                f"model.moe_every={self.moe_every} leaves no layer with experts: no multiple of it is above "
                f"model.dense_layers={self.dense_layers} and at most model.layers={self.layers}; type model.moe_every=1"
            )
        dense = [str(layer) for layer in range(self.layers) if not self.is_moe(layer)]
        if dense and not self.dense_width:
            field = "dense_layers" if self.dense_layers else "moe_every"
            shown = ", ".join(dense[:3]) + (", …" if len(dense) > 3 else "")
            raise ValueError(
                f"model.dense_width=0, but model.{field}={getattr(self, field)} makes layers dense ({shown}); "
                "set model.dense_width"
            )

    def _check_groups(self) -> None:
        router = self.router
        if self.experts % router.groups:
            raise ValueError(
                f"model.router.groups={router.groups} does not divide model.experts={self.experts}; use one of "
                + ", ".join(str(d) for d in range(1, self.experts + 1) if self.experts % d == 0)
            )
        if router.top_groups > router.groups:
            raise ValueError(
                f"model.router.top_groups={router.top_groups} is more than model.router.groups={router.groups}; "
                f"set it to at most {router.groups}"
            )
        if self.top_k > self.experts // router.groups * router.top_groups:
            raise ValueError(
                f"model.top_k={self.top_k} is more than the {self.experts // router.groups * router.top_groups} experts of "
                f"model.router.top_groups={router.top_groups} groups; raise model.router.top_groups"
            )
