"""Presets without an experiment are composed without Hydra, to the same configuration."""

from __future__ import annotations

import subprocess
import sys

import pytest

from configs import compose

pytestmark = pytest.mark.unit


@pytest.mark.parametrize("group", [group for group in compose.groups() if group != "experiment"])
def test_every_preset_is_composed_as_hydra_composes_it(group: str) -> None:
    for name in compose.choices(group):
        # A group alone, since what two presets make of each other is the schema's matter.
        ours, hydras = compose._presets({group: name}), compose._composed({group: name})
        assert list(ours) == list(hydras)
        for section, values in hydras.items():
            assert (
                ours[section] == pytest.approx(values)
                if isinstance(values, float)
                else _numbers(ours[section]) == _numbers(values)
            ), (group, name, section)


def _numbers(tree: object) -> object:
    """A tree with the numbers in it as numbers: YAML's own rules take `1e-3` for a word, which the schema reads."""
    if isinstance(tree, dict):
        return {key: _numbers(value) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_numbers(value) for value in tree]
    try:
        return float(tree) if isinstance(tree, str) else tree
    except ValueError:
        return tree


def test_hydra_is_loaded_for_experiments_alone() -> None:
    code = (
        "import sys; from configs.compose import compose; compose(['model=olmoe_1b_7b']); "
        "assert 'hydra' not in sys.modules; compose(['experiment=smoke']); assert 'hydra' in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
