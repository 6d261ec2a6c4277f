"""A Ray cluster from the outside: find it and connect to it."""

from __future__ import annotations

import contextlib
import logging
import os
import socket
from pathlib import Path
from typing import Any

import grpc
import ray

from configs.errors import UserError
from orchestrator.local import settings

NAMESPACE = "megaray"
"""Ray namespace of everything detached."""
PROBE_SECONDS = 5.0
_CODE = Path(__file__).parents[1]
_FORMS = "type HOST:PORT of a Ray head (6379 by default) or http://HOST:8265 of its dashboard"
WANTS_TOKEN = "put the cluster's token into RAY_AUTH_TOKEN, or its file into RAY_AUTH_TOKEN_PATH"


class Unreachable(UserError):
    """No Ray head answers at an address."""


def resolve_address(address: str) -> str:
    """`auto` as Ray's own tools take it: the newest Ray of this machine; any other address as it is.

    Raises:
        UserError: where there is none.
    """
    if address != "auto":
        return address
    # Loaded here: Ray keeps it private, and nothing else needs it.
    from ray._private import services

    try:
        # What is typed comes before the variable; Ray would take the variable.
        with _variable("RAY_ADDRESS", None):
            seen = services.canonicalize_bootstrap_address("auto")
    except (ConnectionError, ValueError) as error:
        raise UserError(f"--address 'auto': {str(error).splitlines()[0]}") from None
    if seen is None:
        raise UserError(f"--address 'auto': no Ray runs on this machine; {_FORMS}")
    return str(seen)


@contextlib.contextmanager
def _variable(name: str, value: str | None) -> Any:
    """A variable of the environment set otherwise, or unset, for a while."""
    before = os.environ.pop(name, None)
    if value is not None:
        os.environ[name] = value
    try:
        yield
    finally:
        os.environ.pop(name, None)
        if before is not None:
            os.environ[name] = before


def check_address(address: str) -> tuple[str, int]:
    """Host and port of an address; of `auto`, what it may stand for is looked for later.

    Raises:
        UserError: where it isn't one.
    """
    host, _, port = ("auto:0" if address == "auto" else address).rpartition(":")
    if not host or not port.isdigit() or "/" in host:
        raise UserError(f"--address '{address}' is not an address of a Ray cluster; {_FORMS}")
    return host.strip("[]"), int(port)


def probe(address: str, token: str) -> bool:
    """Whether the Ray at an address wants a token; asked before Ray itself waits for an answer.

    Args:
        address: HOST:PORT.
        token: of this account; empty where it has none.

    Raises:
        UserError: where no Ray head answers there, or it wants another token.
    """
    host, port = check_address(address)
    try:
        socket.create_connection((host, port), timeout=PROBE_SECONDS).close()
    except (OSError, OverflowError) as error:
        raise Unreachable(f"--address '{address}': nobody answers there ({error}); {_FORMS}") from None
    if _accepts(address, ""):
        return False
    if not token:
        raise UserError(f"--address '{address}': this Ray needs a token, and none is set here; {WANTS_TOKEN}")
    if not _accepts(address, token):
        raise UserError(f"--address '{address}': this Ray refuses the token that is set here; {WANTS_TOKEN}")
    return True


def _accepts(address: str, token: str) -> bool:
    """Whether a Ray head answers without a token, or with this one."""
    shown = [("authorization", f"Bearer {token}")] if token else []
    # Like Ray's own channels this one ignores proxies. The question is the health check of `ray health-check`.
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        ask = channel.unary_unary("/ray.rpc.NodeInfoGcsService/CheckAlive")
        try:
            ask(b"", timeout=PROBE_SECONDS, metadata=shown)
        except grpc.RpcError as error:
            if error.code() in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
                return False
            if error.code() is not grpc.StatusCode.UNIMPLEMENTED:  # another version of Ray; it says so itself
                raise Unreachable(
                    f"--address '{address}': what answers there is no Ray head ({error.code().name.lower()}); {_FORMS}"
                ) from None
    return True


def connect(address: str, token_file: str = "") -> None:
    """Connect this process to a Ray cluster, with a token where the cluster wants one.

    Args:
        address: HOST:PORT, or `auto`.
        token_file: where the token of a local Ray is, if this account has none of its own.

    Raises:
        UserError: where there is none.
    """
    address = resolve_address(address)
    token = settings.token(token_file)
    _authenticate(token if probe(address, token) else "")
    try:
        # Workers import from the folder that this process is in: it must be the code's, and no folder of the user's whose
        # files may have the names of our packages.
        with contextlib.chdir(_CODE):
            ray.init(
                address=address, namespace=NAMESPACE, log_to_driver=False, logging_level=logging.ERROR,
                configure_logging=False,
            )  # fmt: skip
    except (ConnectionError, RuntimeError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(f"--address '{address}' is not a usable Ray cluster: {first}") from None


def _authenticate(token: str) -> None:
    """Have Ray show a token, or none. It reads its settings once, at the import; this has it read them again."""
    from ray._private.authentication import authentication_token_setup as setup

    os.environ["RAY_AUTH_MODE"] = "token" if token else "disabled"
    if token:
        os.environ["RAY_AUTH_TOKEN"] = token
    setup.Config.initialize("")
    setup.AuthenticationTokenLoader.instance().reset_cache()


def disconnect() -> None:
    """Leave the cluster; what is detached continues."""
    ray.shutdown()


def slots_by_node(resource: str) -> list[int]:
    """Units of `CPU` or `GPU` of each live node of the connected cluster."""
    return [int(node["Resources"].get(resource, 0)) for node in ray.nodes() if node["Alive"]]


def runtime_environment() -> dict[str, Any]:
    """The working directory that this job was submitted with; empty where there is none."""
    env = dict(ray.get_runtime_context().runtime_env)
    return {"working_dir": env["working_dir"]} if env.get("working_dir") else {}
