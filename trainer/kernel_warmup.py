"""Loading kernels and modules that the first step would wait for, while the model is built and loaded.

A device's kernels are loaded when they are first launched (CUDA's guide, "Lazy Loading"; HIP does alike), each library's
in 0.1 to 1 s, and this project's are imported when they are first used. No state of the training is touched.
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
"""Rows of the inputs that libraries' kernels are launched with."""


def kernel_modules(model: ModelConfig) -> list[str]:
    """Modules of this project's kernels that a step on a device imports."""
    names = (*_KERNELS, *_OF_ATTENTION.get(model.attention, ()))
    return [f"trainer.kernels.{name}" for name in names]


def start(config: RunConfig, device: torch.device) -> threading.Thread | None:
    """Start the warm-up in a thread; None on a CPU, which needs none."""
    if device.type != "cuda":
        return None
    thread = threading.Thread(target=_warm_up, args=(config, device), name="warm", daemon=True)
    thread.start()
    return thread


def _warm_up(config: RunConfig, device: torch.device) -> None:
    # Optional: what can't be loaded here fails again where it is needed, with its full error.
    with suppress(Exception):
        torch.cuda.set_device(device)
        dtype = DTYPES[str(config.train.precision)]
        for launch in (_matmul, _attention, _grouped):
            with suppress(Exception):
                launch(config.model, dtype, device)
        if usable(device):
            for name in kernel_modules(config.model):
                importlib.import_module(name)


def _matmul(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.zeros(_ROWS, model.hidden, dtype=dtype, device=device)
    F.linear(x, x)


def _attention(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    q = torch.zeros(1, 1, _ROWS, model.head_dim, dtype=dtype, device=device, requires_grad=True)
    F.scaled_dot_product_attention(q, q, q, is_causal=True).sum().backward()


def _grouped(model: ModelConfig, dtype: torch.dtype, device: torch.device) -> None:
    x = torch.zeros(_ROWS, model.hidden, dtype=dtype, device=device)
    weights = torch.zeros(1, model.hidden, _ROWS, dtype=dtype, device=device)
    F.grouped_mm(x, weights, offs=torch.tensor([_ROWS], dtype=torch.int32, device=device))
