"""The answers of `size` as text: aligned columns, at most 110 wide, the worst first."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Iterator, Sequence

from configs.errors import UserError, nearest
from configs.hardware import HardwareConfig
from configs.hugging_face.read import left_out
from trainer.sizing.ask import catalogue
from trainer.sizing.ask.answer import SizingAnswer
from trainer.sizing.figures import Figure
from trainer.sizing.lint.rules import LintFinding, rules
from trainer.sizing.memory.estimate import GIB

WIDTH = 110
_SCALES = {
    "s": ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")),
    "bytes": ((GIB, "GiB"),),
    "1": ((1e15, "P"), (1e12, "T"), (1e9, "B"), (1e6, "M"), (1, "")),
    "FLOP": ((1e15, "PFLOP"), (1e12, "TFLOP"), (1e9, "GFLOP"), (1e6, "MFLOP"), (1, "FLOP")),
}
"""Units that are scaled, with what they are called then; the last is for what is smaller, too."""
HINT = "`--explain NAME` shows where a number comes from, `--explain` all names."


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = (), indent: int = 2) -> Iterator[str]:
    """Rows in columns as wide as their widest cell; those in `right` are flush right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        cells = (
            f"{c:>{w}}" if i in right else f"{c:<{w}}"
            for i, (c, w) in enumerate(zip(row, widths, strict=True))
        )
        yield (" " * indent + "  ".join(cells)).rstrip()


def _wrapped(text: str, indent: int, after: int = 0) -> list[str]:
    """A text in lines; those after the first are indented by `after` more."""
    first, rest = " " * indent, " " * (indent + after)
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest)


def amount(figure: Figure) -> str:
    """A figure's value as a person reads it."""
    return in_unit(figure.value, figure.unit)


def in_unit(value: float, unit: str) -> str:
    """A value in its unit, with three or four digits."""
    if unit == "%":
        return f"{value:.1f} %"
    scales = _SCALES.get(unit, ((1.0, unit),))
    scale, name = next((pair for pair in scales if abs(value) >= pair[0]), scales[-1])
    digits = ",.6g" if name in ("", "FLOP") else ".4g"
    return f"{value / scale:{digits}} {name}".rstrip()


def interval(figure: Figure) -> str:
    """`(a to b)` where a figure isn't exact."""
    low, high = figure.low, figure.high
    return "" if low == high else f"({in_unit(low, figure.unit)} to {in_unit(high, figure.unit)})"


def sized(answer: SizingAnswer) -> Iterator[str]:
    """The whole answer for one model on one device."""
    job, name = answer.job, answer.costs.hardware.name
    axes = ", ".join(f"{axis}={size}" for axis, size in job.layout.to_json().items() if size > 1)
    what = f"{job.micro_batch} x {job.sequence} tokens, {job.precision}, {axes or 'one device'}"
    yield f"{job.model.name} on {name}: {what}"
    if answer.assumed:
        yield f"  assumed: {' '.join(answer.assumed)} (usual for pre-training; set them to change them)"
    for line in left_out(job.model):
        yield from _wrapped(line, 2, 2)
    yield f"  rates: {answer.basis}"
    for note in answer.notes:
        yield from _wrapped(f"note: {note}", 2, 2)
    yield from _counts(answer)
    yield from _costs(answer)
    yield from _lint(answer)
    if answer.suggestions_requested:
        yield from _suggestions(answer)


def _counts(answer: SizingAnswer) -> Iterator[str]:
    said = {name: amount(figure) for name, figure in answer.counts.items()}
    yield from ("", "PARAMETERS")
    yield from columns([
        ("total", said["total"], "active", said["active"]),
        ("without embeddings", said["total_without_embeddings"], "", said["active_without_embeddings"]),
    ], right=(1, 3))  # fmt: skip
    parts = ("attention", "experts", "shared", "dense", "router", "embedding", "output", "norms")
    yield from _wrapped(", ".join(f"{part} {said[part]}" for part in parts if answer.counts[part].value), 2)
    yield f"  FLOPs of a token, forward and backward: {said['flops_per_token']}"


def _costs(answer: SizingAnswer) -> Iterator[str]:
    yield from ("", "ONE DEVICE  time of a micro-batch, forward and backward; peak memory of a rank")
    if not answer.speed:
        yield f"  no time: {answer.why_not}"
    else:
        time, rate, mfu = answer.speed["time"], answer.speed["rate"], answer.speed.get("mfu")
        share = f"{mfu.value:.1f} % of the peak {interval(mfu)}" if mfu else "no MFU: the peak is unknown"
        yield f"  {amount(time)} {interval(time)}, {amount(rate)}, {share}"
        yield from _shares(time)
    used, have = answer.memory, answer.costs.hardware.memory_gib
    verdict = {True: "fits", False: "DOES NOT FIT", None: "unknown whether it fits"}[answer.fits(answer.job)]
    of = f" of {have:g} GiB" if have else ""
    yield f"  memory {amount(used)}{of} {interval(used)}: {verdict}"
    if answer.job.layout.ranks > 1:
        yield from _step(answer)


def _step(answer: SizingAnswer) -> Iterator[str]:
    job, figures = answer.job, answer.step
    extra = f", recompute={job.recompute}" if job.recompute != "none" else ""
    extra += f", {job.interleave} model chunks a stage" if job.interleave > 1 else ""
    batch = f"{job.global_batch} samples, {job.micro_batches} micro-batches"
    yield from ("", f"STEP  {job.layout.ranks} devices, {batch}, ZeRO {job.zero}{extra}")
    for why in answer.chosen:
        yield from _wrapped(why, 2, 2)
    if not figures:
        yield f"  no time: {answer.step_unknown}"
        return
    step, mfu = figures["step"], figures.get("mfu")
    share = f", MFU {amount(mfu)} {interval(mfu)}" if mfu else ""
    yield f"  {amount(step)} {interval(step)}, {figures['rate'].value:,.0f} tokens/s{share}"
    yield from _shares(step)


def _shares(whole: Figure) -> Iterator[str]:
    """The parts of a time with their shares, the largest first, those that vanish left out."""
    parts = sorted(whole.parts, key=lambda part: -part.value)
    rows = [(p.name.partition(".")[2], amount(p), f"{p.value / whole.value:.1%}") for p in parts]
    yield from columns([row for row in rows if row[2] != "0.0%"], (1, 2), 4)


def _lint(answer: SizingAnswer) -> Iterator[str]:
    yield ""
    if answer.why_not:
        yield "LINT  without costs, and without the rules on tiles"
        yield from _wrapped(answer.why_not, 2)
    elif answer.findings:
        yield "LINT  percent of the micro-batch's time that the better value saves at equal work; warnings, not errors"
    else:
        yield f"LINT  nothing: this shape suits {answer.costs.hardware.name}"
    if not answer.findings:
        return
    cells = [(_cost(f), f.rule.name, f"{_field(f)} {f.value}", f.better) for f in answer.findings]
    head, *lines = columns([("cost", "rule", "value", "better"), *cells], right=(0,))
    yield head
    for line, finding in zip(lines, answer.findings, strict=True):
        yield line
        why = f"{finding.rule.reason} [{finding.rule.source}]"
        if finding.cost is None and finding.basis:
            why = f"cost unknown: {finding.basis}; {why}"
        yield from _wrapped(why, 11)


def _cost(finding: LintFinding) -> str:
    return "?" if finding.cost is None else f"{finding.cost:.1f} %"


def _field(finding: LintFinding) -> str:
    return finding.field.removeprefix("model.")


def _suggestions(answer: SizingAnswer) -> Iterator[str]:
    yield ""
    name = answer.costs.hardware.name
    if not answer.suggestions:
        yield f"SUGGESTIONS  none: {answer.why_not or f'no shape near this one is faster on {name} by 1 % or more'}"
        return
    yield f"SUGGESTIONS  time saved per token on {name}; total and active parameters stay within 1 %"
    for index, one in enumerate(answer.suggestions, 1):
        figure = one.figure(index)
        note = "  (other granularity: learns differently)" if one.granularity else ""
        sizes = f"parameters {one.total - 1:+.2%}, active {one.active - 1:+.2%}"
        yield f"  {amount(figure):>7} {interval(figure)}  {sizes}{note}"
        yield from _wrapped(" ".join(one.changes), 11)


def compared(answers: Sequence[SizingAnswer]) -> Iterator[str]:
    """The same model on several devices, side by side."""
    job, names = answers[0].job, [one.costs.hardware.name for one in answers]
    yield f"{job.model.name}: {job.micro_batch} x {job.sequence} tokens, {job.precision}"
    yield from (f"  {name} rates: {one.basis}" for name, one in zip(names, answers, strict=True))
    cells: dict[str, Callable[[SizingAnswer], str]] = {
        "parameters": lambda one: amount(one.counts["total"]),
        "active": lambda one: amount(one.counts["active"]),
        "micro-batch": lambda one: amount(one.speed["time"]) if one.speed else "unknown",
        "rate": lambda one: amount(one.speed["rate"]) if one.speed else "unknown",
        "of the peak": lambda one: amount(one.speed["mfu"]) if "mfu" in one.speed else "unknown",
        "memory": lambda one: amount(one.memory),
        "fits": lambda one: {True: "yes", False: "no", None: "?"}[one.fits(one.job)],
    }
    rows = [["", *names], *([label, *map(cell, answers)] for label, cell in cells.items())]
    yield from columns(rows, right=range(1, len(rows[0])))
    yield from (
        "",
        "LINT  percent of the micro-batch's time; . where the rule is kept or isn't for the device",
    )
    costs: dict[tuple[str, str], list[str]] = {}
    worst: dict[tuple[str, str], float] = {}
    for i, one in enumerate(answers):
        for finding in one.findings:
            key = (finding.rule.name, f"{_field(finding)} {finding.value}")
            costs.setdefault(key, ["."] * len(answers))[i] = _cost(finding)
            worst[key] = max(worst.get(key, -1.0), finding.cost or 0.0)
    table = [["rule", "value", *names]]
    table += [[*key, *costs[key]] for key in sorted(costs, key=lambda key: -worst[key])]
    yield from columns(table, right=range(2, len(table[0]))) if costs else ["  nothing on any of them"]
    for one in answers:
        if one.suggestions_requested:
            yield from _suggestions(one)


def explained(figures: dict[str, Figure], name: str) -> Iterator[str]:
    """One figure's derivation as a tree; without a name, what can be asked for.

    Raises:
        UserError: for a name that no figure has.
    """
    if not name:
        yield from columns([(f.name, amount(f)) for f in figures.values()], right=(1,), indent=0)
        return
    if name not in figures:
        raise UserError(
            f"--explain {name}: no number has that name{nearest(name, figures)}; `--explain` lists them"
        )
    yield from _tree(figures[name], 0)


def _tree(figure: Figure, depth: int) -> Iterator[str]:
    pad = "  " * depth
    yield f"{pad}{figure.name} = {amount(figure)} {interval(figure)}".rstrip()
    yield from textwrap.wrap(
        figure.derivation, WIDTH, initial_indent=f"{pad}  = ", subsequent_indent=f"{pad}    "
    )
    for part in figure.parts:
        yield from _tree(part, depth + 1)


def hardware_table(hardware: HardwareConfig) -> Iterator[str]:
    """All numbers of one device, each with its source."""
    yield f"{hardware.name}  ({hardware.architecture or hardware.kind})"
    rows = []
    for label, value, field in catalogue.rows(hardware):
        source = hardware.source_of(field)
        typed = catalogue.provenance(hardware, field).startswith("typed")
        rows.append((label, value, "typed" if typed else f"[{source.name}]" if source else ""))
    yield from columns(rows) if rows else ["  nothing on record"]
    for source in hardware.sources:
        yield from _wrapped(f"[{source.name}] {source.what}, {source.date}", 2, 4)


def hardware_tables(devices: Sequence[HardwareConfig]) -> Iterator[str]:
    """An overview, then each device with the source of every number."""
    yield from columns([*catalogue.SUMMARY, *(catalogue.summary(one) for one in devices)], right=range(1, 9))
    for one in devices:
        yield ""
        yield from hardware_table(one)


def rule_list() -> Iterator[str]:
    """All rules with their reasons and sources."""
    for rule in rules():
        where = " and ".join(rule.architectures or rule.kinds)
        yield f"{rule.name}  ({where})" + ("" if rule.check != "none" else "  listed only")
        for line in (rule.rule, f"because {rule.reason}", f"[{rule.source}]"):
            yield from _wrapped(line, 4)
