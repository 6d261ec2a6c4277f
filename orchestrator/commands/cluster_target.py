"""The cluster that a command talks to: found, connected to, or started on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from configs.errors import UserError
from configs.schema import RunConfig
from configs.timeouts import Timeouts
from orchestrator import PROGRAM, ray_cluster
from orchestrator.commands.calls import CommandCall
from orchestrator.commands.submission import slot_resource
from orchestrator.local import cluster, machine
from orchestrator.local.cluster import LocalCluster
from orchestrator.local.lock import file_lock
from orchestrator.ray_controller import ControllerClient
from trainer.sizing.search.planner import Capacity


@dataclass(frozen=True)
class ClusterTarget:
    """A cluster that is up."""

    address: str
    token: str = ""
    """File of its token, where it is the local one."""
    local: bool = False
    """`up` or `submit` started it on this machine, and its supervisor is alive."""

    @classmethod
    def of(cls, record: LocalCluster) -> ClusterTarget:
        """The local one of a record."""
        return cls(record.address, record.token, local=True)

    def connect(self) -> None:
        """Connect this process to it.

        Raises:
            UserError: where nobody answers.
        """
        try:
            ray_cluster.connect(self.address, self.token)
        except ray_cluster.Unreachable:
            if not self.local:
                raise
            raise UserError(  # nobody has typed an address
                f"the local Ray at {self.address} doesn't answer; its supervisor is starting it again: type the command "
                f"again in a minute, or `{PROGRAM} down` and `{PROGRAM} up`"
            ) from None


def target(call: CommandCall) -> ClusterTarget | None:
    """The cluster to use; None where a local one is to be started."""
    if call.address:
        return ClusterTarget(call.address)
    record = cluster.live_cluster(call.home)
    return ClusterTarget.of(record) if record else None


@contextmanager
def client(call: CommandCall) -> Iterator[ControllerClient]:
    """The controller of the cluster that is up, for as long as the block lasts.

    Raises:
        UserError: where no cluster is up.
    """
    place = target(call)
    if place is None:
        raise UserError(
            f"no Ray cluster is up for {call.home.home}; `{PROGRAM} up` starts one, --address HOST:PORT names another"
        )
    try:
        place.connect()
        yield ControllerClient.connect(call.home)
    finally:
        ray_cluster.disconnect()


def start_local(
    call: CommandCall, slots: int, gpus: int, timeouts: Timeouts
) -> tuple[ControllerClient, LocalCluster, bool]:
    """Start a local Ray and its controller, and connect; one that another command has started meanwhile does.

    What ends this before its end, Ctrl-C too, leaves nothing of what it has started.

    Args:
        call: the command.
        slots: ranks on processors that may run at once.
        gpus: that Ray gets.
        timeouts: Ray's health checks follow from them.

    Returns:
        The controller, the record of the cluster, and whether it was started here.
    """
    with file_lock(call.home.cluster_lock, call.note):
        record = cluster.live_cluster(call.home)
        mine = record is None
        if record is None:
            call.note("starting a local Ray …")
            record = cluster.start_cluster(call.home, slots, gpus, timeouts)
        try:
            ClusterTarget.of(record).connect()
            made = ControllerClient.connect(call.home)
        except BaseException:
            ray_cluster.disconnect()
            if mine:
                with cluster.uninterrupted():
                    cluster.stop_cluster(call.home)
            raise
    if mine and slots > (cpus := machine.processors()) and not gpus:
        call.note(f"{slots} slots on {cpus} processors: ranks share them and run slower")
    return made, record, mine


def capacity(config: RunConfig, place: ClusterTarget | None) -> Capacity | None:
    """Slots by node: of the connected cluster, or of this machine where a local Ray is to be started.

    None where that one is made as large as the run wants: ranks on processors share them.

    Raises:
        UserError: where the run wants GPUs, and there are none.
    """
    resource = slot_resource(config)
    if place is not None:
        nodes = ray_cluster.slots_by_node(resource)
        if not any(nodes):
            raise UserError(
                f"hardware={config.hardware.name} needs {resource} slots, and the cluster at {place.address} has none; "
                "choose hardware=cpu or another cluster"
            )
        return Capacity.of_nodes([n for n in nodes if n])
    if resource == "CPU":
        return None
    count = machine.gpus(config.hardware.kind)
    if not count:
        raise UserError(
            f"hardware={config.hardware.name} needs GPUs and this machine shows none of its kind ({config.hardware.kind}) "
            "to this process; name a cluster that has some with --address HOST:PORT, or choose hardware=cpu"
        )
    return Capacity.of_nodes([count])
