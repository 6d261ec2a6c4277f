"""The one configuration schema of a run.

Hydra composes YAML and overrides into a plain tree (`configs.compose`); this module turns the tree into a
frozen, typed `RunConfig`, and past that point no dictionary travels. `None` in a field whose text says
"auto" means that `trainer.sizing.search.planner` fills it in and prints the value with its reason.
"""

from __future__ import annotations

import math
from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from configs.fabric import CollectivesConfig, NetworkConfig
from configs.hardware import HardwareConfig as HardwareConfig
from configs.model import ModelConfig as ModelConfig
from configs.model import RouterConfig as RouterConfig
from configs.model import YarnConfig as YarnConfig
from configs.section import Devices, Name, NonNegative, Positive, Section
from configs.timeouts import Timeouts
from configs.training import CheckpointConfig as CheckpointConfig
from configs.training import DataConfig as DataConfig
from configs.training import EngineName as EngineName
from configs.training import OptimConfig as OptimConfig
from configs.training import Precision as Precision
from configs.training import TrainConfig as TrainConfig


class ClusterConfig(Section):
    """Where the run goes."""

    name: str = "local"
    """Preset name."""
    nodes: Devices | None = None
    """Nodes of the gang; auto: as few as hold all ranks."""
    slots_per_node: Positive | None = None
    """Ranks on each node; auto: the ranks spread evenly over `nodes`."""


class ParallelConfig(Section):
    """The layout: ranks = pp * dp * cp * tp, and ep * etp divides dp * cp * tp: expert groups divide a stage's
    ranks. An axis of null is open: the planner's search sets it by memory and predicted step time."""

    dp: Devices | None = None
    """Data-parallel size; auto: ep, or all slots of the cluster where it is larger and divides."""
    ep: Devices | None = 1
    """Expert-parallel size: each rank of an ep group holds experts/ep experts of every MoE layer; auto: searched."""
    tp: Devices | None = 1
    """Tensor-parallel size; auto: searched."""
    pp: Devices | None = 1
    """Pipeline stages; auto: searched."""
    cp: Devices | None = 1
    """Context-parallel size; auto: searched."""
    etp: Devices | None = 1
    """Tensor-parallel size inside an expert; auto: searched."""
    zero: Literal[1, 2, 3] = 1
    """ZeRO stage over dp * cp: 1 shards the optimizer's state, 2 gradients too, 3 weights too (gathered for each use)."""
    schedule: Literal["1f1b", "interleaved", "zbv"] = "1f1b"
    """Pipeline schedule: `1f1b`; `interleaved`: 1F1B with several chunks on each rank; `zbv`: zero bubble, two in a V."""
    chunks: Positive = 1
    """Model chunks on each pipeline rank under `interleaved`; `zbv` always has 2."""
    lend_rows: Positive | None = None
    """Expert lending: a less loaded rank of ep computes a hot expert of at least so many rows (token-expert pairs of a
    micro-batch), e.g. 2048. Only inside a node, where tokens are gathered (1 < ep <= top_k, etp 1), and not under `zbv`.
    null: never; if it isn't set, auto axes may set it."""
    context: Literal["gather", "ulysses"] = "gather"
    """`gather`: all-gather of keys and values (as ZAYA1); `ulysses`: all-to-all between tokens and heads."""

    @property
    def open(self) -> tuple[str, ...]:
        """Axes that the search sets; dp is one of them only beside another, since alone it follows from the slots."""
        return tuple(axis for axis in ("pp", "cp", "ep", "etp", "tp") if getattr(self, axis) is None)

    def size(self, axis: str) -> int:
        """Ranks along an axis; 1 where it is open."""
        return getattr(self, axis) or 1

    @property
    def ranks(self) -> int:
        """Of the layout, open axes being 1."""
        return math.prod(self.size(axis) for axis in ("pp", "dp", "cp", "tp"))


class ResilienceConfig(Section):
    """What happens when something breaks."""

    max_restarts: NonNegative = 3
    """Restarts without progress before the run fails; a new checkpoint resets the count."""
    backoff_seconds: Annotated[float, Field(ge=0)] = 1.0
    """Wait before the second restart without progress; the first doesn't wait, each further one waits twice as long."""
    shrink_after: Annotated[float, Field(ge=0)] | None = 60.0
    """Seconds to wait for lost nodes before the run continues in a smaller layout until they return. None: forever."""
    wall_hours: Annotated[float, Field(gt=0)] | None = None
    """Hours that the ranks may run, over all attempts, before the run saves and stops. None: no limit."""
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

    name: Name | None = None
    """Prefix of the run id; None: the model's name."""
    resume: str | None = None
    """State that a new run starts from: a run's id, or a folder or URL of checkpoints or of a step. None: step 0."""
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
        ep = p.size("ep")
        if self.model.experts % ep:
            divisors = [d for d in range(1, self.model.experts + 1) if self.model.experts % d == 0]
            raise ValueError(
                f"parallel.ep={ep} does not divide model.experts={self.model.experts}; "
                f"use one of {', '.join(map(str, divisors))}"
            )
        stage, unit = p.size("dp") * p.size("cp") * p.size("tp"), ep * p.size("etp")
        if p.dp is not None and p.cp is not None and p.tp is not None and stage % unit:
            least = unit // math.gcd(unit, stage // p.dp)
            raise ValueError(
                f"parallel.ep*etp={unit} does not divide parallel.dp*cp*tp={stage}; expert groups are cut "
                f"out of a stage's ranks: set parallel.dp={-(-p.dp // least) * least}"
            )
        if self.train.global_batch is not None and p.dp is not None:
            unit = self.train.micro_batch * p.dp
            if self.train.global_batch % unit:
                raise ValueError(
                    f"train.global_batch={self.train.global_batch} is not a multiple of "
                    f"train.micro_batch*parallel.dp={unit}; set it to a multiple of {unit}"
                )
        self._check_ramp()
        if (
            self.workload == "collectives"
            and self.collectives.timer == "graph"
            and self.hardware.kind == "cpu"
        ):
            raise ValueError(
                f"collectives.timer=graph (-G) replays graphs of a GPU, which hardware={self.hardware.name} doesn't have; "
                "name the devices, e.g. hardware=h100, or leave -G out"
            )
        if self.train.evaluate_every and not self.data.validation:
            raise ValueError(
                f"train.evaluate_every={self.train.evaluate_every} needs documents that are held out of training; set "
                "data.validation=0.01, or train.evaluate_every=0"
            )
        if self.optim.warmup_steps >= self.train.steps:
            raise ValueError(
                f"optim.warmup_steps={self.optim.warmup_steps} is not below train.steps={self.train.steps}; "
                f"set optim.warmup_steps to at most {self.train.steps - 1}"
            )
        return self

    def _check_ramp(self) -> None:
        train, dp = self.train, self.parallel.dp
        if train.ramp_batch is None:
            return
        if train.global_batch is not None and train.global_batch % train.ramp_batch:
            raise ValueError(
                f"train.ramp_batch={train.ramp_batch} does not divide train.global_batch={train.global_batch}; "
                f"the batch grows in multiples of it: use {math.gcd(train.ramp_batch, train.global_batch)}"
            )
        if dp is not None and train.ramp_batch % (train.micro_batch * dp):
            raise ValueError(
                f"train.ramp_batch={train.ramp_batch} is not a multiple of train.micro_batch*parallel.dp="
                f"{train.micro_batch * dp}; set it to one"
            )
