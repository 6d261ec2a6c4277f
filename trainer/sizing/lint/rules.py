"""The lint's rules as data (`configs/lint.yaml`), and the efficiencies that they rest on."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Literal

import yaml

from configs.hardware import HardwareConfig
from configs.section import Section

FILE = Path(__file__).resolve().parents[3] / "configs" / "lint.yaml"


class LintRule(Section):
    """One rule."""

    name: str
    rule: str
    """What it asks for."""
    reason: str
    """Why."""
    source: str
    """Who says so."""
    kinds: tuple[Literal["cuda", "rocm"], ...] = ("cuda", "rocm")
    """Devices that it is for."""
    architectures: tuple[str, ...] = ()
    """Generations that it is for; empty for all."""
    check: str
    """Function that looks for it; `none` where a model's shape can't show it."""
    numbers: dict[str, int] = {}
    """What the check compares with."""

    def applies(self, hardware: HardwareConfig) -> bool:
        """Whether the rule is for this device."""
        if hardware.kind not in self.kinds:
            return False
        return not self.architectures or hardware.architecture in self.architectures


@cache
def rules() -> tuple[LintRule, ...]:
    """All rules, in the order of the file."""
    return tuple(LintRule.model_validate(rule) for rule in yaml.safe_load(FILE.read_text()))


REFERENCE_TILE = {"cuda": (128, 256), "rocm": (256, 256)}
"""Output tile that a device's best matmuls use; libraries choose smaller ones where these fit badly."""


def wave_efficiency(rows: int, columns: int, tile: tuple[int, int], units: int, experts: int = 1) -> float:
    """Share of the waves' places that useful tiles fill: tiles / (waves * units), in whole tiles, 0 to 1."""
    tiles = tile_count(rows, columns, tile, experts)
    return tiles / (-(-tiles // units) * units)


def tile_count(rows: int, columns: int, tile: tuple[int, int], experts: int = 1) -> int:
    """Tiles of the outputs of all experts, each with its share of the rows."""
    each = -(-rows // experts)
    return experts * -(-each // tile[0]) * -(-columns // tile[1])


def balance_width(peak_tflops: float, gbps: float) -> float:
    """Expert width at which compute takes as long as the exchange of tokens (R = 1).

    MegaScale-MoE (arXiv 2505.11432): R = 3/2 * width * bandwidth / peak, bf16, one direction, FLOP/s and bytes/s.
    """
    return peak_tflops * 1e12 / (1.5 * gbps * 1e9)
