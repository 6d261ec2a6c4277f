"""The one configuration schema of a run.

Hydra composes YAML and overrides into a plain tree (`configs.compose`); this module turns the tree into a
frozen, typed `RunConfig`, and past that point no dictionary travels. `None` in a field whose text says
"auto" means that `trainer.sizing.planner` fills it in and prints the value with its reason.
"""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from configs.fabric import CollectivesConfig, NetworkConfig
from configs.hardware import HardwareConfig as HardwareConfig
from configs.section import Fraction, NonNegative, Positive, Section
from configs.timeouts import Timeouts

Precision = Literal["fp32", "bf16"]


class RouterConfig(Section):
    """How tokens choose experts, and what keeps the experts' loads even."""

    kind: Literal["linear", "mlp"] = "linear"
    """`linear`: one matrix; `mlp`: ZAYA1's down-projection and three-layer MLP (counted by sizing only)."""
    hidden: Positive = 256
    """Width of the `mlp` router."""
    score: Literal["softmax", "sigmoid"] = "softmax"
    """Function from router logits to expert scores."""
    renormalize: bool = True
    """Divide the chosen experts' scores by their sum, so that the weights of a token add up to `scale`."""
    scale: Annotated[float, Field(gt=0)] = 1.0
    """Factor on the combined expert output (DeepSeek-V3 uses 2.5)."""
    balance: Literal["bias", "aux", "none"] = "bias"
    """`bias`: aux-loss-free, a per-expert bias on the choice only; `aux`: Switch-style auxiliary loss."""
    bias_update_rate: Annotated[float, Field(ge=0)] = 1e-3
    """Step by which `bias` moves towards even load after each training step."""
    aux_coefficient: Annotated[float, Field(ge=0)] = 1e-2
    """Weight of the auxiliary loss under `aux`."""


class ModelConfig(Section):
    """Shape of a decoder-only mixture-of-experts model."""

    name: str
    """Preset name, shown in tables and used in run ids."""
    layers: Positive
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
    experts: Positive
    """Routed experts per MoE layer."""
    top_k: Positive
    """Experts that each token goes to."""
    expert_width: Positive
    """Inner width of a routed SwiGLU expert."""
    shared_width: NonNegative = 0
    """Inner width of the shared expert that sees every token; 0 for none."""
    dense_layers: NonNegative = 0
    """Leading layers with a dense SwiGLU instead of experts."""
    dense_width: NonNegative = 0
    """Inner width of those dense layers."""
    gated: bool = True
    """MLPs and experts are SwiGLU (gate, up, down); false: two matrices and GELU, counted by sizing only."""
    attention: Literal["gqa", "mla", "cca"] = "gqa"
    """`gqa` trains; `mla` (DeepSeek) and `cca` (ZAYA1) are counted by sizing and refused by the trainer."""
    q_lora_rank: NonNegative = 0
    """MLA: rank of the query compression."""
    kv_lora_rank: NonNegative = 0
    """MLA: rank of the key/value compression."""
    rope_head_dim: NonNegative = 0
    """MLA: width of the decoupled rotary part of a head; `head_dim` is the part without position."""
    qk_norm: bool = False
    """RMSNorm on queries and keys, per head."""
    rope_theta: Annotated[float, Field(gt=0)] = 10_000.0
    """Base of the rotary position frequencies."""
    norm_eps: Annotated[float, Field(gt=0)] = 1e-5
    """Epsilon of every RMSNorm."""
    tie_embeddings: bool = False
    """Use the embedding table as the output projection."""
    init_std: Annotated[float, Field(gt=0)] = 0.02
    """Standard deviation of the initial weights; output projections are scaled by 1/sqrt(2*layers)."""
    router: RouterConfig = RouterConfig()
    """Routing and balancing."""

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
        if self.dense_layers > self.layers:
            raise ValueError(
                f"model.dense_layers={self.dense_layers} is more than model.layers={self.layers}"
            )
        if self.dense_layers and not self.dense_width:
            raise ValueError("model.dense_width=0, but model.dense_layers asks for dense layers; set it")
        if self.attention == "mla" and not (self.kv_lora_rank and self.rope_head_dim):
            raise ValueError("model.attention=mla needs model.kv_lora_rank and model.rope_head_dim")
        return self


class ClusterConfig(Section):
    """Where the run goes."""

    name: str = "local"
    """Preset name."""
    nodes: Positive | None = None
    """Nodes of the gang; auto: as few as hold all ranks."""
    slots_per_node: Positive | None = None
    """Ranks on each node; auto: the ranks spread evenly over `nodes`."""


class ParallelConfig(Section):
    """The layout: ranks = pp * dp * cp * tp, and ep divides dp * cp. An axis of null is open: the planner's search sets
    it by memory and predicted step time."""

    dp: Positive | None = None
    """Data-parallel size; auto: ep, or all slots of the cluster where it is larger and divides."""
    ep: Positive | None = 1
    """Expert-parallel size: each rank of an ep group holds experts/ep experts of every MoE layer; auto: searched."""
    tp: Positive | None = 1
    """Tensor-parallel size; auto: searched."""
    pp: Positive | None = 1
    """Pipeline stages; auto: searched."""
    cp: Positive | None = 1
    """Context-parallel size; auto: searched."""
    etp: Positive | None = 1
    """Tensor-parallel size inside an expert; auto: searched."""

    @property
    def open(self) -> tuple[str, ...]:
        """Axes that the search sets; dp is one of them only beside another, since alone it follows from the slots."""
        return tuple(axis for axis in ("pp", "cp", "ep", "etp", "tp") if getattr(self, axis) is None)

    def size(self, axis: str) -> int:
        """Ranks along an axis; 1 where it is open."""
        return getattr(self, axis) or 1


class DataConfig(Section):
    """What is trained on."""

    path: str | None = None
    """Text, jsonl or parquet: a file, folder, glob or fsspec URL. None: the Python standard library's source."""
    text_field: str = "text"
    """Column or key that holds the text in jsonl and parquet."""
    tokenizer: str = "bytes"
    """`bytes`, or the path of a Hugging Face `tokenizer.json`."""
    sequence: Positive = 256
    """Tokens per sample that the loss is taken over."""
    cache: str | None = None
    """Folder for prepared tokens; None: `<home>/data`."""


class OptimConfig(Section):
    """AdamW with warm-up and cosine decay."""

    lr: Annotated[float, Field(gt=0)] = 3e-4
    """Peak learning rate."""
    min_lr: Annotated[float, Field(ge=0)] = 3e-5
    """Learning rate at the last step."""
    warmup_steps: NonNegative = 100
    """Steps of linear warm-up from 0."""
    beta1: Fraction = 0.9
    """Decay of AdamW's first moment."""
    beta2: Fraction = 0.95
    """Decay of AdamW's second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """AdamW's epsilon."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay on matrices; norms, biases and embeddings have none."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Global gradient-norm limit; 0 turns clipping off."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.min_lr > self.lr:
            raise ValueError(
                f"optim.min_lr={self.min_lr} is above optim.lr={self.lr}; the cosine decays from lr to min_lr"
            )
        return self


class TrainConfig(Section):
    """How long and how much at a time."""

    steps: Positive = 1000
    """Optimizer steps of the whole run."""
    global_batch: Positive | None = None
    """Samples per step over all ranks; auto: micro_batch * dp."""
    micro_batch: Positive = 8
    """Samples per forward pass on a rank; global_batch / (micro_batch * dp) passes are accumulated."""
    precision: Precision | None = None
    """`bf16` (fp32 master weights) or `fp32`; auto: bf16 where the device has a bf16 peak, fp32 elsewhere."""
    seed: NonNegative = 1234
    """Seed of weights and of the sample order."""
    log_every: Positive = 1
    """Steps between metric lines."""


class CheckpointConfig(Section):
    """When and where state is saved."""

    every: Positive = 100
    """Steps between checkpoints; the last step is always saved."""
    path: str | None = None
    """Folder or fsspec URL; None: `<run>/checkpoints`."""
    keep: Positive = 2
    """Committed checkpoints kept; older ones are removed after a new one is committed."""


class ResilienceConfig(Section):
    """What happens when something breaks."""

    max_restarts: NonNegative = 3
    """Restarts without progress before the run fails; a new checkpoint resets the count."""
    backoff_seconds: Annotated[float, Field(ge=0)] = 1.0
    """Wait before the first restart; doubles with each restart without progress."""
    timeouts: Timeouts = Timeouts()
    """Every timeout, derived from one dial."""


class TrackingConfig(Section):
    """Weights & Biases."""

    wandb: Literal["auto", "online", "offline", "disabled"] = "auto"
    """auto: online where an API key is found, offline otherwise."""
    project: str = "megaray"
    """W&B project."""
    entity: str | None = None
    """W&B user or team; None: the key's default."""


class RunConfig(Section):
    """Everything that defines a run; saved resolved as `config.yaml` in the run's folder."""

    name: str | None = None
    """Prefix of the run id; None: the model's name."""
    workload: Literal["train", "collectives"] = "train"
    """The program that the gang runs on every rank: training, or measuring the fabric between the ranks."""
    model: ModelConfig
    """Model shape."""
    hardware: HardwareConfig
    """Device kind."""
    cluster: ClusterConfig = ClusterConfig()
    """Nodes and slots."""
    parallel: ParallelConfig = ParallelConfig()
    """Layout."""
    data: DataConfig = DataConfig()
    """Text."""
    optim: OptimConfig = OptimConfig()
    """Optimizer."""
    train: TrainConfig = TrainConfig()
    """Steps and batch."""
    checkpoint: CheckpointConfig = CheckpointConfig()
    """Saving."""
    resilience: ResilienceConfig = ResilienceConfig()
    """Faults."""
    tracking: TrackingConfig = TrackingConfig()
    """W&B."""
    collectives: CollectivesConfig = CollectivesConfig()
    """What is measured where `workload` is `collectives`."""
    network: NetworkConfig = NetworkConfig()
    """Settings of the communication library for the network."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        p = self.parallel
        ep, dp_cp = p.size("ep"), p.size("dp") * p.size("cp")
        if self.model.experts % ep:
            divisors = [d for d in range(1, self.model.experts + 1) if self.model.experts % d == 0]
            raise ValueError(
                f"parallel.ep={ep} does not divide model.experts={self.model.experts}; "
                f"use one of {', '.join(map(str, divisors))}"
            )
        if p.dp is not None and p.cp is not None and dp_cp % ep:
            raise ValueError(
                f"parallel.ep={ep} does not divide parallel.dp*cp={dp_cp}; expert groups are cut "
                f"out of the data-parallel ranks: set parallel.dp to a multiple of {ep}"
            )
        if self.train.global_batch is not None and p.dp is not None:
            unit = self.train.micro_batch * p.dp
            if self.train.global_batch % unit:
                raise ValueError(
                    f"train.global_batch={self.train.global_batch} is not a multiple of "
                    f"train.micro_batch*parallel.dp={unit}; set it to a multiple of {unit}"
                )
        if self.optim.warmup_steps >= self.train.steps:
            raise ValueError(
                f"optim.warmup_steps={self.optim.warmup_steps} is not below train.steps={self.train.steps}; "
                f"set optim.warmup_steps to at most {self.train.steps - 1}"
            )
        return self
