"""The answers of `size` as text: aligned columns, at most 110 wide, the worst first."""

from __future__ import annotations

import textwrap
from collections.abc import Iterator, Sequence

from configs.errors import UserError, nearest
from configs.hardware import HardwareConfig
from configs.hugging_face.read import left_out
from trainer.sizing.ask import catalogue
from trainer.sizing.ask.answer import SizingAnswer
from trainer.sizing.figures import Figure
from trainer.sizing.lint.rules import rules

WIDTH = 110
HINT = "`--explain NAME` shows where a number comes from, `--explain` all names."
_GIB = 1 << 30


def columns(rows: Sequence[Sequence[str]], right: Sequence[int] = (), indent: int = 2) -> list[str]:
    """Rows in columns as wide as their widest cell; those in `right` are flush right."""
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [
            cell.rjust(w) if i in right else cell.ljust(w)
            for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append((" " * indent + "  ".join(cells)).rstrip())
    return lines


def _wrapped(text: str, indent: int, after: int = 0) -> list[str]:
    """A text in lines; those after the first are indented by `after` more."""
    first, rest = " " * indent, " " * (indent + after)
    return textwrap.wrap(text, WIDTH, initial_indent=first, subsequent_indent=rest)


def amount(figure: Figure) -> str:
    """A figure's value as a person reads it."""
    return in_unit(figure.value, figure.unit)


def in_unit(value: float, unit: str) -> str:
    """A value in its unit, with three or four digits."""
    if unit == "s":
        scale, name = next(
            (s, n) for s, n in ((1.0, "s"), (1e-3, "ms"), (1e-6, "us")) if abs(value) >= s or n == "us"
        )
        return f"{value / scale:.4g} {name}"
    if unit == "bytes":
        return f"{value / _GIB:.4g} GiB"
    if unit == "%":
        return f"{value:.1f} %"
    if unit in ("1", "FLOP"):
        for name, scale in (("P", 1e15), ("T", 1e12), ("B" if unit == "1" else "G", 1e9), ("M", 1e6)):
            if abs(value) >= scale:
                return f"{value / scale:.4g} {name}" + ("FLOP" if unit == "FLOP" else "")
        return f"{value:,.6g}" + (" FLOP" if unit == "FLOP" else "")
    return f"{value:.4g} {unit}"


def interval(figure: Figure) -> str:
    """`(a to b)` where a figure isn't exact."""
    if figure.low == figure.high:
        return ""
    return f"({in_unit(figure.low, figure.unit)} to {in_unit(figure.high, figure.unit)})"


def sized(answer: SizingAnswer) -> Iterator[str]:
    """The whole answer for one model on one device."""
    job, name = answer.job, answer.prices.hardware.name
    layout = (
        ", ".join(f"{axis}={size}" for axis, size in job.layout.to_json().items() if size > 1) or "one device"
    )
    yield f"{job.model.name} on {name}: {job.micro_batch} x {job.sequence} tokens, {job.precision}, {layout}"
    if answer.assumed:
        yield f"  assumed: {' '.join(answer.assumed)} (as pre-training usually has; type them to change them)"
    for line in left_out(job.model):
        yield from _wrapped(line, 2, 2)
    yield f"  rates: {answer.basis}"
    yield from _counts(answer)
    yield from _costs(answer)
    yield from _lint(answer)
    if answer.wanted:
        yield from _suggestions(answer)


def _counts(answer: SizingAnswer) -> Iterator[str]:
    counts = answer.counts
    yield ""
    yield "PARAMETERS"
    rows = [
        ("all", amount(counts["total"]), "a token meets", amount(counts["active"])),
        (
            "without embeddings",
            amount(counts["total_without_embeddings"]),
            "",
            amount(counts["active_without_embeddings"]),
        ),
    ]
    yield from columns(rows, right=(1, 3))
    parts = ("attention", "experts", "shared", "dense", "router", "embedding", "output", "norms")
    sizes = ", ".join(f"{part} {amount(counts[part])}" for part in parts if counts[part].value)
    yield from _wrapped(sizes, 2)
    yield f"  FLOPs of a token, forward and backward: {amount(counts['flops_per_token'])}"


def _costs(answer: SizingAnswer) -> Iterator[str]:
    job = answer.job
    yield ""
    yield "ONE DEVICE  time of a micro-batch, forward and backward; memory of the fullest rank"
    if not answer.speed:
        yield f"  no time: {answer.why_not}"
    else:
        rate, mfu = answer.speed["rate"], answer.speed.get("mfu")
        time = answer.speed["time"]
        share = f"{mfu.value:.1f} % of the peak {interval(mfu)}" if mfu else "no MFU: the peak is unknown"
        yield f"  {amount(time)} {interval(time)}, {amount(rate)}, {share}"
        rows = sorted(time.parts, key=lambda part: -part.value)
        cells = [
            (part.name.removeprefix("time."), amount(part), f"{part.value / time.value:.1%}") for part in rows
        ]
        yield from columns([row for row in cells if row[2] != "0.0%"], (1, 2), 4)
    used, have = answer.memory, answer.prices.hardware.memory_gib
    verdict = {True: "fits", False: "DOES NOT FIT", None: "unknown whether it fits"}[answer.fits(answer.job)]
    of = f" of {have:g} GiB" if have else ""
    yield f"  memory {amount(used)}{of} {interval(used)}: {verdict}"
    if job.layout.ranks > 1:
        yield from _step(answer)


def _step(answer: SizingAnswer) -> Iterator[str]:
    job, figures = answer.job, answer.step
    yield ""
    extra = f", recompute={job.recompute}" if job.recompute != "none" else ""
    extra += f", {job.interleave} model chunks a stage" if job.interleave > 1 else ""
    batch = f"{job.global_batch} samples, {job.micro_batches} micro-batches"
    yield f"STEP  {job.layout.ranks} devices, {batch}, ZeRO {job.zero}{extra}"
    for why in answer.chosen:
        yield from _wrapped(why, 2, 2)
    if not figures:
        yield f"  no time: {answer.step_unknown}"
        return
    step, mfu = figures["step"], figures.get("mfu")
    share = f", MFU {amount(mfu)} {interval(mfu)}" if mfu else ""
    yield f"  {amount(step)} {interval(step)}, {figures['rate'].value:,.0f} tokens/s{share}"
    rows = [
        (p.name.partition(".")[2], amount(p), f"{p.value / step.value:.1%}")
        for p in sorted(step.parts, key=lambda p: -p.value)
    ]
    yield from columns([row for row in rows if row[2] != "0.0%"], (1, 2), 4)


def _lint(answer: SizingAnswer) -> Iterator[str]:
    yield ""
    if answer.why_not:
        yield "LINT  without costs, and without the rules on tiles"
        yield from _wrapped(answer.why_not, 2)
    elif not answer.findings:
        yield f"LINT  nothing: this shape suits {answer.prices.hardware.name}"
    if not answer.findings:
        return
    if not answer.why_not:
        yield "LINT  percent of the micro-batch's time that the better value saves at equal work; warnings, not errors"
    head = ("cost", "rule", "value", "better")
    rows = [head]
    for finding in answer.findings:
        cost = "?" if finding.cost is None else f"{finding.cost:.1f} %"
        field = finding.field.removeprefix("model.")
        rows.append((cost, finding.rule.name, f"{field} {finding.value}", finding.better))
    lines = columns(rows, right=(0,))
    yield lines[0]
    for line, finding in zip(lines[1:], answer.findings, strict=True):
        yield line
        why = f"{finding.rule.reason} [{finding.rule.source}]"
        if finding.cost is None and finding.basis:
            why = f"cost unknown: {finding.basis}; {why}"
        yield from _wrapped(why, 11)


def _suggestions(answer: SizingAnswer) -> Iterator[str]:
    yield ""
    name = answer.prices.hardware.name
    if not answer.suggestions:
        yield f"SUGGESTIONS  none: {answer.why_not or f'no shape near this one is faster on {name} by 1 % or more'}"
        return
    yield f"SUGGESTIONS  a token takes so much less time on {name}; all parameters, and those a token meets, within 1 %"
    for index, one in enumerate(answer.suggestions, 1):
        figure = one.figure(index)
        note = "  (other granularity: learns differently)" if one.granularity else ""
        sizes = f"parameters {one.total - 1:+.2%}, active {one.active - 1:+.2%}"
        yield f"  {amount(figure):>7} {interval(figure)}  {sizes}{note}"
        yield from _wrapped(" ".join(one.changes), 11)


def compared(answers: Sequence[SizingAnswer]) -> Iterator[str]:
    """The same model on several devices, side by side."""
    job = answers[0].job
    yield f"{job.model.name}: {job.micro_batch} x {job.sequence} tokens, {job.precision}"
    for one in answers:
        yield f"  {one.prices.hardware.name} rates: {one.basis}"
    rows: list[list[str]] = [["", *(one.prices.hardware.name for one in answers)]]

    def row(label: str, cells: Sequence[str]) -> None:
        rows.append([label, *cells])

    row("parameters", [amount(one.counts["total"]) for one in answers])
    row("a token meets", [amount(one.counts["active"]) for one in answers])
    row("micro-batch", [amount(one.speed["time"]) if one.speed else "unknown" for one in answers])
    row("rate", [amount(one.speed["rate"]) if one.speed else "unknown" for one in answers])
    row("of the peak", [amount(one.speed["mfu"]) if "mfu" in one.speed else "unknown" for one in answers])
    row("memory", [amount(one.memory) for one in answers])
    row("fits", [{True: "yes", False: "no", None: "?"}[one.fits(one.job)] for one in answers])
    yield from columns(rows, right=range(1, len(answers) + 1))
    yield ""
    yield "LINT  percent of the micro-batch's time; . where the rule is kept or isn't for the device"
    costs: dict[tuple[str, str], list[str]] = {}
    worst: dict[tuple[str, str], float] = {}
    for i, one in enumerate(answers):
        for finding in one.findings:
            key = (finding.rule.name, f"{finding.field.removeprefix('model.')} {finding.value}")
            cells = costs.setdefault(key, ["."] * len(answers))
            cells[i] = "?" if finding.cost is None else f"{finding.cost:.1f} %"
            worst[key] = max(worst.get(key, -1.0), finding.cost or 0.0)
    table = [["rule", "value", *(one.prices.hardware.name for one in answers)]]
    table += [[*key, *costs[key]] for key in sorted(costs, key=lambda key: -worst[key])]
    yield from columns(table, right=range(2, len(answers) + 2)) if costs else ["  nothing on any of them"]
    for one in answers:
        if one.wanted:
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
        changed = catalogue.provenance(hardware, field).startswith("typed")
        rows.append((label, value, "typed" if changed else f"[{source.name}]" if source else ""))
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
