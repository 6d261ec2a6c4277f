"""What ranks compute with the parallel seams, beside what one rank computes with the local ones; all in fp64.

Every check returns pairs by name: what this rank found, and its part of what one rank finds.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from datetime import timedelta
from typing import Any
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from configs.compose import compose
from configs.library_environment import Applied
from configs.schema import ParallelConfig
from tests.trainer import grid, stages
from tests.trainer.families import batches
from trainer.engines.native import NativeEngine
from trainer.model.exchange import LocalExchange
from trainer.model.moe import Experts
from trainer.model.norm import RMSNorm, SplitNorm
from trainer.model.seams import MicroBatch, SoloSeams, Tally
from trainer.parallel import expert, gathered
from trainer.parallel.context import GatherContext, SharedSamples, UlyssesContext, token_positions
from trainer.parallel.lending import LendingTerms
from trainer.parallel.mesh import Mesh, assemble
from trainer.parallel.tensor import TensorParallel, VocabularyParallel

Pairs = dict[str, tuple[np.ndarray, np.ndarray]]
CPU = torch.device("cpu")
SEPARATOR, SAMPLES, WIDTH, VOCABULARY, EXPERTS = 0, 2, 6, 24, 8


@contextmanager
def met(rank: int, world: int, store: dist.Store, **layout: int) -> Iterator[Mesh]:
    """The ranks' process group and a mesh over it."""
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world, timeout=timedelta(seconds=60))
    try:
        assert dist.group.WORLD is not None
        parallel = ParallelConfig(**{"dp": 1} | layout)  # type: ignore[arg-type]
        config = compose(["model=demo", "hardware=cpu"]).model_copy(update={"parallel": parallel})
        yield assemble(config, rank, world, CPU, dist.group.WORLD, Applied())
    finally:
        dist.destroy_process_group()


def _draw(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def _learn(loss: Tensor, *leaves: Tensor) -> list[Tensor]:
    return list(torch.autograd.grad(loss, leaves))


def _leaves(tensors: Iterable[Tensor]) -> list[Tensor]:
    return [tensor.detach().clone().requires_grad_() for tensor in tensors]


def _pairs(names: str, found: Iterable[Tensor], expected: Iterable[Tensor]) -> Pairs:
    both = zip(names.split(), found, expected, strict=True)
    return {name: (one.detach().numpy(), other.detach().numpy()) for name, one, other in both}


def micro(sequence: int, documents: bool, positions_S: Tensor) -> MicroBatch:
    """Two samples of tokens, in documents of uneven length where asked."""
    draw = torch.Generator().manual_seed(5)
    tokens = torch.randint(1, VOCABULARY, (SAMPLES, sequence + 1), generator=draw)
    tokens[:, 3::5] = SEPARATOR
    ends = (tokens[:, :-1] == SEPARATOR).long()
    return MicroBatch(tokens, positions_S, ends.cumsum(1) - ends if documents else None, 0.5, Tally())


# ---- tensor parallelism ----


def tensors(rank: int, world: int, store: dist.Store) -> Pairs:
    """A layer that is split, with a norm over its split width, on tokens that are split outside of it."""
    sequence, inner = 3 * world, 4 * world
    whole = [
        _draw(1, SAMPLES, sequence, WIDTH),
        _draw(2, inner, WIDTH),
        _draw(3, inner) + 2,
        _draw(4, WIDTH, inner),
    ]
    weight = _draw(5, SAMPLES, sequence, WIDTH)
    dims = (1, 0, 0, 1)
    x, first, scale, second = _leaves(whole)
    one = RMSNorm(inner, 0.5).double()
    h = torch.func.functional_call(one, {"weight": scale}, F.linear(x, first))
    y = F.linear(h, second)
    expected = _learn((y * weight).sum(), x, first, scale, second)
    with met(rank, world, store, tp=world) as mesh:
        seam = TensorParallel(mesh["tp"])
        parts = [t.chunk(world, dim)[rank] for t, dim in zip(whole, dims, strict=True)]
        x, first, scale, second = _leaves(parts)
        split = SplitNorm(inner // world, 0.5).double()
        split.tensors = seam
        h = torch.func.functional_call(split, {"weight": scale}, F.linear(seam.enter(x), first))
        found = seam.leave(F.linear(h, second))
        grads = _learn((found * seam.part(weight, 1)).sum(), x, first, scale, second)
    own = [grad.chunk(world, dim)[rank] for grad, dim in zip(expected, dims, strict=True)]
    return _pairs("output tokens first norm second", (found, *grads), (y.chunk(world, 1)[rank], *own))


def vocabulary(rank: int, world: int, store: dist.Store) -> Pairs:
    """Embedding, logits and the loss; some targets don't count, and logits of the last rank are far above the others."""
    sequence = 3 * world
    tokens = micro(sequence, False, torch.arange(sequence)).tokens_BS
    targets = tokens[:, 1:].clone()
    targets[0, 1], targets[1, sequence - 1] = -1, -1
    table, x, weight = (
        _draw(1, VOCABULARY, WIDTH),
        _draw(2, SAMPLES, sequence, WIDTH),
        _draw(3, SAMPLES, sequence, WIDTH),
    )
    table[-3:] *= 9

    def use(
        seam: Any, tokens_BS: Tensor, targets_BS: Tensor, weight_BSD: Tensor, leaves: list[Tensor]
    ) -> list[Tensor]:
        table_VD, x_BSD = leaves
        embedded = seam.embed(tokens_BS, table_VD)
        loss = seam.loss(x_BSD, table_VD, targets_BS)
        grads = [*_learn((embedded * weight_BSD).sum(), table_VD), *_learn(loss, table_VD, x_BSD)]
        return [embedded, seam.logits(x_BSD, table_VD), loss, *grads]

    with stages.exact(), met(rank, world, store, tp=world) as mesh:
        embedded, logits, loss, *grads = use(
            SoloSeams(), tokens[:, :-1], targets, weight, _leaves((table, x))
        )
        mine = _leaves((table.chunk(world)[rank], x.chunk(world, 1)[rank]))
        found = use(
            VocabularyParallel(mesh["tp"]), tokens[:, :-1], targets, weight.chunk(world, 1)[rank], mine
        )
    own = [grads[0].chunk(world)[rank], grads[1].chunk(world)[rank], grads[2].chunk(world, 1)[rank]]
    return _pairs(
        "embedded logits loss embedding head tokens",
        found,
        (embedded.chunk(world, 1)[rank], logits, loss, *own),
    )


def vocabulary_by_kernels(rank: int, world: int, folder: str) -> Pairs:
    """The loss of bf16 numbers by kernels, beside torch's cross-entropy of the same ones in fp64. Each rank weighs its
    share by its own number, so that a token's gradient has to be that of the rank whose share it is in."""
    from trainer.kernels import loss as kernels  # triton isn't everywhere

    sequence = 3 * world
    tokens = micro(sequence, False, torch.arange(sequence)).tokens_BS
    targets = tokens[:, 1:].clone()
    targets[0, 1], targets[1, sequence - 1] = -1, -1
    table, x = (t.bfloat16() for t in (_draw(1, VOCABULARY, WIDTH), _draw(2, SAMPLES, sequence, WIDTH)))
    table[-3:] *= 9
    wide = _leaves((table.double(), x.double()))
    logits = (wide[1] @ wide[0].t()).flatten(0, 1)
    losses = F.cross_entropy(logits, targets.flatten(), ignore_index=-1, reduction="none").view_as(targets)
    parts = [part.sum() for part in losses.chunk(world, 1)]
    grads = _learn(torch.stack([(i + 1) * part for i, part in enumerate(parts)]).sum(), *wide)
    with met(rank, world, dist.FileStore(f"{folder}/store", world), tp=world) as mesh:
        seam = VocabularyParallel(mesh["tp"])
        leaves, alone = _leaves((table.chunk(world)[rank], x.chunk(world, 1)[rank])), list[Tensor]()
        with mock.patch.object(kernels, "partial_logsumexp", wraps=kernels.partial_logsumexp) as part:
            loss = seam.loss(leaves[1], leaves[0], targets)
        assert part.called, "this is about the kernels"
        found = _learn((rank + 1) * loss, *leaves)
        none = seam.loss(leaves[1], leaves[0], torch.full_like(targets, -1))
        assert not none.item() and not any(grad.any() for grad in _learn(none, *leaves))
        for one in range(2):  # where the other one doesn't learn
            kept = [leaf if i == one else leaf.detach() for i, leaf in enumerate(leaves)]
            alone += _learn((rank + 1) * seam.loss(kept[1], kept[0], targets), leaves[one])
        with torch.no_grad(), mock.patch.object(kernels, "logits_to_grads") as to_grads:
            again = seam.loss(leaves[1], leaves[0], targets)
            assert not to_grads.called, "logits that nobody learns from were written"
    own = [grads[0].chunk(world)[rank], grads[1].chunk(world, 1)[rank]]
    return _pairs(
        "loss untrained table tokens lone-table lone-tokens",
        (t.double() for t in (loss, again, *found, *alone)),
        (parts[rank], parts[rank], *own, *own),
    )


# ---- context parallelism ----


def attention(rank: int, world: int, store: dist.Store, method: str, documents: bool, window: int) -> Pairs:
    """Grouped attention over samples whose tokens are split."""
    sequence = 6 * world
    whole = [_draw(1, SAMPLES, 2 * world, sequence, 4)]
    whole += [_draw(seed, SAMPLES, world, sequence, 4) for seed in (2, 3)]
    weight = _draw(4, SAMPLES, 2 * world, sequence, 4)
    one = micro(sequence, documents, torch.arange(sequence))
    leaves = _leaves(whole)
    y = SoloSeams().attend(*leaves, one, window, 0.7)
    expected = _learn((y * weight).sum(), *leaves)
    with met(rank, world, store, cp=world) as mesh:
        own = token_positions(sequence, method, world, rank, CPU)
        seam = UlyssesContext(mesh["cp"]) if method == "ulysses" else GatherContext(mesh["cp"])
        leaves = _leaves(tensor[:, :, own] for tensor in whole)
        found = seam.attend(*leaves, replace(one, positions_S=own), window, 0.7)
        grads = _learn((found * weight[:, :, own]).sum(), *leaves)
    return _pairs("output query key value", (found, *grads), [t[:, :, own] for t in (y, *expected)])


def previous(rank: int, world: int, store: dist.Store, method: str, documents: bool) -> Pairs:
    """The token before, which may be another rank's."""
    sequence = 6 * world
    one = micro(sequence, documents, torch.arange(sequence))
    whole, weight = _draw(1, SAMPLES, sequence, WIDTH), _draw(2, SAMPLES, sequence, WIDTH)
    (x,) = _leaves([whole])
    y = SoloSeams().previous(x, one)
    (expected,) = _learn((y * weight).sum(), x)
    with met(rank, world, store, cp=world) as mesh:
        own = token_positions(sequence, method, world, rank, CPU)
        seam = UlyssesContext(mesh["cp"]) if method == "ulysses" else GatherContext(mesh["cp"])
        (x,) = _leaves([whole[:, own]])
        found = seam.previous(x, replace(one, positions_S=own))
        (grad,) = _learn((found * weight[:, own]).sum(), x)
    return _pairs("output tokens", (found, grad), (y[:, own], expected[:, own]))


def samples(rank: int, world: int, store: dist.Store, method: str, cp: int) -> Pairs:
    """Totals and queues over samples that cp and tp split."""
    tp, sequence, draw = world // cp, 6 * world, torch.Generator().manual_seed(3)
    chosen = torch.rand(SAMPLES, sequence, EXPERTS, generator=draw).topk(2).indices
    counts = _draw(1, world, SAMPLES, EXPERTS)
    one = micro(sequence, False, torch.arange(sequence))
    queue = SoloSeams().queue(chosen, EXPERTS, one)
    with met(rank, world, store, cp=cp, tp=tp) as mesh:
        seam = SharedSamples(mesh["sample"], method, cp, tp)
        own = token_positions(sequence, method, cp, rank // tp, CPU).chunk(tp)[rank % tp]
        total = seam.total(counts[rank])
        found = seam.queue(chosen[:, own], EXPERTS, one)
    return _pairs("total queue", (total, found), (counts.sum(0), queue[:, own]))


# ---- experts ----


def experts(
    rank: int,
    world: int,
    store: dist.Store,
    ep: int,
    etp: int,
    all_tokens: bool,
    kernels: bool = False,
    lent: int = 0,
) -> Pairs:
    """Tokens of all ranks through experts that are split: uneven load, one expert without tokens, dropped pairs.

    Args:
        lent: experts that one rank borrows, 0 to 2: the more, the more the last ones are chosen.
    """
    each, top_k, inner = 7, 3, 4
    draw = torch.Generator().manual_seed(4)
    pull = torch.linspace(0, 1.5 if lent == 2 else 0.6, EXPERTS)
    scores = torch.rand(world * each, EXPERTS, generator=draw) + pull
    scores[:, 2] = -1.0
    chosen = scores.topk(top_k).indices
    chosen = chosen.masked_fill(torch.rand(chosen.shape, generator=draw) < 0.25, -1)
    chosen[3] = -1
    whole = [_draw(1, world * each, WIDTH), _draw(2, world * each, top_k)]
    tables = [_draw(3, EXPERTS, 2, inner, WIDTH), _draw(5, EXPERTS, WIDTH, inner)]
    weight = _draw(6, world * each, WIDTH)
    x, weights, *parameters = _leaves((*whole, *tables))
    y, _ = LocalExchange(drops=True).run(x, chosen, weights, EXPERTS, _expert_layer(parameters))
    expected = _learn((y * weight).sum(), x, weights, *parameters)
    mine = slice(rank * each, (rank + 1) * each)
    fast = torch.float32 if kernels else torch.float64
    layout = {"dp": world // etp if ep >= etp else 1, "tp": etp, "ep": ep, "etp": etp}
    by = [mock.patch.object(module, "use_kernels", lambda _: kernels) for module in (expert, gathered)]
    with met(rank, world, store, **layout) as mesh, by[0], by[1]:

        def cut(gate_up: Tensor, down: Tensor) -> list[Tensor]:
            some = slice(mesh["ep"].index * (EXPERTS // ep), (mesh["ep"].index + 1) * (EXPERTS // ep))
            widths = slice(mesh["etp"].index * (inner // etp), (mesh["etp"].index + 1) * (inner // etp))
            return [gate_up[some, :, widths], down[some, :, widths]]

        own = [t.to(fast) for t in (*(t[mine] for t in whole), *cut(tables[0], tables[1]))]
        x, weights, *parameters = _leaves(own)
        seam: Any = expert.ExpertParallel(mesh["ep"], mesh["etp"])
        if all_tokens:
            seam = gathered.GatheredExperts(
                mesh["ep"], mesh["ep_wide"], LendingTerms(ep, 1) if lent else None
            )
        with mock.patch.object(gathered, "Lending", side_effect=gathered.Lending) as lending:
            pending = seam.run(seam.begin(x), chosen[mine], weights, EXPERTS, _expert_layer(parameters))
        loans = lending.call_args.args[0] if lent else ()
        assert max(Counter(loan.borrower for loan in loans).values(), default=0) == lent
        found = pending.result()
        grads = _learn((found * weight[mine]).sum(), x, weights, *parameters)
        own = [expected[0][mine], expected[1][mine], *cut(expected[2], expected[3])]
    return _pairs("output tokens weights gate_up down", (found, *grads), (y[mine], *own))


def experts_by_kernels(rank: int, world: int, folder: str, all_tokens: bool, lent: int = 0) -> Pairs:
    """The same with the GPU's kernels, in fp32."""
    store = dist.FileStore(f"{folder}/store", world)
    return experts(rank, world, store, world, 1, all_tokens, kernels=True, lent=lent)


def _expert_layer(parameters: list[Tensor]) -> Callable[..., Tensor]:
    gate_up, down = parameters
    held, _, inner, width = gate_up.shape
    layer = Experts(width, inner, held, gated=True).to(down.dtype)
    named = {"gate_up": gate_up, "down": down}
    return lambda rows, *rest: torch.func.functional_call(layer, named, (rows, *rest))


# ---- the engine ----


def train(rank: int, world: int, store: dist.Store, case: grid.GridCase, steps: int) -> Any:
    """Some steps of a small model under a layout."""
    assert world == case.ranks
    return grid.train(case, steps, rank, store)


def evaluate(
    rank: int, world: int, store: dist.Store, case: grid.GridCase
) -> tuple[float, float, float, list[str]]:
    """Loss of some samples: by evaluation, by a step, and by evaluation after it; and what the first one moved."""
    config = grid.config_of(case, 2)
    with met(rank, world, store, **case.layout) as mesh:
        engine = NativeEngine(config, mesh)
        given = batches(
            0, grid.SAMPLES, config.train.micro_batch, engine.data_parallel.index, engine.data_parallel.size
        )
        state = [(part.name, part.tensor.clone()) for part in engine.state()]
        shares = [engine.evaluate(given, grid.SAMPLES)]
        now = [part.tensor for part in engine.state()]
        moved = [name for (name, then), tensor in zip(state, now, strict=True) if not tensor.equal(then)]
        shares.append(engine.step(given, grid.SAMPLES, config.optim.lr, lambda _phase: nullcontext()).loss)
        shares.append(engine.evaluate(given, grid.SAMPLES))
        losses = torch.stack([share.double() for share in shares])
        dist.all_reduce(losses)
    before, learned, after = losses.tolist()
    return before, learned, after, moved
