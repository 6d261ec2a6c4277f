"""Configuration of fabric measurements, and of the communication library."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from configs.section import AsWords, Bytes, Fraction, NonNegative, Positive, Section

Op = Literal[
    "all_reduce", "all_gather", "reduce_scatter", "all_to_all", "all_to_allv", "broadcast", "reduce", "gather",
    "scatter", "sendrecv", "barrier",
]  # fmt: skip
Dtype = Literal[
    "int8", "uint8", "int32", "int64", "half", "bfloat16", "float", "double", "f8e4m3", "f8e5m2"
]  # fmt: skip
Redop = Literal["sum", "prod", "max", "min", "avg", "band", "bor", "bxor"]
Pattern = Literal["balanced", "hot_expert", "hot_rank", "zipf", "bursty", "rotating"]
Placement = Literal["out_of_place", "in_place"]
Average = Literal["mean", "rank0", "min", "max"]


class CollectivesConfig(Section):
    """A measurement of the fabric. Names of operations, types and reductions are those of nccl-tests."""

    study: Literal["sweep", "moe", "faults"] = "sweep"
    """`sweep`: times over sizes; `moe`: dispatch and combine under routing; `faults`: find what is slow."""
    ops: Annotated[tuple[Op, ...], AsWords, Field(min_length=1)] = ("all_reduce",)
    """Operations of a sweep, one after the other."""
    min_size: Bytes = 8
    """Smallest size in bytes (nccl-tests `-b`)."""
    max_size: Bytes = 32 << 20
    """Largest size in bytes (`-e`)."""
    step_factor: Annotated[Positive, Field(ge=2)] = 2
    """Factor from one size to the next (`-f`)."""
    step_size: Bytes | None = None
    """Bytes from one size to the next (`-i`); instead of the factor."""
    dtypes: Annotated[tuple[Dtype, ...], AsWords, Field(min_length=1)] = ("float",)
    """Element types (`-d`); the two of eight bits are moved, not reduced."""
    reductions: Annotated[tuple[Redop, ...], AsWords, Field(min_length=1)] = ("sum",)
    """Reductions of the operations that reduce (`-o`); `band`, `bor` and `bxor` take integers."""
    placements: Annotated[tuple[Placement, ...], AsWords, Field(min_length=1)] = ("out_of_place", "in_place")
    """Whether the result has a buffer of its own."""
    groups: Annotated[tuple[str, ...], AsWords, Field(min_length=1)] = ("world",)
    """Groups that run at once: `world`, `node`, `across` (same local rank on all nodes), `pairs` (every pair, in
    rounds), an axis of the layout (`dp`, `ep`, `tp`, …), or nccl-tests' split: `MOD2`, `DIV8`, `AND0x7`, `OR0x1`."""
    root: NonNegative = 0
    """Root's place in its group, of rooted operations (`-r`)."""
    every_root: bool = False
    """Each rank of a group as root in turn (`-r all`)."""
    spread: Fraction = 1.0
    """Unevenness of `all_to_allv`: 0 the same to all peers, 1 in proportion to the distance in rank."""
    backend: Literal["auto", "nccl", "gloo", "mpi"] = "auto"
    """Library under torch.distributed; auto: nccl (RCCL under ROCm) on GPUs, gloo elsewhere."""
    timer: Literal["auto", "host", "events", "graph"] = "auto"
    """How calls are launched on a GPU: `graph`: replayed (`-G`); `events`: one by one; `host`: each waited for; auto: a
    graph where Python's launch would show, else one by one. CPUs support only `host` and refuse `graph`."""
    sync: Literal["loop", "wait", "barrier"] = "loop"
    """`loop`: back to back, as nccl-tests measures; `wait`: each is waited for (`-z 2`); `barrier`: a barrier, outside of
    the time, before each (`-z 3`)."""
    average: Average = "mean"
    """Which rank's time counts: the mean over the ranks, rank 0's, the least or the most (`-a`)."""
    unalign: NonNegative = 0
    """Elements by which buffers begin off their alignment (`-u`)."""
    min_warmup: NonNegative = 5
    """Untimed iterations at least (`-w`, of which 0 means none at all); more follow until the times are steady."""
    max_warmup: NonNegative = 200
    """Untimed iterations at most."""
    min_iterations: Positive = 20
    """Timed iterations at least (`-n`), and in one burst or graph on a GPU."""
    max_iterations: Positive = 1000
    """Timed iterations at most."""
    precision: Annotated[float, Field(gt=0, lt=1)] = 0.02
    """Half-width of the mean's confidence interval, over the mean, to plan for: how many calls are timed is decided from
    the scatter in the warm-up, before the first is timed."""
    confidence: Annotated[float, Field(gt=0.5, lt=1)] = 0.95
    """Level of that interval."""
    seconds_per_size: Annotated[float, Field(gt=0)] = 10.0
    """Most seconds to plan for one size, even if its precision needs more."""
    passes: Positive = 1
    """Passes over the whole sweep, so that slow drift shows as spread."""
    check: NonNegative = 1
    """Times that every element is compared with its exact value, in calls that aren't timed (`-c`); 0: never."""
    seed: NonNegative = 1
    """Seed of generated routing and of the order of rounds."""
    patterns: Annotated[tuple[Pattern, ...], AsWords, Field(min_length=1)] = (
        "balanced", "hot_expert", "hot_rank", "zipf", "bursty", "rotating",
    )  # fmt: skip
    """Routing of the `moe` study."""
    record: str | None = None
    """Folder of a training run whose recorded expert loads the `moe` study replays too."""
    tokens: Positive = 1024
    """Tokens of each rank in the `moe` study; width, experts and top_k are the model's."""
    imbalances: Annotated[tuple[float, ...], AsWords] = (1.0, 1.25, 1.5, 2.0, 4.0)
    """Load imbalances (most loaded rank over the mean) at which the `moe` study measures their cost."""
    chunks: Positive = 2
    """Parts that dispatch, experts and combine are cut into, so that they overlap."""
    probe_size: Bytes | None = None
    """Bytes of one message in the `faults` study; auto: 4M, on GPUs 256M, so that the launch hardly counts."""
    probe_repeats: Positive = 10
    """Messages in each direction of each pair and pass, in the `faults` study."""
    slow_ratio: Annotated[float, Field(gt=0, lt=1)] = 0.6
    """Fraction of the rate of peers, baseline or hardware limit below which something counts as slow."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if self.max_size < self.min_size:
            raise ValueError(
                f"collectives.max_size={self.max_size} is below collectives.min_size={self.min_size}; "
                f"set collectives.max_size to at least {self.min_size}"
            )
        for low, high in (("min_warmup", "max_warmup"), ("min_iterations", "max_iterations")):
            if getattr(self, high) < getattr(self, low):
                raise ValueError(
                    f"collectives.{high}={getattr(self, high)} is below collectives.{low}={getattr(self, low)}; "
                    f"set collectives.{high} to at least {getattr(self, low)}"
                )
        self._check_graphs()
        if any(value < 1 for value in self.imbalances):
            raise ValueError(
                f"collectives.imbalances={','.join(map(str, self.imbalances))} goes below 1, the even load; "
                "type e.g. collectives.imbalances=1,1.5,2"
            )
        return self

    def _check_graphs(self) -> None:
        """Refuse what no graph holds where one is to be replayed: its times would be those of other launches."""
        if self.timer != "graph":
            return
        if self.sync != "loop":
            raise ValueError(
                f"collectives.timer=graph (-G) excludes collectives.sync={self.sync} (-z): a graph can't wait between its "
                "calls; leave one of them out"
            )
        if self.study != "sweep":
            raise ValueError(
                f"collectives.timer=graph (-G) excludes collectives.study={self.study}, which replays no graphs; leave one "
                "of them out"
            )
        if self.backend in ("gloo", "mpi"):
            raise ValueError(
                f"collectives.timer=graph (-G) excludes collectives.backend={self.backend}, whose calls wait on the host; "
                "leave one of them out"
            )
        if "barrier" in self.ops:
            raise ValueError(
                "collectives.timer=graph (-G) excludes collectives.ops=barrier, which waits on the host; leave it out of "
                "--ops, or measure it without -G"
            )


class LibrarySetting(Section):
    """One environment variable of a communication library."""

    variable: str
    """Its name."""
    value: str
    """Its value."""
    library: Literal["nccl", "rccl", "both", "ofi"]
    """Who reads it: NCCL, RCCL, either of the two, or the libfabric plug-in."""
    versions: str
    """Versions it is for, as `>=2.18` or `>=2.12,<2.20`, all: `>=0`; of NCCL, or of NCCL's interface that RCCL names."""
    reason: str
    """Why it is set so."""
    source: str
    """Who says so."""

    @field_validator("versions")
    @classmethod
    def _range(cls, value: str, info: ValidationInfo) -> str:
        # Imported here: it takes 10 ms, which `plan` only spends on a preset that has settings.
        from packaging.specifiers import InvalidSpecifier, SpecifierSet

        try:
            bounds = len(SpecifierSet(value))
        except InvalidSpecifier:
            bounds = 0
        if not bounds:
            raise ValueError(
                f"network.settings: versions of {info.data.get('variable')}: '{value}' is not a range of versions; "
                "type e.g. '>=2.18' or '>=2.12,<2.28'"
            )
        return value


class NetworkConfig(Section):
    """What the ranks set for NCCL or RCCL before they meet; what the user's environment sets already stays."""

    name: str = "none"
    """Preset name."""
    settings: tuple[LibrarySetting, ...] = ()
    """Variables with their reasons."""
