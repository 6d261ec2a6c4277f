"""Stores that tests write to."""

from __future__ import annotations

import importlib
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.request import Request, urlopen

import fsspec
import pytest

if TYPE_CHECKING:
    from tests.faulttol.commands.commanded import Ask


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of an empty bucket on a server of this test's own."""
    pytest.importorskip("s3fs")
    server_module: Any = pytest.importorskip("moto.server")
    boto3: Any = importlib.import_module("boto3")
    server = server_module.ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name, value in {
        "AWS_ACCESS_KEY_ID": "test",
        "AWS_SECRET_ACCESS_KEY": "test",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_ENDPOINT_URL": f"http://{host}:{port}",
        "FSSPEC_S3_ENDPOINT_URL": f"http://{host}:{port}",
    }.items():
        monkeypatch.setenv(name, value)
    # Servers of one process share what they hold: a test before this one may have left some.
    urlopen(Request(f"http://{host}:{port}/moto-api/reset", method="POST"), timeout=30).close()
    boto3.client("s3").create_bucket(Bucket="runs")
    fsspec.config.set_conf_env(fsspec.config.conf)
    yield "s3://runs/checkpoints"
    fsspec.config.conf.pop("s3", None)
    fsspec.filesystem("s3").clear_instance_cache()
    server.stop()


@pytest.fixture
def memory() -> Iterator[str]:
    """URL of an empty folder in memory."""
    yield "memory://runs/checkpoints"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def ask(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ask:
    """Run a command of faulttol in this process, with an empty home."""
    from tests.faulttol.commands.commanded import asker  # loads torch

    return asker(capsys, monkeypatch, tmp_path / "home")


@pytest.fixture(scope="module")
def _saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from tests.faulttol.commands.commanded import save_pair

    return save_pair(tmp_path_factory.mktemp("saved"))


@pytest.fixture
def root(_saved: Path, tmp_path: Path) -> Path:
    """The same state at step 10 of two ranks and at step 20 of three, cut otherwise."""
    return Path(shutil.copytree(_saved, tmp_path / "checkpoints"))
