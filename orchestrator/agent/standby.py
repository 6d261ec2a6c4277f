"""An interpreter that has imported a rank's program, or without one its libraries alone, and waits to become one.

    python -m orchestrator.agent.standby [PROGRAM…]

It reads its order from the socket that is its standard input: the environment and the words as JSON, with the log's file
descriptor. Then it is that rank, as if it had been started anew, less the seconds that imports take.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
import importlib
import os
import runpy
import socket
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from configs.errors import from_json
from configs.rank import die_with_parent

if TYPE_CHECKING:
    from configs.schema import RunConfig

READY = b"r"
_LOW, _NORMAL = "5", "0"
"""Of an autogroup: a quarter of a processor beside a busy rank, so that it is ready after some ten seconds. Imports cost
the same at any pace, and a rank that fails before they are done waits for the rest of them."""
_MODULES = ("trainer.loop",)
_ENGINES = {
    "native": ("trainer.engines.native", "torch._dynamo"),  # the compiler comes with the first FSDP module
    "deepspeed": ("trainer.engines.deepspeed",),
}
LIBRARIES = (
    "torch.distributed.fsdp", "torch.distributed.tensor.parallel", "torch._dynamo", "numpy", "hydra", "pydantic", "yaml",
    "fsspec", "psutil", "xxhash",
)  # fmt: skip
"""What all programs need, of which torch takes nearly all the time."""
_OURS = ("collectives", "configs", "faulttol", "orchestrator", "trainer")
_AXES = {"pp": "trainer.parallel.pipeline", "cp": "torch.nn.attention.bias"}


def main(program: Sequence[str]) -> None:
    """Import, wait, become a rank."""
    die_with_parent(os.environ)
    mark = _environ_address(b"MEGARAY_MARK")
    _set_autogroup_nice(_LOW)
    with socket.socket(fileno=os.dup(0)) as line:
        failed = False
        try:
            _import(program)
        except Exception:
            # Who has taken it meanwhile gets a rank all the same: that imports anew, and its log says what is wrong.
            failed = True
            line.shutdown(socket.SHUT_RD)
        else:
            # It was taken meanwhile: the order is there, and nobody listens any more.
            with contextlib.suppress(OSError):
                line.sendall(READY)
        data, log = _receive_order(line)
        if not data:  # nobody needs it any more
            os._exit(int(failed))
    order = from_json(data)
    _set_autogroup_nice(_NORMAL)
    _overwrite_environ(mark, order["env"].get("MEGARAY_MARK", ""))
    if not program:
        _reimport_from(order["env"])
    _run_as_rank(order["env"], order["words"], log)


def _receive_order(line: socket.socket) -> tuple[bytes, int]:
    """The order and the log's file descriptor; no bytes where none comes.

    Where an agent closes its end before it has read `READY`, this end fails after all that was sent, and doesn't just end.
    """
    data, descriptors = b"", list[int]()
    with contextlib.suppress(ConnectionResetError):
        data, descriptors, _, _ = socket.recv_fds(line, 1 << 16, 1)
        while part := line.recv(1 << 16):
            data += part
    return data, descriptors[0] if descriptors else -1


def _import(program: Sequence[str]) -> None:
    config = _config(program)
    for name in (*_MODULES, *_engine(config)) if program else LIBRARIES:
        importlib.import_module(name)
    _warm()
    if _on_devices(config):
        import torch

        torch.cuda.is_available()  # opens the driver, which takes a second once nobody else has it open, and no context
    gc.collect()
    gc.freeze()  # the rank collects before its first step, and need not walk through all modules for it


def _warm() -> None:
    """Begin what the first step would wait for."""
    with contextlib.suppress(Exception):
        from triton.runtime.cache import triton_key

        triton_key()  # half a second of hashing, kept by Triton


def _config(program: Sequence[str]) -> RunConfig | None:
    """The configuration among the words; None where there is none that can be read."""
    if "--config" not in program[:-1]:
        return None
    from configs.compose import load

    try:
        return load(Path(program[program.index("--config") + 1]))
    except Exception:  # the rank itself will say what is wrong with it
        return None


def _on_devices(config: RunConfig | None) -> bool:
    return config is not None and config.hardware.kind != "cpu"


def _engine(config: RunConfig | None) -> list[str]:
    """Modules that a configuration makes a rank load: its engine's, what its axes need, and kernels."""
    if config is None:
        return []
    parallel = config.parallel
    axes = [module for axis, module in _AXES.items() if (getattr(parallel, axis) or 1) > 1]
    kernels = []
    if _on_devices(config) and config.train.engine == "native":
        from trainer.kernel_warmup import kernel_modules

        kernels = kernel_modules(config.model)
    return [*_ENGINES.get(str(config.train.engine), ()), *axes, *kernels]


def _reimport_from(env: Mapping[str, str]) -> None:
    """Import from where a rank does: what is of this project comes anew, from the run's own code."""
    old, new = (source.get("PYTHONPATH", "").split(os.pathsep) for source in (os.environ, env))
    paths = [path for path in new if path]
    sys.path[:] = paths + [path for path in sys.path if path not in old and path not in paths]
    for name in [name for name in sys.modules if name.partition(".")[0] in _OURS]:
        del sys.modules[name]
    importlib.invalidate_caches()


def _run_as_rank(env: dict[str, str], words: Sequence[str], log: int) -> None:
    nothing = os.open(os.devnull, os.O_RDONLY)
    for old, new in ((nothing, 0), (log, 1), (log, 2)):
        os.dup2(old, new)
    os.close(nothing)
    os.close(log)
    os.environ.clear()
    os.environ.update(env)
    sys.argv = ["-m", *words[2:]]  # as the interpreter leaves it before it has found the module
    runpy.run_module(words[1], run_name="__main__", alter_sys=True)


def _set_autogroup_nice(value: str) -> None:
    """Set how far this session yields the processor to others; where the kernel has no such thing, it doesn't."""
    try:
        Path("/proc/self/autogroup").write_text(value)
    except OSError:
        pass


def _environ_address(name: bytes) -> int:
    """Where the kernel put a variable's value when the process started; what `/proc` shows is read from there."""
    libc = ctypes.CDLL(None)
    libc.getenv.restype = ctypes.c_void_p
    return int(libc.getenv(name) or 0)


def _overwrite_environ(address: int, value: str) -> None:
    """Write over a variable's first value, which has the same length, so that others find this process by it."""
    if address and len(value) == len(ctypes.string_at(address)):
        ctypes.memmove(address, value.encode(), len(value))


if __name__ == "__main__":
    main(sys.argv[1:])
