"""What is trained and how: everything that memory and time depend on besides the hardware."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from configs.schema import ModelConfig
from trainer.sizing.model.layout import Layout

Recompute = Literal["none", "selective", "full"]
"""What the backward pass computes again: nothing, `Software.selective`, every layer."""
LENT = 1.05
"""Rows of the fullest rank over the mean once hot experts are lent (`trainer.parallel.lending`), from 1.04 on:
what whole experts leave."""


@dataclass(frozen=True)
class FrameworkMemory:
    """What a framework keeps in memory, from its code; the defaults are this trainer's model, on DeepSpeed's ZeRO."""

    norm_bytes: int = 4
    """Bytes of an element of a norm's input that is kept (this trainer's norms keep an fp32 copy)."""
    fused_activation: bool = False
    """One kernel makes a gated MLP's product, so that the activation's own result isn't kept."""
    fp32_router: bool = True
    """The router keeps an fp32 copy of its input."""
    expert_outputs: bool = True
    """Expert outputs are kept until the gradient of the routing weights; false: weighted before the last matmul."""
    logit_bytes: int = 12
    """Bytes of a logit and its copies at the fullest moment of the loss."""
    late_gradients: int = 0
    """Bytes of a weight's gradient that the backward pass leaves until its end, beside the accumulated one."""
    replica_buckets: int = 0
    """Bytes of a weight in reduction buckets that stay where there are replicas (torch's DistributedDataParallel)."""
    staging: float = 1e9
    """Bytes of a reduction buffer of fixed size during the backward pass (DeepSpeed: 5e8 elements of 2 bytes)."""
    update: tuple[int, int] = (0, 6)
    """Bytes that the optimizer step takes for a while under ZeRO, for each weight, and for each of the own shard (this
    trainer: the shard's gradient, flattened, in both precisions)."""
    late_moments: bool = False
    """Moments are made after the first backward pass, out of its freed memory, and break up its largest blocks."""
    gathered_inputs: bool = False
    """What is gathered for a tensor-parallel region, and attention's two pieces under `context=gather` beside what they are
    joined to, are kept (Megatron gathers again in the backward pass)."""
    copied_gradients: int = 0
    """Bytes of a matrix's gradient that the optimizer copies for all matrices at once, where it comes in 16 bits (Muon)."""
    scratch: float = 0.0
    """Bytes that the optimizer works in (Muon's bucket)."""
    convolved: tuple[int, int] = (4, 0)
    """Bytes of a channel of queries and keys that compressed attention keeps before its core, and more of a key's."""
    scaled: int = 0
    """Tensors of the hidden state's size that a scaled residual keeps."""
    router_vectors: int = 0
    """fp32 vectors of its width that an `mlp` router keeps, with matmuls in fp32 beside a copy of its input; 0: none."""
    whole_buffers: int = 2
    """Buffers of a micro-batch that isn't split over tp, kept for gathering under sequence parallelism."""
    deferred_frees: bool = False
    """What a collective has is not reused before it is done (torch's record_stream): a host that runs ahead piles it up."""
    host_waits: bool = False
    """The host waits for the device at each transfer between stages and never runs ahead."""
    host_slow: bool = False
    """On several nodes the host takes longer than the device, and is ahead only while that waits for other stages."""


@dataclass(frozen=True)
class Software:
    """What a training framework does, as its documentation and code say: facts, nothing that was fitted to a run."""

    name: str = "megaray"
    selective: Literal["attention", "feed_forward"] = "attention"
    """What selective recomputation computes again: the attention core (Korthikanti et al. 2022), or the MLP and experts."""
    flash_attention: bool = True
    """Attention keeps no score matrix."""
    sequence_parallel: bool = True
    """Under tp, activations between the tensor-parallel regions are split over the sequence."""
    overlap_dp: bool = False
    """Gradients are reduced while other layers go backward; under ZeRO-3 weights are gathered ahead as well."""
    overlap_gather: bool = False
    """Under ZeRO-1 and 2 the updated weights are gathered while the next step's first layers compute."""
    overlap_tp: bool = False
    overlap_ep: bool = False
    overlap_pp: bool = False
    gathered_experts: bool = False
    """Where a token goes to at least as many experts as an expert group has ranks, tokens are gathered over the group and
    the ranks' sums scattered, instead of sending each token to each of its experts."""
    lent_rows: int = 0
    """Where tokens are gathered inside a node, a rank whose experts got more rows lends those of at least so many to ranks
    that got fewer; 0: never."""
    shared_tokens: bool = False
    """Ranks with parts of the same experts (etp) share their tokens first, and each sends all of them to its experts
    (`trainer.parallel.expert`); otherwise each sends its own, and pairs are shared as they arrive (Megatron)."""
    node_dispatch: bool = False
    """A token goes once to each node of its experts, in eight bits under fp8, and is passed on inside it (DeepEP)."""
    context: Literal["ring", "gather", "ulysses"] = "ring"
    """How context-parallel ranks attend to the whole sample. `ring`: keys and values go round behind attention, again in
    the backward pass; `gather`: all of them are gathered before it, with nothing beside, and kept; `ulysses`: heads are
    exchanged for tokens, of queries, keys, values and results, with nothing beside (arXiv 2309.14509)."""
    joined_block: bool = False
    """A parallel block enters and leaves tensor parallelism once for attention and MLP together."""
    gradient_bytes: int = 4
    """Bytes of an accumulated gradient element."""
    reduce_bytes: int = 4
    """Bytes of a gradient element on the wire."""
    fsdp: bool = False
    """FSDP2, as the native engine uses it: fp32 weights that a rank shares with nobody are their own master. Gradients are
    made by the step's last backward pass while it frees activations, reduced as they are made where it is the only one,
    and freed after the update (`trainer.sizing.memory.backward_peak`). The last reduction and the
    first gather aren't overlapped."""
    counts_rows: bool = False
    """Under ep the host waits in each MoE layer for the number of rows, and so never runs far ahead of the device."""
    mlp_router: Literal["fp32"] | None = None
    """Precision of the matmuls of an `mlp` router; None: as all others."""
    square_pieces: bool = False
    """Under `context=gather` attention's two pieces aren't square, and tuned kernels take no others."""
    moments: tuple[int, int] = (8, 8)
    """Bytes of the optimizer's moments for one weight, and for one of a matrix between layers (Muon has fewer there)."""
    orthogonal_steps: int = 0
    """Newton-Schulz iterations on each matrix in each step, shared out over a stage's ranks (Muon)."""
    attention_share: float = 1.0
    """Rate of its fused attention over that of FlashAttention 2, or of `tuned_attention`."""
    causal_flops: bool = True
    """The attention kernel skips the masked half."""
    compiled: bool = False
    """Elementwise work between the matmuls is fused."""
    eager: bool = False
    """All is torch's own kernels, one for each operation, norms and the router in fp32, and experts' results are weighted
    by a batched matmul for each token, as in `trainer.model`."""
    kernels: bool = False
    """In bf16 on a GPU one kernel each does what `eager` takes several for: norm and residual sum, rotation, activation,
    rows to experts and back, loss, optimizer (`trainer.kernels`)."""
    fresh_gradients: bool = False
    """Gradients are new tensors in each step, so that none are set to zero."""
    fused_projections: bool = False
    """Queries, keys and values are one matmul, and so are gate and up of a dense layer."""
    tuned_attention: bool = False
    """Attention kernels are those made for the device's generation (cuDNN, FlashAttention 3), not FlashAttention 2."""
    fused_accumulation: bool = False
    """A weight's gradient is added to the accumulated one inside the matmul, not by a kernel of its own."""
    fused_loss: bool = False
    """The loss is computed without copies of the logits in fp32."""
    dropout: bool = False
    """Dropout after attention and MLP, and on attention scores where they are kept."""
    split_messages: bool = False
    """A tp rank sends its share of a micro-batch to the next stage, which gathers it (as under sequence parallelism)."""
    balanced_stages: bool = False
    """Stages are cut by the cost of their blocks, output projection included; otherwise by their number of layers."""
    bucket_bytes: int = 0
    """Bytes of a gradient bucket on the wire; 0: as few as there are layers."""
    retention: FrameworkMemory = field(default_factory=FrameworkMemory)
    """What stays in memory."""
    sources: tuple[str, ...] = ()


@dataclass(frozen=True)
class TrainingJob:
    """One training set-up."""

    model: ModelConfig
    layout: Layout
    sequence: int
    """Tokens of a sample."""
    micro_batch: int
    """Samples of one forward pass on a data-parallel rank."""
    global_batch: int
    """Samples of a step over all ranks."""
    precision: str = "bf16"
    """Of the matmuls: `bf16`, `fp8` or `fp32`."""
    zero: int = 0
    """ZeRO stage, 0 to 3: what is split over the data-parallel ranks (optimizer, gradients, weights)."""
    recompute: Recompute = "none"
    interleave: int = 1
    """Model chunks of each pipeline stage (virtual pipeline size)."""
    zero_bubble: bool = False
    """The two chunks of a rank lie in a V, and weight gradients fill the bubble (ZB-V, arXiv 2401.10241)."""
    imbalance: float = 1.0
    """Rows of the most loaded expert rank over the mean, where ranks have different experts (`fullest`)."""
    folded: bool = True
    """Expert groups divide all ranks of a stage, tensor-parallel ones among them; false: out of dp and cp only,
    as before MoE Parallel Folding (arXiv 2504.14960), so that neighbours in one are tp * cp ranks apart."""
    node: int = 8
    """Ranks of a node."""
    software: Software = field(default_factory=Software)

    @property
    def expert_stride(self) -> int:
        """Ranks from one of an expert group to the next, by their numbers."""
        return self.layout.etp if self.folded else self.layout.tp * self.layout.cp

    @property
    def micro_batches(self) -> int:
        """Forward passes of a step on one rank."""
        return self.global_batch // (self.micro_batch * self.layout.dp)

    @property
    def accumulates(self) -> bool:
        """Whether gradients of several micro-batches are added up."""
        return self.micro_batches > 1 or self.layout.pp > 1

    @property
    def gathers_experts(self) -> bool:
        """Whether tokens are gathered and summed over ep instead of sent to each of their experts: fewer bytes."""
        layout = self.layout
        return self.software.gathered_experts and layout.etp == 1 and 1 < layout.ep <= self.model.top_k

    @property
    def lends(self) -> bool:
        """Whether hot experts are lent: those of the fullest rank, which have more rows than others, are worth it."""
        software, layout = self.software, self.layout
        inside = min(self.node, layout.ranks) % layout.ep == 0  # no expert group lies in two nodes
        if not (software.lent_rows and self.gathers_experts and inside) or self.zero_bubble:
            return False
        hot = self.tokens * layout.ep / layout.tp * self.model.top_k / self.model.experts * self.imbalance
        return hot >= software.lent_rows and self.imbalance > LENT

    @property
    def gathers_context(self) -> bool:
        """Whether keys and values of all context-parallel ranks are gathered before attention."""
        return self.layout.cp > 1 and self.software.context == "gather"

    @property
    def fullest(self) -> float:
        """Rows of the fullest rank over the mean: ranks that have all experts get a row for each token and choice."""
        if self.layout.ep == 1:
            return 1.0
        return LENT if self.lends else self.imbalance

    @property
    def tokens(self) -> int:
        """Tokens of one micro-batch on one context-parallel rank."""
        return self.micro_batch * self.sequence // self.layout.cp

    @property
    def element(self) -> int:
        """Bytes of an activation or weight; frameworks differ in whether they keep those in eight bits."""
        return 4 if self.precision == "fp32" else 2

    @property
    def split(self) -> int:
        """Ranks that share what is neither split over heads nor over widths."""
        return self.layout.tp if self.software.sequence_parallel else 1
