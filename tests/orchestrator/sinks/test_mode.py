"""When a run is logged to W&B's server, and when to a file."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.compose import compose
from orchestrator.sinks.mode import mode_of

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

SMOKE = compose(["experiment=smoke"])


@pytest.mark.parametrize(
    ("setting", "environment", "netrc", "mode"),
    [
        ("auto", {}, "", "offline"),
        ("auto", {"WANDB_API_KEY": "0" * 40}, "", "online"),
        ("auto", {}, "machine api.wandb.ai login user password x", "online"),
        ("auto", {}, "machine example.org login user password x", "offline"),
        ("auto", {}, "machine", "offline"),  # broken
        ("offline", {"WANDB_API_KEY": "0" * 40}, "", "offline"),
        ("online", {"WANDB_MODE": "disabled"}, "", "disabled"),
        ("offline", {"WANDB_MODE": "auto", "WANDB_API_KEY": "0" * 40}, "", "online"),
    ],
)
def test_the_environment_comes_before_the_setting_and_auto_wants_a_key(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, setting: str, environment: dict[str, str], netrc: str, mode: str
) -> None:  # fmt: skip
    for name in ("WANDB_MODE", "WANDB_API_KEY", "NETRC"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    if netrc:
        (tmp_path / ".netrc").write_text(netrc)
        (tmp_path / ".netrc").chmod(0o600)
    tracking = SMOKE.tracking.model_copy(update={"wandb": setting})
    assert mode_of(SMOKE.model_copy(update={"tracking": tracking})) == mode
