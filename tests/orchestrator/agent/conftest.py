"""A run's folder, and an agent that is closed afterwards."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from configs.paths import RunPaths
from orchestrator.agent.agent import NodeAgent


@pytest.fixture
def run(tmp_path: Path) -> RunPaths:
    run = RunPaths(tmp_path / "runs" / "a-run")
    run.root.mkdir(parents=True)
    run.config.write_text("x: 1\n")
    return run


@pytest.fixture
def agent() -> Iterator[NodeAgent]:
    made = NodeAgent("node-of-tests")
    yield made
    made.close()
