"""What known frameworks do, as their code and documentation say."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, Literal

from configs.schema import EngineName, OptimConfig
from trainer.sizing.model.job import FrameworkMemory, Software

#: What `trainer.kernels` keep: of a norm the sum in bf16; of an expert its rows, gate and up, and their weighted product;
#: of the loss the logits, which become their gradient. Of ZAYA1's parts: of compressed attention the projections, the pairs
#: of the second convolution and its result; of a scaled residual the layer's output (the norm keeps the other part); of
#: the router's MLP three vectors.
KERNELS: dict[str, Any] = {
    "norm_bytes": 2, "fused_activation": True, "fp32_router": False, "expert_outputs": False, "logit_bytes": 2,
    "convolved": (8, 2), "scaled": 1, "router_vectors": 3,
}  # fmt: skip
#: What ZAYA1's parts keep by torch's own operators, counted with `saved_tensors_hooks`: of compressed attention the inputs
#: of both convolutions, the second one's twice, and fp32 inputs of the norms, of keys behind them too; of a scaled residual
#: both sums with the biases; of the router's MLP eight fp32 vectors.
EAGER: dict[str, Any] = {"convolved": (12, 5), "scaled": 2, "router_vectors": 8}
#: Muon's bucket of 2^26 elements in bf16: sent, put together, normed in fp32 and in bf16, and results on their way back
#: (`trainer.optim.muon`).
MUON_SCRATCH = 10.0 * (1 << 26)


def megaray(
    *,
    kind: str = "cuda",
    engine: EngineName | None = None,
    optim: OptimConfig | None = None,
    precision: str = "bf16",
    context: Literal["gather", "ulysses"] = "gather",
    lent_rows: int = 0,
) -> Software:
    """This trainer under an engine (None: native) and an optimizer (None: AdamW), which lends experts of so many rows
    (0: none).

    Both engines accumulate and reduce gradients in fp32; FSDP2 reduces them while other layers go backward, DeepSpeed in
    buckets after the backward pass. Its own kernels run in bf16 on GPUs (`trainer.kernels.choice`), torch's operators
    elsewhere; on a CPU norms aren't one kernel.
    """
    optim = optim or OptimConfig()
    native, kernels = engine != "deepspeed", kind != "cpu" and precision == "bf16"
    steps = optim.orthogonal_steps if optim.kind == "muon" else 0
    moment = 2 if optim.moments == "bf16" else 4  # bytes; Muon has one moment for a matrix between layers
    kept = KERNELS if kernels else EAGER | {"norm_bytes": 8 if kind == "cpu" else 4}
    if native:
        muon = {"copied_gradients": 4, "scratch": MUON_SCRATCH} if steps else {}
        kept = kept | {"staging": 0.0, "whole_buffers": 0} | muon
        sources = "torch/distributed/fsdp/_fully_shard of torch 2.13", "trainer/engines/native.py"
    else:
        kept = kept | {"staging": 4.0 * (1 << 27)}  # in fp32, as `trainer.engines.deepspeed` asks for
        sources = "deepspeed/runtime/zero/stage_1_and_2.py of DeepSpeed 0.19", "trainer/engines/deepspeed.py"
    return Software(
        context=context, selective="feed_forward", eager=not kernels, kernels=kernels, fresh_gradients=True,
        tuned_attention=kind == "cuda",  # torch takes cuDNN's on Hopper and later
        moments=(2 * moment, moment if optim.kind == "muon" else 2 * moment),
        orthogonal_steps=steps, mlp_router=None if kernels else "fp32", square_pieces=True,
        retention=FrameworkMemory(gathered_inputs=True, update=(0, 4), **kept), sources=sources,
        overlap_dp=native, overlap_gather=native, gathered_experts=native, lent_rows=lent_rows, shared_tokens=native,
        fsdp=native, counts_rows=native,
    )  # fmt: skip


def nanotron(before_fix: bool = False) -> Software:
    """Hugging Face's nanotron as its published H100 sweep ran it: sequence parallelism, flash attention, fp32 gradients.

    `before_fix`: before its pipeline waited for transfers without stopping the host.
    """
    return Software(
        name="nanotron", overlap_dp=True, balanced_stages=True, fused_projections=True,
        retention=replace(NANOTRON, host_waits=before_fix, host_slow=not before_fix),
        sources=("github.com/huggingface/nanotron: models/llama.py, nn/attention, optim/, parallel/",),
    )  # fmt: skip


#: In the order of the fields: Triton norms keep their sixteen-bit input; the loss subtracts the maximum into a second fp32
#: copy of the logits; `FP32GradientAccumulator` adds a pass's gradients after it; `DistributedDataParallel` keeps its
#: buckets; ZeRO-1 gathers weights through a flat copy and the own shard; AdamW makes its moments on the first step;
#: `MemoryBuffer` keeps "allgather" and "allgather2". That its host is slow is from the sweep's step times.
NANOTRON = FrameworkMemory(
    norm_bytes=2, logit_bytes=8, late_gradients=2, replica_buckets=2, staging=0.0, update=(2, 2), late_moments=True,
    whole_buffers=2, deferred_frees=True,
)  # fmt: skip
#: Megatron-Core: gradients are added to an fp32 buffer inside the matmul, SwiGLU is one kernel, expert outputs are
#: weighted before the last matmul, record_stream is switched off.
MEGATRON = FrameworkMemory(
    norm_bytes=2, fused_activation=True, fp32_router=True, expert_outputs=False, logit_bytes=8, staging=0.0,
    update=(0, 0), whole_buffers=1,
)  # fmt: skip
