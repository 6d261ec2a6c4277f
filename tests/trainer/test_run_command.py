"""`python -m trainer run`: a layout that can't run is refused before torch is loaded, in words of starting ranks."""

from __future__ import annotations

import pytest

from trainer.cli import main

pytestmark = pytest.mark.unit


@pytest.mark.parametrize(
    ("world", "words", "told"),
    [
        (1, ["parallel.pp=2"], "parallel.pp*dp*cp*tp=2 ranks are laid out, but 1 was started; start 2: torchrun"),
        (2, ["parallel.dp=4"], "=4 ranks are laid out, but 2 were started; start 4: torchrun --nproc-per-node 4"),
        (4, ["parallel.dp=2"], "=2 ranks are laid out, but 4 were started; start 2"),
        (1, ["parallel.tp=3"], "parallel.tp=3 does not divide model.heads=2"),
        (1, ["parallel.schedule=zbv"], "parallel.schedule=zbv with parallel.pp=1"),
        (2, ["parallel.tp=2", "train.engine=deepspeed"], "parallel.tp=2 with train.engine=deepspeed"),
    ],
)  # fmt: skip
def test_a_layout_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    world: int,
    words: list[str],
    told: str,
) -> None:
    for name, value in (("WORLD_SIZE", world), ("RANK", 0), ("LOCAL_RANK", 0), ("LOCAL_WORLD_SIZE", world)):
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    assert main(["run", "experiment=smoke", *words]) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("megaray: ") and printed.count("\n") == 1 and told in printed
