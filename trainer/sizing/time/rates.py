"""What time depends on besides the job: the device's rates, the fabric's, and the host's overheads."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from configs.hardware import HardwareConfig
from configs.profile import DeviceProfile
from trainer.sizing.time.fabric import Fabric
from trainer.sizing.time.matmul import Kernels, copy_rate

#: Rate of a training step's matmuls over that of a short benchmark of the same shape (heat, power limit, neighbours on
#: the memory bus), where the device itself wasn't profiled. A100: 0.95; the first 20 rows of vTrain's single-node table
#: give 0.85 to 0.95, its many-node table the upper end. H100: 0.80, on the first bf16 row of each of NVIDIA's DGX Cloud
#: 24.12 series with Megatron. MI300X: 0.66, on the two first rows of Primus's schedules. Others are taken to be like H100.
SUSTAINED = {"ampere": 0.95, "cdna3": 0.66}
SUSTAINED_ELSEWHERE = 0.80
#: The same of this trainer's steps, whose long matmuls have others between them, and of its attention, which stays below
#: the power limit. On H200 four steps (OLMoE, ZAYA1, Qwen3 on 2 GPUs, Mixtral; tests/trainer/sizing/measured/own.json) give
#: 0.97, 0.96, 0.95 and 0.88 for matmuls, the less the more of the step they are. cuDNN's attention ran at 545 to 588
#: TFLOP/s forward and 424 to 536 backward there, where its maker's benchmark has 553 and 422.
MEGARAY_SUSTAINED = {"hopper": (0.92, 1.0)}
#: Share of its peak that a large matmul reaches where none is on record.
_OF_PEAK = 0.75


@dataclass(frozen=True)
class Overheads:
    """What the host takes to keep a device busy. The only numbers in a forecast that come from runs of a framework."""

    launch: float = 10e-6
    """Seconds of host time of a kernel, from one launch to the next, with what is around it in Python."""
    plain: float = 10e-6
    """`launch` of torch's own operators, beside a framework's."""
    pass_kernels: int = 50
    """Kernels of a layer's forward pass; its backward pass has twice as many."""
    tp_call: float = 30e-6
    """Seconds of host time of a tensor-parallel collective, on top of its launch."""
    tp_rank_call: float = 0.0
    """More of it for each rank of the group where the job spans nodes (calls that loop over ranks)."""
    p2p_call: float = 50e-6
    """Seconds of host time of handing a micro-batch to the next stage, or its gradient back."""
    update_bytes: float | None = None
    """Bytes that the optimizer step moves for a weight; None: counted (`trainer.sizing.time.traffic.update_bytes`)."""
    contention: float = 0.0
    """Seconds that computation loses for each second of a collective of weights or gradients behind it, which takes compute
    units and memory's bandwidth."""
    step: float = 10e-3
    """Seconds of a step that nothing else accounts for: data, clipping, logging."""
    source: str = "usual for eager PyTorch; none of it measured"


#: This trainer's: of a step of 101.4 ms on H100, forward, backward and optimizer leave 0.8 (docs/speed.md), and on H200 0.4
#: to 0.7; data and the log come on top in a run. A kernel behind an autograd function in Python takes 52 us of the host:
#: with ep=2 nothing ran for 5.7 ms of a step with four waits of the host, behind each of which it launches about 27 kernels
#: before the experts' matmuls run (4 layers of Qwen3 on 2 H200). So does a collective behind one. Contention is what that
#: model at dp=2 takes beyond the rest; NCCL has about as large a part of the compute units while it runs.
MEGARAY_OVERHEADS = Overheads(
    launch=52e-6,
    tp_call=52e-6,
    contention=0.17,
    step=1e-3,
    source="launches and what is between steps as this trainer's bench measured on H200 and H100",
)


@dataclass(frozen=True, eq=False)
class Rates:
    """Rates of one kind of device in one kind of cluster; NaN where unknown."""

    hardware: HardwareConfig
    fabric: Fabric
    device: DeviceProfile | None = None
    """What was measured on the device; None: the catalogue."""
    overheads: Overheads = field(default_factory=Overheads)
    sustained: float | None = None
    """Rate of matmuls in training over that of a short benchmark; None: 1 with a profile, else by generation."""
    attention_sustained: float | None = None
    """The same of fused attention; None: as matmuls."""

    @cached_property
    def cache(self) -> dict[Any, Any]:
        """What `trainer.sizing.time.estimate` has worked out with these rates and may meet again."""
        return {}

    def unknown(self, precision: str, ranks: int = 1, node: int = 1) -> str:
        """What must be on record for a time on `ranks` ranks, `node` of them on each node, and isn't; empty: nothing."""
        hardware = self.hardware
        needed = {
            f"{precision} rate": hardware.peak_tflops.get(precision)
            or hardware.achieved_tflops.get(precision),
            "memory bandwidth": hardware.memory_gbps,
            "links in a node": hardware.intra_node_gbps if ranks > 1 else math.inf,
            "network": hardware.inter_node_gbps if ranks > node else math.inf,
        }
        missing = ", ".join(name for name, value in needed.items() if value is None)
        return f"{hardware.name} has no {missing} on record" if missing else self.kernels.why(precision)

    @cached_property
    def kernels(self) -> Kernels:
        """Times of matmuls."""
        return Kernels(self.hardware, self.device)

    @cached_property
    def sustained_share(self) -> float:
        """`sustained`, or what takes its place."""
        if self.sustained is not None:
            return self.sustained
        if self.device is not None:
            return 1.0
        return SUSTAINED.get(self.hardware.architecture or "", SUSTAINED_ELSEWHERE)

    @cached_property
    def stream(self) -> float:
        """Bytes a second of memory that long copies reach."""
        return copy_rate(self.hardware)

    def flops(self, precision: str, attention: bool = False) -> float:
        """FLOP/s of the best large matmul in a long run, or what fused attention's rate is a share of."""
        achieved = self.hardware.achieved_tflops.get(precision)
        if achieved is None:
            achieved = self.hardware.peak_tflops.get(precision, math.nan) * _OF_PEAK
        apart = self.attention_sustained if attention else None
        return achieved * 1e12 * (self.sustained_share if apart is None else apart)
