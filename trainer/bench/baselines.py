"""What each baseline of the bench runs: a model or a layout that it would change in silence is refused by name."""

from __future__ import annotations

from collections.abc import Iterator

from configs.errors import UserError
from configs.model import ModelConfig, RouterConfig, YarnConfig
from configs.schema import RunConfig
from trainer.sizing.search.runnable import refusal

_FOLLOWED = frozenset({
    "name", "left_out", "init_std", "layers", "hidden", "heads", "kv_heads", "head_dim", "vocab", "experts", "top_k",
    "expert_width", "rope_theta", "norm_eps", "qk_norm", "router.renormalize",
})  # fmt: skip
"""Settings that both of another's models obey, or that don't change what is computed."""
_MUTE = frozenset({
    "dense_width", "q_lora_rank", "kv_lora_rank", "rope_head_dim", "mtp_coefficient", "router.hidden",
    "router.balance", "router.bias_rule", "router.bias_update_rate", "router.aux_coefficient", "router.z_coefficient",
    "router.losses_over_layers",
})  # fmt: skip
"""Without effect where all others have their defaults, and the router's losses and bias, which no baseline has: they add no
matmul to a step."""


def renormalizes(model: ModelConfig) -> bool:
    """Whether a token's weights are divided by their sum: one weight alone never is (`RouterConfig.renormalize`)."""
    return model.router.renormalize and model.top_k > 1


def check(baseline: str, config: RunConfig, world: int) -> None:
    """Before anything is measured.

    Raises:
        UserError: where the baseline doesn't run on so many ranks, has not what the model has, or not the layout.
    """
    if baseline == "deepspeed":
        train = config.train.model_copy(update={"engine": "deepspeed"})
        why = refusal(config.model_copy(update={"train": train}))
        if why:
            raise UserError(f"--baselines deepspeed: {why}")
        return
    if world > 1:
        raise UserError(f"--baselines {baseline} runs on one device; leave it out with --gpus {world}")
    lacking = list({"plain": _plain, "hf": _hugging_face}[baseline](config.model))
    if lacking:
        raise UserError(
            f"--baselines {baseline} would measure another model, without {', '.join(lacking)}; type --baselines "
            "none, or a model that it has, such as --model olmoe_1b_7b"
        )


def _plain(model: ModelConfig) -> Iterator[str]:
    yield from _beyond(model, _FOLLOWED)


def _hugging_face(model: ModelConfig) -> Iterator[str]:
    """Three architectures: OLMoE, Qwen3 and Mixtral, by `qk_norm` (see `trainer.bench.hugging_face`)."""
    yield from _beyond(model, _FOLLOWED | {"tie_embeddings"})
    if model.qk_norm == "projection" and model.heads * model.head_dim != model.hidden:
        yield f"model.head_dim={model.head_dim} (OLMoE's heads are model.hidden together)"
    if model.qk_norm == "none" and not renormalizes(model):
        one = "model.top_k=1" if model.router.renormalize else "model.router.renormalize=false"
        yield f"{one} (Mixtral's weights add up to 1)"


def _beyond(model: ModelConfig, followed: frozenset[str]) -> Iterator[str]:
    """Settings other than the default that aren't followed: one that is new to the schema is among them."""
    for prefix, section in (("", model), ("router.", model.router)):
        for name, field in type(section).model_fields.items():
            value = getattr(section, name)
            if prefix + name in followed | _MUTE or isinstance(value, RouterConfig):
                continue
            if isinstance(value, YarnConfig):
                if value.factor != 1:
                    yield f"model.yarn.factor={value.factor:g}"
            elif value != field.default:
                yield f"model.{prefix}{name}={str(value).lower() if isinstance(value, bool) else value}"
