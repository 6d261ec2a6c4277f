"""What known frameworks do, as their code and documentation say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from configs.schema import EngineName, OptimConfig
from trainer.sizing.model.job import FrameworkMemory, Software


def own(
    *,
    kind: str = "cuda",
    engine: EngineName | None = None,
    optim: OptimConfig | None = None,
    precision: str = "bf16",
    context: Literal["gather", "ulysses"] = "gather",
) -> Software:
    """This trainer under an engine (None: native) and an optimizer (None: AdamW).

    Both accumulate and reduce gradients in fp32; FSDP2 reduces them while other layers go backward. Its own kernels run in
    bf16 on GPUs (`trainer.kernels.choice`), torch's operators elsewhere; on a CPU norms aren't one kernel.
    """
    optim = optim or OptimConfig()
    moments, of_matrices = moment_bytes(optim)
    kernels = kind != "cpu" and precision == "bf16"
    made = Software(
        context=context,
        selective="feed_forward",
        eager=not kernels,
        kernels=kernels,
        tuned_attention=kind == "cuda",  # torch takes cuDNN's on Hopper and later
        moments_bytes=moments,
        matrix_moments_bytes=of_matrices,
        orthogonal_steps=optim.orthogonal_steps if optim.kind == "muon" else 0,
        fresh_gradients=True,
        mlp_router=None if kernels else "fp32",
        square_pieces=True,
        retention=replace(
            KERNELS if kernels else FrameworkMemory(norm_bytes=8 if kind == "cpu" else 4),
            gathered_inputs=True,
            **(ZAYA_KERNELS if kernels else ZAYA_EAGER),
        ),
    )
    return _deepspeed(made) if engine == "deepspeed" else _native(made)


#: What `trainer.kernels` keep: of a norm the sum in bf16; of an expert its rows, gate and up, and their weighted product;
#: of the loss the logits, which become their gradient; where the vocabulary is split, fp32 logits, what is left of them
#: over the largest, its exponent and the softmax (`trainer.parallel.tensor`).
KERNELS = FrameworkMemory(
    norm_bytes=2,
    fused_activation=True,
    fp32_router=False,
    expert_outputs=False,
    logit_bytes=2,
    split_logit_bytes=16,
)
#: What ZAYA1's parts keep by torch's own operators, counted with `saved_tensors_hooks`: of compressed attention the inputs
#: of both convolutions, the second one's twice, and fp32 inputs of the norms, of keys behind them too; of a scaled residual
#: both sums with the biases; of the router's MLP eight fp32 vectors.
ZAYA_EAGER: dict[str, Any] = {"convolved": (12, 5), "scaled": 2, "router_vectors": 8}
#: The same of `trainer.kernels`: of compressed attention the projections, the pairs of the second convolution and its
#: result; of a scaled residual the layer's output (the norm keeps the other part); of the router's MLP three vectors.
ZAYA_KERNELS: dict[str, Any] = {"convolved": (8, 2), "scaled": 1, "router_vectors": 3}


def _native(made: Software) -> Software:
    return replace(
        made,
        overlap_dp=True,
        overlap_gather=True,
        gathered_experts=True,
        own_master=True,
        streamed=True,
        exposed_ends=True,
        counts_rows=True,
        retention=replace(
            made.retention,
            staging=0.0,
            update=(0, 4),
            whole_buffers=0,
            unwound=True,
            copied_gradients=4 if made.orthogonal_steps else 0,
            scratch=MUON_SCRATCH if made.orthogonal_steps else 0.0,
        ),
        sources=("torch/distributed/fsdp/_fully_shard of torch 2.13", "trainer/engines/native.py"),
    )


#: Muon's bucket of 2^26 elements in bf16: sent, put together, normed in fp32 and in bf16, and results on their way back
#: (`trainer.optim.muon`).
MUON_SCRATCH = 10.0 * (1 << 26)


def _deepspeed(made: Software) -> Software:
    """DeepSpeed reduces in buckets after the backward pass, in fp32 as `trainer.engines.deepspeed` asks for."""
    return replace(
        made,
        retention=replace(made.retention, staging=4.0 * (1 << 27), update=(0, 4)),
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
NANOTRON = FrameworkMemory(
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
MEGATRON = FrameworkMemory(
    norm_bytes=2,
    fused_activation=True,
    fp32_router=True,
    expert_outputs=False,
    logit_bytes=8,
    staging=0.0,
    update=(0, 0),
    whole_buffers=1,
)
