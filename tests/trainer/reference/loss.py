"""Loss of a step and its derivatives."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

from configs.model import ModelConfig
from tests.trainer.reference.attention import ATTENTION, linear, rms_norm
from tests.trainer.reference.feed import inside, mixture, mlp
from tests.trainer.reference.names import is_buffer


@dataclass
class ReferenceSample:
    """Losses of one sample, and what its routers did."""

    cross_entropy: Tensor
    """Mean over the places."""
    logits: Tensor
    """[S, vocabulary]"""
    mtp: Tensor
    """Weighted loss of multi-token prediction."""
    aux: Tensor
    z: Tensor
    load: dict[str, list[int]]
    """Choices by expert, by the router's name (`blocks.3.feed.router`)."""
    dropped: int


@dataclass
class ReferenceStep:
    """Losses of all samples of a step, and the gradient."""

    cross_entropy: float
    aux: float
    z: float
    mtp: float
    total: float
    load: dict[str, list[int]]
    dropped: int
    norm: float
    """Of the whole gradient, before clipping."""
    gradients: dict[str, Tensor] = field(default_factory=dict)


def document_ids(inputs: list[int], separator: int | None) -> list[int]:
    """Document of each input token: how many separators stand before it. A separator is the last token of its document."""
    documents, seen = [], 0
    for token in inputs:
        documents.append(seen)
        if token == separator:
            seen += 1
    return documents


def cross_entropies(logits: Tensor, targets: list[int]) -> list[Tensor]:
    """Minus the log-probability of each place's target."""
    losses = []
    for row, target in zip(logits, targets, strict=True):
        largest = row.max().detach()
        losses.append(torch.log(torch.exp(row - largest).sum()) + largest - row[target])
    return losses


class Forward:
    """One sample's way through the model. Collects what its routers do."""

    def __init__(self, model: ModelConfig, state: dict[str, Tensor], documents: list[int]) -> None:
        self.model, self.state, self.documents = model, state, documents
        self.router_state: Tensor | None = None
        self.load: dict[str, list[int]] = {}
        self.dropped = 0
        self.aux: list[Tensor] = []
        self.z: list[Tensor] = []

    def residual(self, x: Tensor, y: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
        """`x` with a layer's output `y` added; ZAYA1 gives each of them a learned bias and scale first."""
        if not self.model.residual_scaling:
            return x + y
        x = (x + w[f"{name}.stream.bias"]) * w[f"{name}.stream.scale"]
        return x + (y + w[f"{name}.output.bias"]) * w[f"{name}.output.scale"]

    def feed(self, name: str, w: dict[str, Tensor], x: Tensor) -> Tensor:
        """The feed-forward part of the block called `name`."""
        if "experts.down" not in w:
            return mlp(self.model, w, x)
        routed = mixture(self.model, w, x, self.router_state)
        self.router_state = routed.state
        self.load[f"{name}.feed.router"] = routed.load
        self.dropped += routed.dropped
        self.aux.append(routed.aux)
        self.z.append(routed.z)
        return routed.output

    def block(self, name: str, x: Tensor) -> Tensor:
        """Attention and feed-forward, each on the normed stream and added to it."""
        model, w = self.model, inside(self.state, f"{name}.")
        normed = rms_norm(x, w["attention_norm.weight"], model.norm_eps)
        attended = ATTENTION[model.attention](model, inside(w, "attention."), normed, self.documents)
        if model.parallel_block:
            return self.residual(
                x, attended + self.feed(name, inside(w, "feed."), normed), w, "attention_residual"
            )
        x = self.residual(x, attended, w, "attention_residual")
        normed = rms_norm(x, w["feed_norm.weight"], model.norm_eps)
        return self.residual(x, self.feed(name, inside(w, "feed."), normed), w, "feed_residual")


def sample_losses(
    model: ModelConfig, state: dict[str, Tensor], tokens: list[int], separator: int | None
) -> ReferenceSample:
    """Losses of one sample of S + 1 tokens."""
    places = len(tokens) - 1
    table = state["embedding.weight"]
    head = table if model.tie_embeddings else state["head.weight"]
    forward = Forward(model, state, document_ids(tokens[:-1], separator))

    x = torch.stack([table[token] for token in tokens[:-1]])
    if model.residual_scaling:
        x = (x + state["input_scaling.bias"]) * state["input_scaling.scale"]
    for layer in range(model.layers):
        x = forward.block(f"blocks.{layer}", x)
    logits = linear(rms_norm(x, state["final_norm.weight"], model.norm_eps), head)
    cross_entropy = sum(cross_entropies(logits, tokens[1:])) / places

    depths = []
    for depth in range(1, model.mtp_layers + 1):
        name = f"mtp.{depth - 1}"
        w = inside(state, f"{name}.")
        ahead = [tokens[place + depth] if place + depth < len(tokens) else 0 for place in range(places)]
        joined = torch.cat(
            [
                rms_norm(x, w["hidden_norm.weight"], model.norm_eps),
                rms_norm(
                    torch.stack([table[token] for token in ahead]), w["embedding_norm.weight"], model.norm_eps
                ),
            ],
            dim=1,
        )
        forward.router_state = None  # a router of multi-token prediction begins its own average over depth
        x = forward.block(f"{name}.block", linear(joined, w["project.weight"]))
        depth_logits = linear(rms_norm(x, w["final_norm.weight"], model.norm_eps), head)
        valid = places - depth  # a place has a target while place + depth + 1 is a token of the sample
        losses = cross_entropies(depth_logits[:valid], tokens[depth + 1 :])
        depths.append(sum(losses) / valid)
    zero = torch.zeros((), dtype=x.dtype)
    mtp = model.mtp_coefficient * sum(depths) / len(depths) if depths else zero

    layers = len(forward.load) if model.router.losses_over_layers == "mean" and forward.load else 1
    aux, z = sum(forward.aux, zero) / layers, sum(forward.z, zero) / layers
    return ReferenceSample(cross_entropy, logits, mtp, aux, z, forward.load, forward.dropped)


def gradients(
    model: ModelConfig, state: dict[str, Tensor], samples: list[list[int]], separator: int | None = None
) -> ReferenceStep:
    """Mean losses over `samples`, each of S + 1 tokens, and the derivative of their sum by every parameter.

    Args:
        separator: token that ends a document, where attention stays within documents.
    """
    live = {
        name: tensor.detach().double().requires_grad_(not is_buffer(name)) for name, tensor in state.items()
    }
    parameters = {name: tensor for name, tensor in live.items() if tensor.requires_grad}
    total = {name: torch.zeros_like(tensor) for name, tensor in parameters.items()}
    step = ReferenceStep(0.0, 0.0, 0.0, 0.0, 0.0, {}, 0, 0.0)
    for tokens in samples:
        sample = sample_losses(model, live, tokens, separator)
        loss = (sample.cross_entropy + sample.mtp + sample.aux + sample.z) / len(samples)
        for name, part in zip(
            parameters, torch.autograd.grad(loss, list(parameters.values()), allow_unused=True), strict=True
        ):
            if part is not None:
                total[name] += part
        step.cross_entropy += sample.cross_entropy.item() / len(samples)
        step.mtp += sample.mtp.item() / len(samples)
        step.aux += sample.aux.item() / len(samples)
        step.z += sample.z.item() / len(samples)
        step.total += loss.item()
        step.dropped += sample.dropped
        for router, load in sample.load.items():
            before = step.load.get(router, [0] * len(load))
            step.load[router] = [a + b for a, b in zip(before, load, strict=True)]
    step.gradients = total
    step.norm = sum(float((part * part).sum()) for part in total.values()) ** 0.5
    return step
