"""What known frameworks do, as their code and documentation say."""

from __future__ import annotations

from dataclasses import replace

from trainer.sizing.job import Retention, Software


def own(precision: str, kind: str = "cuda") -> Software:
    """This trainer: DeepSpeed's ZeRO-1 accumulates gradients in the working precision; on a CPU norms aren't one kernel."""
    width = 4 if precision == "fp32" else 2
    return Software(
        eager=True,
        tuned_attention=kind == "cuda",  # torch takes cuDNN's on Hopper and later
        gradient_bytes=width,
        reduce_bytes=width,
        retention=Retention(norm_bytes=8 if kind == "cpu" else 4, staging=5e8 * width, update=(0, 4 + width)),
        sources=("deepspeed/runtime/zero/stage_1_and_2.py of DeepSpeed 0.19",),
    )


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
