"""What the trainer runs: the rules that a layout, an engine and a kind of model keep, each refused in one line.

The sizes that keep the rules are functions of plain numbers: the layout search takes its sizes from them, and a refusal the
nearest one to type. What the schema refuses (experts over ep, expert groups over a stage, the batch over dp) isn't here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from configs.schema import ModelConfig, ParallelConfig, RunConfig

FILLING = 4
"""Micro-batches for each pipeline stage where the global batch is open: the first and last ones leave stages idle."""


def divisors(number: int) -> list[int]:
    """All divisors, ascending."""
    small = [d for d in range(1, int(number**0.5) + 1) if number % d == 0]
    return small + [number // d for d in reversed(small) if d * d != number]


def nearest(value: int, legal: Sequence[int]) -> int:
    """The legal size next to `value`, the smaller of two that are as near."""
    return min(legal, key=lambda size: (abs(size - value), size))


def chunks_of(parallel: ParallelConfig) -> int:
    """Model chunks on each pipeline rank."""
    return {"1f1b": 1, "interleaved": parallel.chunks, "zbv": 2}[parallel.schedule]


def filling(pp: int) -> int:
    """Micro-batches of a pipeline where the global batch is open."""
    return FILLING * pp if pp > 1 else 1


def least_dp(parallel: ParallelConfig) -> int:
    """The least dp whose dp * cp * tp ranks are whole expert groups of ep * etp."""
    return whole_groups((parallel.ep or 1) * (parallel.etp or 1), (parallel.cp or 1) * (parallel.tp or 1))


def whole_groups(group: int, replica: int) -> int:
    """The fewest replicas of so many ranks that are whole expert groups of so many."""
    return group // math.gcd(group, replica)


def split_by_tp(model: ModelConfig) -> dict[str, int]:
    """What tensor parallelism splits, by its field."""
    sizes = {"heads": model.heads, "kv_heads": 0 if model.attention == "mla" else model.kv_heads}
    sizes |= {"dense_width": model.dense_width if len(model.moe_layers) < model.layers else 0}
    sizes |= {"shared_width": model.shared_width, "vocab": model.vocab}
    return {f"model.{field}": size for field, size in sizes.items() if size}


def tensor_sizes(model: ModelConfig) -> list[int]:
    """Sizes of tp that divide heads, widths and the vocabulary."""
    return divisors(math.gcd(*split_by_tp(model).values()))


def heads_of(model: ModelConfig) -> int:
    """The most ranks that tp and Ulysses together can give heads to: mla makes keys for every head."""
    return model.heads if model.attention == "mla" else math.gcd(model.heads, model.kv_heads)


def context_sizes(model: ModelConfig, sequence: int, context: str, tp: int) -> list[int]:
    """Sizes of cp whose ranks have equally many tokens, and equally many heads under Ulysses; tp divides their tokens."""
    sizes = [cp for cp in divisors(sequence) if sequence // cp % tp == 0]
    if context == "ulysses":
        return [cp for cp in sizes if heads_of(model) % (tp * cp) == 0]
    return [cp for cp in sizes if cp == 1 or sequence % (2 * cp) == 0]


def schedulable(schedule: str, pp: int, count: int) -> bool:
    """Whether a pipeline can be run with `count` micro-batches: one for each stage, or whole rounds where interleaved.

    That is what the schedules of `torch.distributed.pipelining` ask for; `zbv` fills up what is missing.
    """
    if pp == 1 or schedule == "zbv":
        return True
    return count >= pp and (schedule == "1f1b" or count % pp == 0)


def micro_batches(config: RunConfig, samples: int | None) -> int | None:
    """Micro-batches that each pipeline gets of so many samples; None where that is open, or the schema refuses it."""
    if samples is None or config.parallel.dp is None:
        return None
    count, rest = divmod(samples, config.train.micro_batch * config.parallel.dp)
    return None if rest else count


# ---- refusals ----


def _deepspeed(config: RunConfig) -> str | None:
    if config.train.engine != "deepspeed":
        return None
    parallel, optim = config.parallel, config.optim
    limits: list[tuple[str, object, tuple[object, ...], str]] = [
        *((f"parallel.{axis}", parallel.size(axis), (1,), "runs dp and ep alone") for axis in ("pp", "cp", "tp", "etp")),
        ("parallel.zero", parallel.zero, (1, 2), "refuses expert layers under it"),
        ("optim.kind", optim.kind, ("adamw",), "has adamw"),
        ("optim.moments", optim.moments, ("fp32",), "keeps them in fp32"),
    ]  # fmt: skip
    for field, value, runs, why in limits:
        if value not in runs:
            mend = f"set train.engine=native, or {field}={runs[-1]}"
            return f"{field}={value} with train.engine=deepspeed, which {why}; {mend}"
    return None


def _tensor(config: RunConfig) -> str | None:
    model, tp = config.model, config.parallel.size("tp")
    for field, size in split_by_tp(model).items():
        if size % tp:
            why = ", and cca convolves whole key heads" if model.attention == "cca" and "kv" in field else ""
            mend = f"set parallel.tp={nearest(tp, tensor_sizes(model))}"
            return f"parallel.tp={tp} does not divide {field}={size}, which it splits{why}; {mend}"
    return None


def _expert(config: RunConfig) -> str | None:
    width, parallel, etp = config.model.expert_width, config.parallel, config.parallel.size("etp")
    if width % etp == 0:
        return None
    legal = divisors(width)
    if None not in (parallel.dp, parallel.cp, parallel.tp):
        stage = parallel.size("dp") * parallel.size("cp") * parallel.size("tp")
        legal = [size for size in legal if stage % (parallel.size("ep") * size) == 0] or [1]
    mend = f"set parallel.etp={nearest(etp, legal)}"
    return f"parallel.etp={etp} does not divide model.expert_width={width}, which it splits; {mend}"


def _context(config: RunConfig) -> str | None:
    model, parallel, sequence = config.model, config.parallel, config.data.sequence
    cp, tp, ulysses = parallel.size("cp"), parallel.size("tp"), parallel.context == "ulysses"
    legal = context_sizes(model, sequence, parallel.context, tp)
    if cp in legal:
        return None
    near, ranks, halves = (nearest(cp, legal) if legal else None), tp * cp, 2 if cp > 1 and not ulysses else 1
    if ulysses and heads_of(model) % ranks:
        field = "heads" if model.attention == "mla" or model.heads % ranks else "kv_heads"
        mend = f"parallel.cp={near}" if near and near > 1 else "parallel.context=gather"
        return (
            f"parallel.cp={cp} with parallel.context=ulysses gives each rank 1/{ranks} of model.{field}="
            f"{getattr(model, field)}, which tp*cp={ranks} does not divide; set {mend}"
        )
    if sequence % (cp * halves):
        pieces = f"{'' if ulysses else '2*'}{cp} equal pieces"
        start = f"parallel.cp={cp} cuts samples into {pieces}, and data.sequence={sequence} is not a multiple of that"
    else:
        start = f"parallel.tp={tp} splits the data.sequence/cp={sequence // cp} tokens of a rank and does not divide them"
    longer = -(-sequence // (ranks * halves)) * ranks * halves
    return f"{start}; set data.sequence={longer}" + (f", or parallel.cp={near}" if near else "")


def _schedule(config: RunConfig) -> str | None:
    schedule, chunks = config.parallel.schedule, config.parallel.chunks
    if schedule != "1f1b" and config.parallel.pp == 1:
        return (
            f"parallel.schedule={schedule} with parallel.pp=1, which is not a pipeline; "
            "set parallel.pp=2 or more, or parallel.schedule=1f1b"
        )
    wrong, why, mend = {
        "interleaved": (chunks == 1, "which needs several on each rank", "set parallel.chunks=2"),
        "1f1b": (chunks > 1, "which has one on each rank", "set parallel.chunks=1, or parallel.schedule=interleaved"),
        "zbv": (chunks > 2, "whose V has two on each rank", "set parallel.chunks=2"),
    }[schedule]  # fmt: skip
    return f"parallel.chunks={chunks} with parallel.schedule={schedule}, {why}; {mend}" if wrong else None


def may_lend(model: ModelConfig, ep: int, etp: int) -> bool:
    """Whether the trainer takes `lend_rows` where experts lie so: whole ones, to whose ranks all tokens are gathered. One
    rank has nobody to lend to, and may be what a run that lost nodes has left."""
    return etp == 1 and ep <= max(1, model.top_k)


def _lending(config: RunConfig) -> str | None:
    parallel, top_k = config.parallel, config.model.top_k
    ep, etp = parallel.size("ep"), parallel.size("etp")
    if parallel.lend_rows is None or (parallel.schedule != "zbv" and may_lend(config.model, ep, etp)):
        return None
    if parallel.schedule == "zbv":
        why = "parallel.schedule=zbv, which computes gradients in another order"
        mend = "parallel.schedule=1f1b"
    elif etp > 1:
        why, mend = f"parallel.etp={etp}, where a rank has a part of each expert", "parallel.etp=1"
    else:
        why = f"parallel.ep={ep} above model.top_k={top_k}, where tokens are sent by all-to-all"
        mend = f"parallel.ep={max(size for size in divisors(config.model.experts) if size <= top_k)}"
    return f"parallel.lend_rows={parallel.lend_rows} with {why}; set parallel.lend_rows=null, or {mend}"


def _stages(config: RunConfig) -> str | None:
    parallel, layers = config.parallel, config.model.layers
    pp, chunks = parallel.size("pp"), chunks_of(parallel)
    if pp * chunks <= layers:
        return None
    mend = f"parallel.pp={layers}"
    if parallel.schedule == "interleaved" and layers // pp > 1:
        mend = f"parallel.chunks={layers // pp}"
    elif chunks > 1:
        mend = f"parallel.pp={layers // chunks}" if layers // chunks > 1 else "parallel.schedule=1f1b"
    setting = f"parallel.pp={pp}" + (f" times {chunks} chunks" if chunks > 1 else "")
    return f"{setting} needs {pp * chunks} layers or more, model.layers={layers}; set {mend}"


def unfilled(config: RunConfig) -> str | None:
    """Why a batch doesn't give pipelines the micro-batches that they need; None where all do, or dp is open."""
    parallel, train = config.parallel, config.train
    pp, unit = parallel.size("pp"), train.micro_batch * (parallel.dp or 1)
    checked = -(-train.evaluate_samples // unit) * unit if train.evaluate_every else None
    batches = {
        "global_batch": train.global_batch,
        "ramp_batch": train.ramp_batch,
        "evaluate_samples": checked,
    }
    for field, samples in batches.items():
        count = micro_batches(config, samples)
        if count is None or schedulable(parallel.schedule, pp, count):
            continue
        takes, least = f"parallel.pp={pp} or more", pp
        if parallel.schedule == "interleaved":
            takes = f"multiples of parallel.pp={pp}"
            least = nearest(count, [pp * n for n in range(1, count // pp + 2)])
        return (
            f"train.{field}={getattr(train, field)} gives each pipeline {count} of train.micro_batch={train.micro_batch} "
            f"samples, and parallel.schedule={parallel.schedule} takes {takes}; set train.{field}={least * unit}"
        )
    return None


def _predicted(config: RunConfig) -> str | None:
    depth, sequence = config.model.mtp_layers, config.data.sequence
    mend = f"set model.mtp_layers={sequence - 1} or less"
    if depth >= sequence:
        return f"model.mtp_layers={depth} predicts further than data.sequence={sequence} reaches; {mend}"
    return None


RULES: tuple[Callable[[RunConfig], str | None], ...] = (
    _deepspeed, _tensor, _expert, _context, _schedule, _lending, _stages, unfilled, _predicted,
)  # fmt: skip


def refusal(config: RunConfig) -> str | None:
    """Why the trainer doesn't run a configuration, and the nearest that it runs; None where it does. Open axes are 1."""
    return next((why for rule in RULES if (why := rule(config))), None)


def never_lends(config: RunConfig, node: int) -> str | None:
    """Why `lend_rows` has no effect in a run that isn't refused; None where it has one, or isn't set.

    Args:
        node: ranks of each node.
    """
    parallel, train = config.parallel, config.train
    least, ep = parallel.lend_rows, parallel.size("ep")
    if least is None:
        return None
    split = parallel.size("cp") * parallel.size("tp")
    rows = train.micro_batch * config.data.sequence * ep // split  # an expert gets a token once
    if ep == 1:
        why, mend = "parallel.ep=1, where each rank has all experts", "parallel.ep=2 or more"
    elif math.gcd(ep, node) == 1:
        why = f"parallel.ep={ep} and {node} ranks on a node, where no two of an expert group are sure to share one"
        mend = f"cluster.slots_per_node to a multiple of {ep}"
    elif least > rows:
        why = f"at most {rows} tokens for an expert in a micro-batch"
        mend = f"parallel.lend_rows={max(1, rows // 8)}"
    else:
        return None
    return f"parallel.lend_rows={least} lends nothing with {why}; set {mend}, or parallel.lend_rows=null"


def advice(config: RunConfig) -> str | None:
    """What runs but wastes much; None where nothing does."""
    pp, count = config.parallel.size("pp"), micro_batches(config, config.train.global_batch)
    if pp == 1 or count is None or count >= 2 * pp:
        return None
    more = filling(pp) * config.train.micro_batch * config.parallel.size("dp")
    return (
        f"{count} micro-batches for parallel.pp={pp} stages leave each idle for much of a step; "
        f"set train.global_batch={more}, or a smaller train.micro_batch"
    )
