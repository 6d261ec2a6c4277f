"""What is measured: a run's configuration, its tokens, and the FLOPs that count."""

from __future__ import annotations

import re
import sysconfig
from pathlib import Path

import torch
from torch import Tensor

from configs.compose import choices, compose
from configs.errors import UserError
from configs.schema import RunConfig
from trainer.bench.options import Options
from trainer.sizing.ask import catalogue
from trainer.sizing.model.flops import train_flops_per_token
from trainer.sizing.search.runnable import refusal

_AHEAD = 32
"""Batches that a bench goes round in."""


def config_of(options: Options, world: int, on_gpu: bool) -> RunConfig:
    """The configuration of the measured step: four samples of 4096 tokens on each place unless said otherwise."""
    named = any(word.startswith("hardware=") for word in options.overrides)
    hardware = preset_of(torch.cuda.get_device_name()) if on_gpu and not named else "cpu"
    words = [f"model={options.model}", f"hardware={hardware}", "train.engine=native", "train.micro_batch=4",
             "data.sequence=4096", f"train.precision={'bf16' if on_gpu else 'fp32'}"]  # fmt: skip
    if options.layers is not None:
        words.append(f"model.layers={options.layers}")
    config = compose([*words, *options.overrides])
    if config.parallel.dp is None:
        rest = config.parallel.size("pp") * config.parallel.size("cp") * config.parallel.size("tp")
        if world % rest:
            raise UserError(
                f"--gpus {world} doesn't divide by parallel.pp*cp*tp={rest}; give a multiple of {rest}"
            )
        config = compose([*words, *options.overrides, f"parallel.dp={world // rest}"])
    if config.train.global_batch is None:
        batch = config.train.micro_batch * config.parallel.size("dp")
        batch *= 4 * config.parallel.size("pp") if config.parallel.size("pp") > 1 else 1
        train = config.train.model_copy(update={"global_batch": batch})
        config = config.model_copy(update={"train": train})
    return config


def refuse(config: RunConfig, world: int) -> None:
    """As a run is refused, before ranks are started.

    Raises:
        UserError: where the trainer doesn't run the configuration, or not on so many ranks.
    """
    why = refusal(config)
    if why:
        raise UserError(why)
    ranks = config.parallel.ranks
    if ranks != world:
        raise UserError(
            f"--gpus {world}, but parallel.pp*dp*cp*tp={ranks} ranks are laid out; type --gpus {ranks}, or leave "
            "parallel.dp out"
        )


_FORMS = frozenset({"pcie", "nvl"})
"""Cards whose peaks, memory and links differ from those of the module of the same name."""


def preset_of(device: str) -> str:
    """The hardware preset of a device that calls itself so, as `NVIDIA H100 80GB HBM3` or `AMD Instinct MI300X`.

    Raises:
        UserError: where no preset is of this very device, by model, form and memory.
    """
    words = re.findall(r"[a-z0-9]+", device.lower())
    known = choices("hardware")
    for name in sorted(known, key=len, reverse=True):
        parts = name.split("_")
        if not set(parts) <= set(words) or _FORMS & set(words) - set(parts):
            continue
        sizes = [float(word[:-2]) for word in words if re.fullmatch(r"\d+gb", word)]
        memory = catalogue.device(name).memory_gib
        if memory is None or all(abs(size / memory - 1) < 0.1 for size in sizes):
            return name
    raise UserError(
        f"the device '{device}' has no hardware preset; type hardware=NAME, one of {', '.join(known)}, to be counted with "
        "that one's peaks and memory"
    )


def flops_of(config: RunConfig) -> float:
    """FLOPs of a step over all ranks, forward and backward, as `trainer.sizing.model.flops.NUMERATOR` counts them."""
    tokens = (config.train.global_batch or 1) * config.data.sequence
    return train_flops_per_token(config.model, config.data.sequence) * tokens


class BatchTokens:
    """Micro-batches that differ from step to step: bytes of real text, or random ids.

    They are on the device beforehand, as a run's are, whose feed reads ahead.
    """

    def __init__(self, config: RunConfig, device: torch.device, real: bool, seed: int) -> None:
        self._config, self._device = config, device
        self._generator = torch.Generator().manual_seed(seed)
        self._text = _text() if real else None
        self._ahead: list[Tensor] = []
        self._next = 0

    def draw(self, samples: int) -> Tensor:
        """[samples, sequence + 1] int64 on the device, always of so many samples."""
        if not self._ahead:
            self._ahead = [self._drawn(samples) for _ in range(_AHEAD)]
        self._next += 1
        return self._ahead[self._next % _AHEAD]

    def _drawn(self, samples: int) -> Tensor:
        length = self._config.data.sequence + 1
        if self._text is None:
            drawn = torch.randint(self._config.model.vocab, (samples, length), generator=self._generator)
        else:
            starts = torch.randint(len(self._text) - length, (samples,), generator=self._generator)
            drawn = torch.stack([self._text[start : start + length] for start in starts.tolist()]).long()
        return drawn.to(self._device)


def _text() -> Tensor:
    """Bytes of the standard library's source."""
    files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
    return torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
