"""What known frameworks do, as their code and documentation say."""

from __future__ import annotations

from dataclasses import replace

from configs.schema import EngineName, OptimConfig
from trainer.sizing.model.job import Retention, Software


def own(
    *, kind: str = "cuda", engine: EngineName | None = None, optim: OptimConfig | None = None
) -> Software:
    """This trainer under an engine (None: native) and an optimizer (None: AdamW); on a CPU norms aren't one kernel.

    Both accumulate and reduce gradients in fp32; FSDP2 reduces them while other layers go backward.
    """
    optim = optim or OptimConfig()
    moments, of_matrices = moment_bytes(optim)
    eager = Software(
        selective="feed_forward",
        eager=True,
        tuned_attention=kind == "cuda",  # torch takes cuDNN's on Hopper and later
        moments_bytes=moments,
        matrix_moments_bytes=of_matrices,
        orthogonal_steps=optim.orthogonal_steps if optim.kind == "muon" else 0,
        retention=Retention(norm_bytes=8 if kind == "cpu" else 4),
    )
    return _deepspeed(eager) if engine == "deepspeed" else _native(eager)


def _native(eager: Software) -> Software:
    return replace(
        eager,
        overlap_dp=True,
        overlap_gather=True,
        own_master=True,
        streamed=True,
        retention=replace(eager.retention, staging=0.0, reduced_layers=2, update=(0, 4)),
        sources=("torch/distributed/fsdp/_fully_shard of torch 2.13", "trainer/engines/native.py"),
    )


def _deepspeed(eager: Software) -> Software:
    """DeepSpeed reduces in buckets after the backward pass, in fp32 as `trainer.engines.deepspeed` asks for."""
    return replace(
        eager,
        retention=replace(eager.retention, staging=4.0 * (1 << 27), update=(0, 4)),
        sources=("deepspeed/runtime/zero/stage_1_and_2.py of DeepSpeed 0.19", "trainer/engines/deepspeed.py"),
    )


def moment_bytes(optim: OptimConfig) -> tuple[int, int]:
    """Bytes of the optimizer's moments for a weight, and for one of a matrix between layers: Muon has one for those."""
    width = 2 if optim.moments == "bf16" else 4
    return 2 * width, width if optim.kind == "muon" else 2 * width


def nanotron(before_fix: bool = False) -> Software:
    """Hugging Face's nanotron as its published H100 sweep ran it: sequence parallelism, flash attention, fp32 gradients.

    `before_fix`: before its pipeline waited for transfers without stopping the host.
    """
    return Software(
        name="nanotron",
        overlap_dp=True,
        balanced_stages=True,
        fused_projections=True,
        retention=NANOTRON_BEFORE if before_fix else NANOTRON,
        sources=("github.com/huggingface/nanotron: models/llama.py, nn/attention, optim/, parallel/",),
    )


#: In the order of the fields' reasons: Triton norms keep their sixteen-bit input; the loss subtracts the maximum into a
#: second fp32 copy of the logits; `FP32GradientAccumulator` adds a pass's gradients after it; `DistributedDataParallel`
#: keeps its buckets; ZeRO-1 gathers weights through a flat copy and the own shard; AdamW makes its moments on the first
#: step; `MemoryBuffer` keeps "allgather" and "allgather2". That its host is slow is from the sweep's step times.
NANOTRON = Retention(
    norm_bytes=2,
    logit_bytes=8,
    late_gradients=2,
    replica_buckets=2,
    staging=0.0,
    update=(2, 2),
    late_moments=True,
    whole_buffers=2,
    deferred_frees=True,
    host_slow=True,
)
NANOTRON_BEFORE = replace(NANOTRON, host_waits=True, host_slow=False)

#: Megatron-Core: gradients are added to an fp32 buffer inside the matmul, SwiGLU is one kernel, expert outputs are
#: weighted before the last matmul, record_stream is switched off.
MEGATRON = Retention(
    norm_bytes=2,
    fused_activation=True,
    fp32_router=True,
    expert_outputs=False,
    logit_bytes=8,
    staging=0.0,
    update=(0, 0),
    whole_buffers=1,
)
