"""What the first step would wait for beside its work, begun while the model is built and loaded.

A device's kernels are loaded when they are first launched (CUDA's guide, "Lazy Loading"; HIP does alike), each library's
in 0.1 to 1 s, and this project's are imported when they are first used. Nothing that is trained is touched.
"""

from __future__ import annotations

import importlib
import threading
from contextlib import suppress

import torch
import torch.nn.functional as F

from configs.model import ModelConfig
from configs.schema import RunConfig
from trainer.engines.common import DTYPES
from trainer.kernels.choice import usable

_KERNELS = ("accumulate", "activation", "adamw", "loss", "norm", "route", "rows", "sorting")
_OF_ATTENTION = {"cca": ("compressed", "mlp", "residual")}
_ROWS = 128
"""Of what libraries' kernels are called with."""


def modules(model: ModelConfig) -> list[str]:
    """Those that a step on a device imports."""
    names = (*_KERNELS, *_OF_ATTENTION.get(model.attention, ()))
    return [f"trainer.kernels.{name}" for name in names]


def begin(config: RunConfig, device: torch.device) -> threading.Thread | None:
    """Begin it in a thread; None where a step on this device waits for nothing of the kind."""
    if device.type != "cuda":
        return None
    thread = threading.Thread(target=_warm, args=(config, device), name="warm", daemon=True)
    thread.start()
    return thread


def _warm(config: RunConfig, device: torch.device) -> None:
    # A convenience: what can't be had here fails where it is needed, with all that is to be said about it.
    with suppress(Exception):
        torch.cuda.set_device(device)
        dtype = DTYPES[str(config.train.precision)]
        for touch in (_product, _attention, _grouped):
            with suppress(Exception):
                touch(config.model, dtype, device)
        if usable(device):
            for name in modules(config.model):
                importlib.import_module(name)


def _product(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.zeros(_ROWS, model.hidden, dtype=dtype, device=device)
    F.linear(x, x)


def _attention(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    q = torch.zeros(1, 1, _ROWS, model.head_dim, dtype=dtype, device=device, requires_grad=True)
    F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()


def _grouped(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.zeros(_ROWS, model.hidden, dtype=dtype, device=device)
    weights = torch.zeros(1, model.hidden, _ROWS, dtype=dtype, device=device)
    F.grouped_mm(x, weights, offs=torch.tensor([_ROWS], dtype=torch.int32, device=device))
