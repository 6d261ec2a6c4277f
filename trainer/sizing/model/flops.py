"""Model FLOPs of a training step, the numerator of MFU, and a device's peak, its denominator."""

from __future__ import annotations

from configs.schema import HardwareConfig, ModelConfig
from trainer.sizing.model import parameters

#: What the numerator counts; shown wherever an MFU is.
NUMERATOR = (
    "6 FLOPs per active matmul weight and token (output projection in, embedding lookup out) "
    "+ causal attention (half of the full score matrix); no recomputation"
)


def train_flops_per_token(model: ModelConfig, sequence: int, full_attention: bool = False) -> float:
    """Forward and backward FLOPs per token at `sequence` tokens per sample.

    Attention multiplies each query with (sequence + 1) / 2 keys and values on average, as causal masking
    needs; `full_attention` counts the whole matrix, as Megatron-LM and MegaScale do: almost twice the term. For a GPT
    of depth L, width h and vocabulary V that is their 72 L h^2 (1 + s/6h + V/12Lh).
    """
    head_dim = model.head_dim + (model.rope_head_dim if model.attention == "mla" else 0)
    per_key = 2 * model.heads * (head_dim + model.head_dim)  # scores, then values, 2 FLOPs per multiply-add
    keys = sequence if full_attention else keys_seen(model, sequence)
    attention = 3 * (model.layers + model.mtp_layers) * per_key * keys
    return 6.0 * parameters.count(model).matmul + attention


def keys_seen(model: ModelConfig, sequence: int) -> float:
    """Keys that a query sees on average, causal and within the model's window."""
    window = min(model.window or sequence, sequence)
    return window - window * (window - 1) / (2 * sequence)


def peak(hardware: HardwareConfig, precision: str) -> float | None:
    """Dense peak of one device in FLOP/s at `precision`, or None where it is unknown."""
    tflops = hardware.peak_tflops.get(precision)
    return None if tflops is None else tflops * 1e12


def basis(hardware: HardwareConfig, precision: str) -> str:
    """Numerator, peak and precision of an MFU, or why there is none."""
    known = peak(hardware, precision)
    if known is None:
        return f"none: {hardware.name} has no {precision} peak on record"
    return f"{NUMERATOR}; peak {known / 1e12:g} TFLOP/s {precision}, {hardware.name}"
