"""The look at a node before it serves: what is bad bars it, what can't be looked at doesn't."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from configs.rank import free_port
from faulttol import proc
from faulttol.preflight import device, host
from faulttol.preflight.host import ReachabilityServer
from faulttol.preflight.result import Check, CheckOutcome, Preflight
from orchestrator.agent import checks
from orchestrator.agent.checks import NodeHealth, NodeHealthCheck
from tests.orchestrator.agent.local_runtime import until

pytestmark = [pytest.mark.dist, pytest.mark.timeout(120)]


@pytest.fixture
def beacon() -> Iterator[ReachabilityServer]:
    made = ReachabilityServer()
    yield made
    made.close()


def test_only_what_is_bad_bars_a_node() -> None:
    found = Preflight(
        (
            Check("a", CheckOutcome.GOOD, "fine"),
            Check("b", CheckOutcome.UNKNOWN, "no tool"),
            Check("c", CheckOutcome.BAD, "wrong"),
        )
    )
    assert found.why == "c: wrong" and found.lines()[-1] == "not fit: c: wrong"
    assert Preflight(found.checks[:2]).why == "" and Preflight(found.checks[:2]).lines()[-1] == "fit to serve"
    assert Preflight.from_json(json.loads(json.dumps(found.to_json()))) == found
    with pytest.raises(ValueError, match="not a preflight"):
        Preflight.from_json({"checks": [{"name": "a"}]})


def test_an_instrument_that_breaks_cannot_tell() -> None:
    check = host.run_check("x", lambda: 1 // 0)  # type: ignore[arg-type, return-value]
    assert check.outcome is CheckOutcome.UNKNOWN and "ZeroDivisionError" in check.text


def test_memory_is_looked_at_against_what_ranks_need(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert {one.outcome for one in host.quick_checks(tmp_path)} == {CheckOutcome.GOOD}
    usage = shutil.disk_usage(tmp_path)._replace(free=host.LEAST_SHARED // 2)
    monkeypatch.setattr(host.shutil, "disk_usage", lambda _: usage)
    assert Preflight(tuple(host.quick_checks(tmp_path))).why.startswith("shared memory: 8 MiB free")
    monkeypatch.undo()
    short = SimpleNamespace(available=host.LEAST_MEMORY - 1, total=8 << 30)
    monkeypatch.setattr(host.psutil, "virtual_memory", lambda: short)
    assert checks.preflight() == "host memory: 0.5 of 8.0 GiB available"


def test_loopback_is_proved_and_a_torn_one_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    assert host.loopback()[0] is CheckOutcome.GOOD
    sent = iter([b"a" * (1 << 16)])
    monkeypatch.setattr(host.os, "urandom", lambda _: next(sent))
    real = socket.create_connection

    class Torn:
        def __init__(self, *words: object) -> None:
            self.line = real(*words)  # type: ignore[arg-type]

        def __enter__(self) -> Torn:
            return self

        def __exit__(self, *_: object) -> None:
            self.line.close()

        def sendall(self, data: bytes) -> None:
            self.line.sendall(data[:-1] + b"b")

    monkeypatch.setattr(host.socket, "create_connection", Torn)
    assert host.loopback() == (CheckOutcome.BAD, "bytes sent over 127.0.0.1 came back different")


def test_a_node_that_reaches_none_of_several_is_cut_off(beacon: ReachabilityServer) -> None:
    here, away, gone = f"127.0.0.1:{beacon.port}", f"127.0.0.1:{free_port()}", "127.0.0.1:no"
    assert host.neighbours([]) == (CheckOutcome.GOOD, "no neighbours")
    assert host.neighbours([here, here])[0] is CheckOutcome.GOOD
    assert host.neighbours([here, away]) == (CheckOutcome.UNKNOWN, f"doesn't reach {away}")
    assert host.neighbours([away])[0] is CheckOutcome.UNKNOWN, "one may be at fault itself"
    assert host.neighbours([away, gone])[0] is CheckOutcome.BAD


def test_somebody_else_on_the_port_is_no_neighbour() -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        threading.Thread(target=lambda: other.accept()[0].sendall(b"HTTP/1.1 "), daemon=True).start()
        assert host.neighbours([f"127.0.0.1:{other.getsockname()[1]}"])[0] is CheckOutcome.UNKNOWN


def test_a_tool_that_fails_or_hangs_is_a_lost_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\necho Unable to determine the device handle\nexit 15\n")
    tool.chmod(0o755)
    outcome, text = host.device_tool(str(tool))
    assert outcome is CheckOutcome.BAD and "exit code 15: Unable to determine" in text
    tool.write_text("#!/bin/sh\nexec sleep 60\n")
    monkeypatch.setattr(host, "_TOOL_SECONDS", 0.2)
    assert host.device_tool(str(tool))[0] is CheckOutcome.BAD
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert host.device_tool() == (CheckOutcome.GOOD, "no devices, or no tool that lists them")


def test_a_tool_that_no_signal_ends_is_not_waited_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As one that stands in the driver: a node whose check hung with it would never be barred."""
    tool, pid = tmp_path / "nvidia-smi", tmp_path / "pid"
    tool.write_text(f"#!/bin/sh\necho $$ > {pid}\nexec sleep 60\n")
    tool.chmod(0o755)
    monkeypatch.setattr(host, "_TOOL_SECONDS", 0.3)
    monkeypatch.setattr(proc, "_KILLED_SECONDS", 0.1)
    monkeypatch.setattr(subprocess.Popen, "kill", lambda self: None)
    outcome, text = host.device_tool(str(tool))
    assert outcome is CheckOutcome.BAD and "the driver hangs" in text
    os.kill(int(pid.read_text()), 9)  # it is still there


def test_a_beacon_outlives_a_moment_without_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    inner, failed = socket.socket.accept, threading.Event()

    def accept(self: socket.socket) -> object:
        if not failed.is_set():
            failed.set()
            raise OSError(24, "Too many open files")
        return inner(self)

    monkeypatch.setattr(socket.socket, "accept", accept)
    beacon = ReachabilityServer()
    assert failed.wait(10) and host.neighbours([f"127.0.0.1:{beacon.port}"])[0] is CheckOutcome.GOOD
    beacon.close()


def test_arithmetic_is_proved_on_this_machine() -> None:
    found = device.checks()
    assert not Preflight(tuple(found)).why
    assert {one.name for one in found} >= {"cpu exactness", "cpu matmul"}
    rate = next(one.text for one in found if one.name == "cpu matmul")
    assert float(rate.split()[0]) > 0


class _Wrong(torch.Tensor):
    """A product with one element off by one."""

    def __matmul__(self, other: torch.Tensor) -> torch.Tensor:
        product = torch.Tensor.__matmul__(self.as_subclass(torch.Tensor), other.as_subclass(torch.Tensor))
        if product.dtype is torch.bfloat16:
            product[17, 5] += 1
        return product


def test_one_wrong_element_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    signs = device._sparse_signs
    monkeypatch.setattr(device, "_sparse_signs", lambda *words: signs(*words).as_subclass(_Wrong))
    outcome, text = device.exactness(torch.device("cpu"), 64)
    assert (outcome, text) == (
        CheckOutcome.BAD,
        "an exact matmul of whole numbers is wrong in 1 of 64 columns",
    )


def test_whole_numbers_stay_within_what_bf16_holds() -> None:
    generator = torch.Generator().manual_seed(1)
    for size in (64, 512, 1024):
        share = min(1.0, (64 / size) ** 0.5)
        left, right = (device._sparse_signs(size, share, generator) for _ in range(2))
        assert int((left @ right).abs().max()) <= 256 and int((left @ right).abs().max()) > 4


def test_a_product_that_differs_from_itself_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device.torch, "equal", lambda *_: False)
    assert device.exactness(torch.device("cpu"), 64) == (
        CheckOutcome.BAD,
        "the same matmul twice gives different results",
    )


def test_a_device_slower_than_its_neighbours_is_named() -> None:
    outcome, text = device.slow_devices({"cuda:0": 10.0, "cuda:1": 7.9, "cuda:2": 10.0, "cuda:3": 10.1})
    assert outcome is CheckOutcome.BAD and "cuda:1 0.79" in text and "cuda:0" not in text
    assert device.slow_devices({"cuda:0": 10.0, "cuda:1": 8.1, "cuda:2": 10.0})[0] is CheckOutcome.GOOD
    assert device.slow_devices({"cuda:0": 10.0, "cuda:1": 1.0})[0] is CheckOutcome.GOOD, (
        "of two nobody could say which"
    )


def test_the_command_says_it_for_people_and_machines(beacon: ReachabilityServer) -> None:
    words = [sys.executable, "-m", "faulttol", "preflight", "--quick"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=60, check=True)
    assert (
        done.stdout.rstrip().endswith("fit to serve")
        and "GOOD" in done.stdout
        and "matmul" not in done.stdout
    )
    peers = f"127.0.0.1:{free_port()},127.0.0.1:{free_port()}"
    bad = subprocess.run(
        [*words, "--json", "--peers", peers], capture_output=True, text=True, timeout=60, check=False
    )
    assert bad.returncode == 1 and "neighbours: doesn't reach" in json.loads(bad.stdout)["bad"]


# ---- the agent's side ----


def test_a_node_of_cores_is_looked_at_without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "run_full_check", lambda _: pytest.fail("a process with torch"))
    check = NodeHealthCheck("auto")
    assert check.poll() == NodeHealth(False, "", check.poll().port)
    until(lambda: check.poll().checked, "the first look")
    assert check.poll().problem == ""
    monkeypatch.setattr(checks.host, "quick_checks", lambda: [Check("host memory", CheckOutcome.BAD, "none")])
    until(lambda: check.poll().problem == "host memory: none", "that it is bad now")
    monkeypatch.setattr(checks.host, "quick_checks", lambda: 1 // 0)
    until(lambda: check.poll().problem == "", "an instrument that breaks bars nobody")
    check.close()


def test_a_node_with_devices_proves_them_and_again_only_while_idle(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[float] = []
    bad = Preflight((Check("cuda:3 exactness", CheckOutcome.BAD, "wrong"),))
    monkeypatch.setattr(checks.host, "device_tool_name", lambda: "nvidia-smi")
    monkeypatch.setattr(checks, "run_full_check", lambda _: made.append(time.monotonic()) or bad)
    monkeypatch.setattr(checks, "_RETRY_SECONDS", 0.0)
    check = NodeHealthCheck("auto")
    until(lambda: check.poll(idle=False).problem == "cuda:3 exactness: wrong", "the finding")
    for _ in range(20):
        check.poll(idle=False)
        time.sleep(0.01)
    assert len(made) == 1, "devices that ranks use are left alone"
    bad = Preflight(())
    until(lambda: check.poll(idle=True).problem == "", "that it is mended")
    check.close()


def test_it_can_be_off_and_a_wrong_mode_is_auto() -> None:
    off, wrong = NodeHealthCheck("off"), NodeHealthCheck("sometimes")
    assert off.poll().checked and not off.poll().problem and wrong._mode == "auto"
    off.close()
    wrong.close()


def test_a_full_look_is_made_in_a_process_that_may_die_or_hang(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = tmp_path / "python"
    monkeypatch.setattr(checks.sys, "executable", str(program))
    monkeypatch.setattr(checks, "_FULL_SECONDS", 0.5)
    for script, why in (("exec sleep 60", "didn't end in 0 s"), ("kill -BUS $$", "was ended by signal 7")):
        program.write_text(f"#!/bin/sh\n{script}\n")
        program.chmod(0o755)
        assert why in checks.run_full_check(()).why
    program.write_text("#!/bin/sh\necho no preflight here >&2; exit 1\n")
    (check,) = checks.run_full_check(()).checks
    assert check.outcome is CheckOutcome.UNKNOWN and check.text == "no preflight here", "it could not look"


def test_an_answer_is_what_a_program_prints_and_how_it_ends() -> None:
    done = proc.run_bounded(["/bin/sh", "-c", "echo out; echo err $WORD >&2; exit 3"], 10, {"WORD": "aside"})
    assert (done.stdout, done.stderr, done.returncode) == ("out\n", "err aside\n", 3)
    with pytest.raises(OSError):
        proc.run_bounded(["/nowhere"], 1)
