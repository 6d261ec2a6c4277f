"""Stores that tests write to."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from typing import Any

import fsspec
import pytest


@pytest.fixture
def s3(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """URL of a bucket on a server of this test's own."""
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
