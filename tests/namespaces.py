"""Hosts on one machine, and what goes wrong between them: namespaces on a bridge, slow NICs, slow pairs, taken CPUs.

A host is a network namespace with an address of its own on `eth0` and, where the kernel lets us, a CPU cgroup of its
own. Its processes share the machine's files. Rates are in Mbit/s as `tc` counts them: Ethernet headers included.
"""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

_SUBNETS = "10.213"
_CGROUPS = Path("/sys/fs/cgroup")
_PERIOD_US = 10_000
"""Short, so that even a small message meets the pause: at 100 ms, the default, most would slip through."""
_QUOTA_LEAST_US = 1000
"""The kernel refuses less."""
_PREFERENCE = 10
"""A host's share of a contended core over that of the machine's other processes."""
_BURST = 32 * 1024
"""Bytes: with more, a message of a few hundred KiB would pass an idle throttle at full speed."""
_QUEUE = 512 * 1024
"""Bytes waiting at a throttle before it drops: several of the kernel's 64 KiB segments, or TCP would stall."""


@functools.cache
def unavailable() -> str:
    """Why hosts can't be made here; empty where they can."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    if shutil.which("ip") is None:
        return "network namespaces need the `ip` command (Debian: apt-get install iproute2)"
    return _probe()


@functools.cache
def throttles_unavailable() -> str:
    """Why links can't be slowed here; empty where they can."""
    if shutil.which("tc") is None:
        return "a slow link needs the `tc` command (Debian: apt-get install iproute2)"
    return unavailable() or _probe(*_tbf("lo", 100))


@functools.cache
def cpu_unavailable() -> str:
    """Why a host's CPU can't be taken here; empty where it can."""
    return (
        "" if unavailable() == "" and _cpu_root() else "a host's CPU is taken by the cgroup controller `cpu`"
    )


def _probe(*tc: str) -> str:
    """Why a namespace, and in it the command `tc`, is refused; empty where it isn't."""
    name = f"mr{os.getpid()}probe"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True)
    if made.returncode:
        return f"network namespaces are refused here: {made.stderr.strip()}"
    try:
        done = subprocess.run(["tc", "-n", name, *tc], capture_output=True, text=True) if tc else made
        return f"a slow link is refused here: {done.stderr.strip()}" if done.returncode else ""
    finally:
        _ip("netns", "del", name)


@functools.cache
def _cpu_root(root: Path = _CGROUPS) -> Path | None:
    """Where cgroups with a CPU quota can be made: version 1's `cpu` hierarchy, else version 2's root."""
    if (root / "cpu/cpu.cfs_quota_us").exists() or (root / "cpu/cpu.shares").exists():
        return root / "cpu" if os.access(root / "cpu", os.W_OK) else None
    with contextlib.suppress(OSError):
        if "cpu" in (root / "cgroup.controllers").read_text().split():
            (root / "cgroup.subtree_control").write_text("+cpu")
            return root
    return None


@dataclass
class Host:
    """One host: a namespace, its address and, where there is one, its CPU cgroup."""

    name: str
    ip: str
    cgroup: Path | None
    started: list[subprocess.Popen[Any]] = field(default_factory=list)

    def command(self, *words: str) -> list[str]:
        """`words` as a command that runs on this host: in its cgroup first, as `ip netns exec` hides those."""
        inside = ["ip", "netns", "exec", self.name, *words]
        if self.cgroup is None:
            return inside
        return ["sh", "-c", 'echo $$ >"$0" && exec "$@"', str(self.cgroup / "cgroup.procs"), *inside]

    def popen(self, *words: str, **options: Any) -> subprocess.Popen[Any]:
        """Start `words` on this host, with `subprocess.Popen`'s options; ended with the network at the latest."""
        options = {"stdin": subprocess.DEVNULL, "start_new_session": True} | options
        self.started.append(subprocess.Popen(self.command(*words), **options))
        return self.started[-1]

    def limit_cpu(self, share: float | None) -> None:
        """Give this host's processes together `share` of one core; None: all they like."""
        if self.cgroup is None:
            raise RuntimeError(cpu_unavailable())
        period = _PERIOD_US if share is None else max(_PERIOD_US, round(_QUOTA_LEAST_US / share))
        quota = None if share is None else round(share * period)
        if (self.cgroup / "cpu.max").exists():
            (self.cgroup / "cpu.max").write_text(f"{quota or 'max'} {period}")
        else:
            (self.cgroup / "cpu.cfs_period_us").write_text(str(period))
            (self.cgroup / "cpu.cfs_quota_us").write_text(str(quota or -1))

    def end(self) -> None:
        """Kill what still runs on this host, by process id, and remove it."""
        deadline = time.monotonic() + 10
        while pids := _pids_in(self.name):  # again: a process may have forked between look and kill
            if time.monotonic() > deadline:
                raise RuntimeError(f"{self.name}: processes {pids} do not end")
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.01)
        for process in self.started:
            process.wait()
        subprocess.run(["ip", "netns", "del", self.name], capture_output=True)
        if self.cgroup is not None:
            self.cgroup.rmdir()


@dataclass
class Network:
    """Hosts `.1`, `.2`, … on one bridge, as a context manager, and faults between them until `heal()`."""

    count: int
    nic_mbit: float | None = None
    """What every sound NIC passes; None: as much as the machine can."""
    hosts: list[Host] = field(default_factory=list, init=False)
    _throttled: set[tuple[str, str]] = field(default_factory=set, init=False)
    _direct: set[tuple[int, int]] = field(default_factory=set, init=False)
    _cut: set[int] = field(default_factory=set, init=False)

    def __enter__(self) -> Self:
        self._number, self._switch = _claim()
        try:
            _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
            _ip("-n", self._switch, "link", "set", "br0", "up")
            for index in range(self.count):
                self._add_host(index)
        except BaseException:
            self.__exit__()
            raise
        return self

    def _add_host(self, index: int) -> None:
        name = f"mr{self._number}h{index}"
        root = _cpu_root()
        host = Host(name, f"{_SUBNETS}.{self._number}.{index + 1}", root / name if root else None)
        if host.cgroup is not None:
            host.cgroup.mkdir()
            _prefer(host.cgroup)
        self.hosts.append(host)
        _ip("netns", "add", name)
        port = _port(index)
        _ip("link", "add", "eth0", "netns", name, "type", "veth", "peer", "name", port, "netns", self._switch)
        _ip("-n", self._switch, "link", "set", port, "master", "br0", "up")
        _ip("-n", name, "addr", "add", f"{host.ip}/24", "dev", "eth0")
        _ip("-n", name, "link", "set", "eth0", "up")
        _ip("-n", name, "link", "set", "lo", "up")
        # While a pair goes over to a link of its own, one direction is first: its packets aren't forged ones.
        off = 'for file in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 >"$file"; done'
        _ip("netns", "exec", name, "sh", "-c", off)
        if self.nic_mbit is not None:
            _tc(name, *_tbf("eth0", self.nic_mbit))
            _tc(self._switch, *_tbf(port, self.nic_mbit))

    def throttle(self, index: int, mbit: float) -> None:
        """Let a host's NIC pass `mbit` out of the host, and as much into it."""
        self.throttle_out(index, mbit)
        self._throttle(self._switch, _port(index), mbit)

    def throttle_out(self, index: int, mbit: float) -> None:
        """Let a host's NIC pass `mbit` out of the host; what comes into it is untouched."""
        self._throttle(self.hosts[index].name, "eth0", mbit)

    def _throttle(self, namespace: str, device: str, mbit: float) -> None:
        self._throttled.add((namespace, device))
        _tc(namespace, *_tbf(device, mbit))

    def slow_pair(self, a: int, b: int, mbit: float) -> None:
        """Let `mbit` pass from host `a` to `b`, and as much back; their other traffic is untouched."""
        self.slow_direction(a, b, mbit)
        self.slow_direction(b, a, mbit)

    def slow_direction(self, source: int, target: int, mbit: float) -> None:
        """Let `mbit` pass from host `source` to `target`; the way back and all other traffic is untouched.

        The pair gets a link of its own and routes over it, which connections already open follow too. It goes past
        both hosts' NICs, so past their `throttle` as well.
        """
        pair = min(source, target), max(source, target)
        if pair not in self._direct:
            self._connect(*pair)
        _tc(self.hosts[source].name, *_tbf(f"to{target}", mbit))

    def sent_bytes(self, source: int, target: int) -> int:
        """Bytes that went over a pair's own link, which `slow_direction` makes, so far."""
        counter = f"/sys/class/net/to{target}/statistics/tx_bytes"
        words = ["ip", "netns", "exec", self.hosts[source].name, "cat", counter]
        return int(subprocess.run(words, capture_output=True, text=True, check=True).stdout)

    def _connect(self, a: int, b: int) -> None:
        near, far = self.hosts[a], self.hosts[b]
        self._direct.add((a, b))
        _ip(
            "link",
            "add",
            f"to{b}",
            "netns",
            near.name,
            "type",
            "veth",
            "peer",
            "name",
            f"to{a}",
            "netns",
            far.name,
        )
        if self.nic_mbit is not None:
            _tc(near.name, *_tbf(f"to{b}", self.nic_mbit))
            _tc(far.name, *_tbf(f"to{a}", self.nic_mbit))
        _ip("-n", near.name, "link", "set", f"to{b}", "up")
        _ip("-n", far.name, "link", "set", f"to{a}", "up")
        _ip("-n", near.name, "route", "add", f"{far.ip}/32", "dev", f"to{b}", "src", near.ip)
        _ip("-n", far.name, "route", "add", f"{near.ip}/32", "dev", f"to{a}", "src", far.ip)

    def _disconnect(self, a: int, b: int) -> None:
        """Remove a pair's own link; its routes go with it and the traffic takes the bridge again."""
        self._direct.remove((a, b))
        _ip("-n", self.hosts[a].name, "link", "del", f"to{b}")

    def take_cpu(self, index: int, share: float) -> None:
        """Leave the processes of a host, those to come too, together `share` of one core (0.01 and more)."""
        self.hosts[index].limit_cpu(share)

    def cut(self, index: int) -> None:
        """Take a host's link down: a partition that sends no refusal."""
        for pair in [pair for pair in self._direct if index in pair]:
            self._disconnect(*pair)
        self._cut.add(index)
        _ip("-n", self.hosts[index].name, "link", "set", "eth0", "down")

    def mend(self, index: int) -> None:
        """Bring a host's link up again."""
        _ip("-n", self.hosts[index].name, "link", "set", "eth0", "up")
        self._cut.discard(index)

    def heal(self) -> None:
        """Take every fault off; connections that lived through it continue."""
        for pair in list(self._direct):
            self._disconnect(*pair)
        while self._throttled:
            namespace, device = self._throttled.pop()
            if self.nic_mbit is None:
                _tc(namespace, "qdisc", "del", "dev", device, "root")
            else:
                _tc(namespace, *_tbf(device, self.nic_mbit))
        for index in list(self._cut):
            self.mend(index)
        for host in self.hosts:
            if host.cgroup is not None:
                host.limit_cpu(None)

    def __exit__(self, *_: object) -> None:
        with contextlib.ExitStack() as ends:  # each is done, whatever another one raises
            ends.callback(_ip, "netns", "del", self._switch)  # last: it is what holds the number
            for host in self.hosts:
                ends.callback(host.end)
            ends.callback(self.heal)  # first: without CPU, processes can't even end


def _claim() -> tuple[int, str]:
    """A number for subnet and names that no other network has, and the bridge's namespace, which holds it."""
    for number in range(1, 255):
        switch = f"mr{number}sw"
        if subprocess.run(["ip", "netns", "add", switch], capture_output=True).returncode == 0:
            return number, switch
    raise RuntimeError("no free number: `ip netns` lists the namespaces mr…; `ip netns del` removes old ones")


def _prefer(cgroup: Path) -> None:
    """Let a host go before what else the machine does: a host has its cores to itself, and being kept waiting is a fault.

    Niceness would not do it: it counts among the processes of one cgroup.
    """
    for name, usual in (("cpu.shares", 1024), ("cpu.weight", 100)):  # versions 1 and 2
        if (cgroup / name).exists():
            (cgroup / name).write_text(str(_PREFERENCE * usual))


def _port(index: int) -> str:
    """The bridge's end of a host's link."""
    return f"port{index}"


def _tbf(device: str, mbit: float) -> list[str]:
    """The words for `tc` that let `mbit` out of a device."""
    shape = ["rate", f"{mbit}mbit", "burst", str(_BURST), "limit", str(_QUEUE)]
    return ["qdisc", "replace", "dev", device, "root", "tbf", *shape]


def _pids_in(namespace: str) -> list[int]:
    done = subprocess.run(["ip", "netns", "pids", namespace], capture_output=True, text=True)
    return [int(word) for word in done.stdout.split()]


def _ip(*words: str) -> None:
    _run("ip", *words)


def _tc(namespace: str, *words: str) -> None:
    _run("tc", "-n", namespace, *words)


def _run(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"{' '.join(words)}: {done.stderr.strip()}")
