"""The study of expert-parallel traffic: dispatch, experts, combine, under even, uneven and recorded routing.

A layer is timed in four ways: dispatch alone, experts alone, the three in turn, and cut into chunks whose
exchanges run behind the experts of the chunk before. Tokens lie sorted by expert already; permuting them is the
trainer's part and isn't measured.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F  # noqa: N812 (torch's own name for it)
from torch import Tensor

from collectives.device.profile import grouped_kernel
from collectives.ops import routing
from collectives.ops.exact import TYPES
from collectives.ops.groups import partitions
from collectives.ops.routing import Loads
from collectives.ops.transfers import GroupMember
from collectives.studies.journal import Journal
from collectives.timing.measure import MeasurementSetup
from configs.errors import UserError
from configs.metrics import StepLine, read_all
from configs.paths import RunPaths
from configs.schema import ModelConfig, RunConfig

_STEPS = 8
"""Steps of a pattern that changes over time; they are gone through in turn."""


@dataclass(frozen=True)
class Layer:
    """Times of one layer under one routing, in microseconds of the slowest rank."""

    routing: str
    ranks: int
    imbalance: float
    """Most loaded rank over the mean, of the steps' mean."""
    bytes: int
    """Most that one rank receives in a dispatch."""
    dispatch_us: float
    experts_us: float
    sequential_us: float
    """Dispatch, experts and combine, one after the other."""
    overlapped_us: float
    """The same in chunks."""
    matrix: tuple[tuple[int, ...], ...]
    """Bytes from each rank (row) to each (column) in the first step's dispatch."""

    @property
    def hidden(self) -> float | None:
        """Share of the two exchanges' time that overlap hides; negative where chunks cost more than they hide.

        None where the exchanges are lost in the noise of the experts' time.
        """
        exchanged = self.sequential_us - self.experts_us
        if exchanged < self.dispatch_us / 2:
            return None
        return (self.sequential_us - self.overlapped_us) / exchanged

    def __str__(self) -> str:
        hidden = "n/a" if self.hidden is None else f"{self.hidden:.0%}"
        return (
            f"{self.routing:>16}  {self.imbalance:9.2f}  {self.bytes:12d}  {self.dispatch_us:11.1f}  "
            f"{self.experts_us:10.1f}  {self.sequential_us:13.1f}  {self.overlapped_us:13.1f}  {hidden:>6}"
        )


_HEAD = (
    f"# {'routing':>14}  {'imbalance':>9}  {'largest (B)':>12}  {'dispatch us':>11}  {'experts us':>10}  "
    f"{'sequential us':>13}  {'overlapped us':>13}  {'hidden':>6}"
)


class MoeStudy:
    """The study on one rank."""

    def __init__(
        self, bench: MeasurementSetup, journal: Journal, config: RunConfig, layout: dict[str, int]
    ) -> None:
        self._bench, self._team, self._journal = bench, bench.team, journal
        self._settings, self._model = bench.settings, config.model
        self._partition = partitions("ep" if layout["ep"] > 1 else "world", self._team.nodes, layout)[0]
        self._ranks = self._partition.ranks
        if config.model.experts % self._ranks:
            raise UserError(
                f"model.experts={config.model.experts} does not divide over the {self._ranks} ranks of an expert group; "
                f"set model.experts to a multiple of {self._ranks}, or parallel.ep to a divisor"
            )
        dtype = self._settings.dtypes[0]
        if not TYPES[dtype].is_floating_point:
            raise UserError(
                f"collectives.dtypes={dtype}: experts multiply half, bfloat16, float or double; set "
                "collectives.dtypes=bfloat16"
            )
        self._points = [value for value in self._settings.imbalances if value <= self._ranks]
        self._named = list(self._routings())
        self._member = self._team.membership(self._partition)

    @property
    def cases(self) -> int:
        """Routings, and points of the curve."""
        return len(self._named)

    def _routings(self) -> Iterator[tuple[str, list[Loads]]]:
        settings, experts = self._settings, self._model.experts
        pairs = settings.tokens * self._model.top_k
        rng = np.random.default_rng(settings.seed)
        for pattern in settings.patterns:
            yield pattern, routing.generated(pattern, _STEPS, self._ranks, experts, pairs, rng)
        if settings.record is not None:
            for layer, load in enumerate(recorded_loads(Path(settings.record), experts)):
                yield f"recorded layer {layer}", [routing.recorded(load, self._ranks, pairs)]
        for value in self._points:
            yield f"curve {value:g}", [routing.skewed(value, self._ranks, experts, pairs)]

    def run(self, done: frozenset[tuple[str | int, ...]]) -> None:  # noqa: ARG002 (a study of seconds starts anew)
        """Time each routing, and on rank 0 keep the curve."""
        beyond = [f"{value:g}" for value in self._settings.imbalances if value not in self._points]
        if beyond:
            self._journal.note(
                f"# no curve at {', '.join(beyond)}: one of {self._ranks} ranks has at most {self._ranks} times the mean"
            )
        self._journal.note(_HEAD)
        layers = []
        for name, steps in self._named:
            layer = self._timed(name, steps)
            if layer is not None:
                layers.append(layer)
                self._journal.step({"study": "moe", "routing": name}, asdict(layer), str(layer))
            else:
                self._journal.step({}, {}, "")
        if layers:
            self._journal.store.write_json(
                "moe", [asdict(layer) | {"hidden": layer.hidden} for layer in layers]
            )

    def _timed(self, name: str, steps: Sequence[Loads]) -> Layer | None:
        member, dtype = self._member, TYPES[self._settings.dtypes[0]]
        whole: list[MoeTraffic] = []
        chunked: list[MoeTraffic] = []
        if member is not None:
            weights = RandomExperts(self._model, member, dtype)
            whole = [MoeTraffic([loads], member, weights) for loads in steps]
            chunked = [
                MoeTraffic(routing.split_loads(loads, self._settings.chunks), member, weights)
                for loads in steps
            ]
        dispatch = self._mean([e.dispatch for e in whole])
        experts = self._mean([e.compute for e in whole], alone=True)
        sequential = self._mean([e.layer for e in whole])
        overlapped = self._mean([e.layer for e in chunked])
        if dispatch is None or experts is None or sequential is None or overlapped is None:
            return None
        width = self._model.hidden * dtype.itemsize
        matrices = [routing.between_ranks(loads) * width for loads in steps]
        return Layer(
            routing=name,
            ranks=self._ranks,
            imbalance=float(np.mean([routing.imbalance(loads) for loads in steps])),
            bytes=max(int(m.sum(axis=0).max()) for m in matrices),
            dispatch_us=dispatch,
            experts_us=experts,
            sequential_us=sequential,
            overlapped_us=overlapped,
            matrix=tuple(map(tuple, matrices[0].tolist())),
        )

    def _mean(self, calls: Sequence[Callable[[], object]], *, alone: bool = False) -> float | None:
        """Mean time in us of calls that are gone through in turn; None on ranks other than 0.

        A call that exchanges something lasts as long for every rank. Where ranks work `alone`, the layer waits in each step
        for the slowest one: the mean over the ranks would be the same whatever the imbalance.
        """
        turn = iter(range(1 << 62))
        call = (lambda: calls[next(turn) % len(calls)]()) if calls else None
        group = self._member.group if self._member is not None else None
        raw = self._bench.time(call, group, capturable=False)  # the next call is another step's
        if raw is None:
            return None
        return raw.slowest(self._partition.groups) if alone else float(raw.series().mean())


class RandomExperts:
    """SwiGLU experts of one rank, with random weights; by a grouped matmul where there is one, as in training."""

    def __init__(self, model: ModelConfig, member: GroupMember, dtype: torch.dtype) -> None:
        local = model.experts // member.size
        factory_kwargs: dict[str, Any] = {"dtype": dtype, "device": member.device}
        self.hidden, self.local, self.factory_kwargs = model.hidden, local, factory_kwargs
        self._grouped = grouped_kernel(member.device)[1] if dtype == torch.bfloat16 else None
        generator = torch.Generator(member.device).manual_seed(member.index)
        shapes = ((local, model.hidden, 2 * model.expert_width), (local, model.expert_width, model.hidden))
        self._up, self._down = (
            torch.randn(shape, generator=generator, device=member.device).mul_(shape[1] ** -0.5).to(dtype)
            for shape in shapes
        )

    def on(self, sizes: Sequence[int]) -> Callable[[Tensor], Tensor]:
        """The function that applies expert i to the next `sizes[i]` tokens, [T, D] to [T, D]."""
        if self._grouped is None:
            return partial(self._one_by_one, sizes)
        ends = torch.tensor(sizes, device=self.factory_kwargs["device"]).cumsum(0).to(torch.int32)
        return partial(self._all_at_once, self._grouped, ends)

    def _all_at_once(self, grouped: Callable[..., Tensor], ends: Tensor, x_TD: Tensor) -> Tensor:
        gate, up = grouped(x_TD, self._up, offs=ends).chunk(2, dim=-1)
        return grouped(F.silu(gate) * up, self._down, offs=ends)

    def _one_by_one(self, sizes: Sequence[int], x_TD: Tensor) -> Tensor:
        out_TD, begin = torch.empty_like(x_TD), 0
        for expert, size in enumerate(sizes):
            if size:
                gate, up = (x_TD[begin : begin + size] @ self._up[expert]).chunk(2, dim=-1)
                torch.matmul(F.silu(gate) * up, self._down[expert], out=out_TD[begin : begin + size])
            begin += size
        return out_TD


class MoeTraffic:
    """One layer's traffic with its buffers, in one part or in chunks."""

    def __init__(self, parts: Sequence[Loads], member: GroupMember, experts: RandomExperts) -> None:
        self._group = member.group
        me = member.index
        self._parts = []
        for loads in parts:
            pairs = routing.between_ranks(loads)
            sends, receives = pairs[me].tolist(), pairs[:, me].tolist()
            mine = loads[:, me * experts.local : (me + 1) * experts.local].sum(axis=0).tolist()
            sent = torch.randn(sum(sends), experts.hidden, device=member.device).to(**experts.factory_kwargs)
            got = torch.zeros(sum(receives), experts.hidden, **experts.factory_kwargs)
            self._parts.append((sends, receives, experts.on(mine), sent, got))

    def dispatch(self) -> None:
        """Tokens to their experts, all parts one after the other."""
        for sends, receives, _, sent, got in self._parts:
            dist.all_to_all_single(got, sent, receives, sends, group=self._group)

    @torch.no_grad()
    def compute(self) -> None:
        """Experts alone."""
        for _, _, experts, _, got in self._parts:
            experts(got)

    @torch.no_grad()
    def layer(self) -> None:
        """All dispatches are posted at once; each part's experts start when its tokens are there."""
        group = self._group
        dispatched = [
            dist.all_to_all_single(got, sent, receives, sends, group=group, async_op=True)
            for sends, receives, _, sent, got in self._parts
        ]
        combined = []
        for work, (sends, receives, experts, sent, got) in zip(dispatched, self._parts, strict=True):
            work.wait()
            out = experts(got)
            combined.append(
                (out, dist.all_to_all_single(sent, out, sends, receives, group=group, async_op=True))
            )
        for _, work in combined:
            work.wait()


def recorded_loads(folder: Path, experts: int) -> list[list[int]]:
    """Tokens per expert of each MoE layer, summed over all steps that a run recorded.

    Raises:
        UserError: for a folder without such a record, or one of another number of experts.
    """
    run, total = RunPaths(folder), None
    for attempt in run.attempt_numbers():
        for line in read_all(run.attempt(attempt).metrics):
            if isinstance(line, StepLine) and line.expert_load:
                load = np.asarray(line.expert_load)
                total = load if total is None else total + load
    if total is None:
        raise UserError(
            f"collectives.record={folder} holds no expert loads; name the folder of a training run, as `status` shows it"
        )
    if total.shape[1] != experts:
        raise UserError(
            f"collectives.record={folder} has {total.shape[1]} experts a layer, and model.experts={experts}; choose the "
            "model that was trained"
        )
    return total.tolist()
