"""The plan of a run as a person sees it."""

from __future__ import annotations

from typing import Any

from orchestrator.commands.text import count, indented, plural, size, table


def plan_table(plan: dict[str, Any]) -> str:
    """The plan before the start: what will run, what it takes, and why each automatic choice."""
    axes = " ".join(f"{axis}={n}" for axis, n in plan["layout"].items() if n > 1) or "one rank"
    parameters, memory = plan["parameters"], plan["memory"]
    nodes = f"{plural(plan['nodes'], 'node')} x {plan['slots_per_node']} slots"
    parts = ", ".join(f"{name} {size(n)}" for name, n in memory.items())
    layout = f"{axes}: {plural(plan['ranks'], 'rank')} on {nodes} of cluster {plan['cluster']}"
    if plan["measures"]:
        rows = [
            ("measure", plan["measures"]),
            ("hardware", plan["hardware"]),
            ("device", plan["device"]),
            ("layout", layout),
        ]
    else:
        of_them = f"{count(parameters['total'])} parameters, {count(parameters['active'])} active"
        steps = f"{count(plan['tokens_per_step'])} per step, {plan['steps']} steps, {count(plan['tokens'])} in all"
        rows = [
            ("model", f"{plan['model']}: {of_them}"),
            ("hardware", f"{plan['hardware']}, {plan['precision']}; MFU {plan['mfu_basis']}"),
            ("device", plan["device"]),
            ("layout", layout),
            ("engine", _engine(plan)),
            ("peak memory", f"{size(sum(memory.values()))} per rank (estimate: {parts})"),
            ("step time", step_time(plan["step_time"], plan["tokens_per_step"])),
            ("tokens", steps),
            ("data", str(plan["data"])),
        ]
    text = table(rows)
    if plan["choices"]:
        chosen = [(c["field"], "=", c["value"], c["reason"]) for c in plan["choices"]]
        text += "\nchosen for you\n" + indented(table(chosen))
    for warning in plan["warnings"]:
        text += f"\nwarning: {warning}"
    for note in plan["notes"]:
        text += f"\nnote: {note}"
    return text


def _engine(plan: dict[str, Any]) -> str:
    """What trains, and how."""
    again = "no recomputation" if plan["recompute"] == "none" else f"{plan['recompute']} recomputation"
    words = [plan["engine"], plan["optimizer"], f"ZeRO {plan['zero']}", again]
    if plan["layout"]["pp"] > 1:
        words.append(
            f"schedule {plan['schedule']}"
            + (f", {plan['chunks']} chunks a rank" if plan["chunks"] > 1 else "")
        )
    if plan["layout"]["cp"] > 1:
        words.append(f"context by {plan['context']}")
    return ", ".join(words)


def step_time(predicted: dict[str, Any], tokens: int) -> str:
    """The predicted time of a step with its interval, or why there is none."""
    if "unknown" in predicted:
        return f"unknown: {predicted['unknown']}"
    seconds, low, high = (predicted[name] for name in ("seconds", "low", "high"))
    return f"{seconds:.3g} s predicted ({low:.3g} to {high:.3g} s), {count(tokens / seconds)} tokens/s"
