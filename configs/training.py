"""What is trained on, with which optimizer, how long, and when it is saved."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from configs.section import Fraction, NonNegative, Positive, Section

Precision = Literal["fp32", "bf16"]
EngineName = Literal["native", "deepspeed"]
SLOWEST_BF16 = 1 - 2.0**-7
"""Largest decay of a bf16 moment: one that loses less than 1/128 of itself in a step may round back to what it was."""


class DataConfig(Section):
    """What is trained on."""

    path: str | None = None
    """Text, jsonl or parquet: a file, folder, glob or fsspec URL. None: the Python standard library's source."""
    mixture: dict[str, Annotated[float, Field(gt=0)]] = {}
    """Several paths with their shares of the samples, instead of `path`."""
    text_field: str = "text"
    """Column or key that holds the text in jsonl and parquet."""
    score_field: str | None = None
    """Column or key of a quality score; with `keep_fraction`, only the rows with the best scores are kept."""
    keep_fraction: Annotated[Fraction, Field(gt=0)] = 1.0
    """Share of the rows that is kept, by `score_field`."""
    tokenizer: str = "bytes"
    """`bytes`, or the path of a Hugging Face `tokenizer.json`."""
    end_token: str | None = None
    """Text of the token between documents, such as `<|endoftext|>`; None: the tokenizer's own, where it has one."""
    sequence: Positive = 256
    """Tokens per sample."""
    document_mask: bool = True
    """Whether attention stays within a document if a sample holds several."""
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.0
    """Share of the documents that is held out of training, for `train.evaluate_every`."""
    cache: str | None = None
    """Folder for prepared tokens; None: `<home>/data`."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.mixture and self.path is not None:
            raise ValueError(
                "data.mixture and data.path are both set; name all paths in data.mixture, or leave it out"
            )
        if self.keep_fraction < 1 and self.score_field is None:
            raise ValueError(
                f"data.keep_fraction={self.keep_fraction} needs the column of the score; type data.score_field=NAME"
            )
        return self


class OptimConfig(Section):
    """The optimizer and its schedule."""

    kind: Literal["adamw", "muon", "lamb"] = "adamw"
    """`adamw`; `muon`: orthogonalised momentum for matrices, AdamW for the rest (ZAYA1); `lamb`: AdamW with a trust ratio
    per tensor, for large batches (MegaScale section 3.1)."""
    lr: Annotated[float, Field(gt=0)] = 3e-4
    """Peak learning rate."""
    min_lr: Annotated[float, Field(ge=0)] = 3e-5
    """Learning rate at the last step."""
    warmup_steps: NonNegative = 100
    """Steps of linear warm-up from 0."""
    schedule: Literal["cosine", "linear", "wsd", "constant"] = "cosine"
    """Curve from `lr` to `min_lr`; `wsd` stays at `lr` and falls linearly over the last `decay_steps`."""
    decay_steps: Positive | None = None
    """Steps of `wsd`'s decay; None: a tenth of all steps."""
    beta1: Fraction = 0.9
    """Decay of the first moment."""
    beta2: Fraction = 0.95
    """Decay of the second moment."""
    eps: Annotated[float, Field(gt=0)] = 1e-8
    """Epsilon beside the square root of the second moment."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.1
    """Decoupled weight decay on matrices; norms, biases and embeddings have none."""
    clip: Annotated[float, Field(ge=0)] = 1.0
    """Global gradient-norm limit; 0 turns clipping off."""
    momentum: Fraction = 0.95
    """Muon: decay of the (Nesterov) momentum."""
    orthogonal_steps: Positive = 5
    """Muon: Newton-Schulz iterations."""
    base_width: Positive | None = None
    """Width transfer: `lr` and `weight_decay` are those of a model this wide; matrices of a model of width d get
    lr*base/d and decay*sqrt(d/base). None: both as they are."""
    moments: Literal["fp32", "bf16"] = "fp32"
    """Precision that the optimizer's moments are kept in."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        slow = [name for name in ("beta1", "beta2", "momentum") if getattr(self, name) > SLOWEST_BF16]
        if self.moments == "bf16" and slow and (slow != ["momentum"] or self.kind == "muon"):
            raise ValueError(
                f"optim.{slow[0]}={getattr(self, slow[0])} with optim.moments=bf16: bf16 rounds away what a step takes off "
                "such a moment, so it never falls; type optim.moments=fp32, or a decay of at most 0.99"
            )
        if self.decay_steps is not None and self.schedule != "wsd":
            raise ValueError(
                f"optim.decay_steps={self.decay_steps} is of optim.schedule=wsd, and optim.schedule={self.schedule}; set "
                "optim.schedule=wsd, or leave optim.decay_steps out"
            )
        if self.min_lr > self.lr:
            raise ValueError(
                f"optim.min_lr={self.min_lr} is above optim.lr={self.lr}; the schedule falls from lr to min_lr"
            )
        return self


class TrainConfig(Section):
    """How long and how much at a time."""

    steps: Positive = 1000
    """Optimizer steps of the whole run."""
    global_batch: Positive | None = None
    """Samples per step over all ranks; auto: micro_batch * dp, and with a pipeline 4 * pp of that."""
    ramp_batch: Positive | None = None
    """Samples of the first step; the batch grows in multiples of it to `global_batch` over `ramp_steps`. None: no ramp."""
    ramp_steps: NonNegative = 0
    """Steps over which the batch grows."""
    micro_batch: Positive = 8
    """Samples per forward pass on a rank; global_batch / (micro_batch * dp) passes are accumulated."""
    precision: Precision | None = None
    """`bf16` (fp32 master weights) or `fp32`; auto: bf16 where the device has a bf16 peak, fp32 elsewhere."""
    engine: EngineName | None = None
    """`native`: torch's FSDP2, every layout; `deepspeed`: ZeRO 1 and 2 on dp and ep; auto: native."""
    recompute: Literal["none", "selective", "full"] = "none"
    """What the backward pass recomputes to save memory: nothing, the feed-forward part of each block, or whole blocks."""
    deterministic: bool = False
    """Bitwise reproducible results on GPUs, at a cost in speed; on CPUs they always are."""
    max_skipped: Positive = 10
    """The run fails after so many steps in a row whose gradients aren't finite; each is skipped and counted."""
    evaluate_every: NonNegative = 0
    """Steps between evaluations of the loss on held-out documents; 0: none."""
    evaluate_samples: Positive = 64
    """Samples of one evaluation."""
    seed: NonNegative = 1234
    """Seed of weights and of the sample order."""
    log_every: Positive = 1
    """Steps between metric lines."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.ramp_steps and self.ramp_batch is None:
            raise ValueError(
                f"train.ramp_steps={self.ramp_steps} says how long the batch grows, but not from which size; set "
                "train.ramp_batch, or leave train.ramp_steps out"
            )
        return self


class CheckpointConfig(Section):
    """When and where state is saved."""

    every: Positive = 100
    """Steps between checkpoints; the last step is always saved. Under `young_daly` the first interval, until a save was
    measured."""
    interval: Literal["fixed", "young_daly"] = "fixed"
    """fixed: `every`; young_daly: the interval that loses least to saves and to lost work, from the measured cost of saves
    and the failure rate of the run (Young 1974, Daly 2006)."""
    mtbf_hours: Annotated[float, Field(gt=0)] = 24.0
    """Mean time between failures of the whole gang that `young_daly` starts from; the run's own failures correct it."""
    budget: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """Largest share of the time that saves may block training under `young_daly`."""
    path: str | None = None
    """Folder or fsspec URL; None: `<run>/checkpoints`."""
    keep: Positive = 2
    """Newest committed checkpoints that are kept; older ones are removed after a new one is committed."""
    keep_every: Positive | None = None
    """Checkpoints whose step is a multiple of it are never removed; None: none of them."""
    background: bool = True
    """Whether saves are written in the background, so that training waits only for the copy to host memory."""
    busy: Literal["wait", "skip"] = "wait"
    """What a save does while the last one is still being written: wait for it, or be skipped with a message."""
    memory_every: Positive | None = None
    """Steps between in-memory snapshots, on the ranks' nodes and a copy on other nodes, which the next attempt tries before
    storage; None: none."""
    compare: Literal["none", "warn", "stop"] = "warn"
    """What happens if ranks' copies of the same state differ before a save: `warn` reports it in rank 0's log and saves,
    `stop` ends the attempt without saving and evicts the host of a wrong copy, `none` doesn't compare (for mixed devices,
    and for a library whose sums of three or more numbers aren't equal on all ranks: copies differ by rounding there)."""
    max_failed: Positive = 3
    """Failed saves in a row that open an incident; training continues."""
