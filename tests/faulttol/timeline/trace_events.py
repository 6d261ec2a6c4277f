"""A reader of trace events, strict about what Perfetto and chrome://tracing need: `problems(tree)` says what is wrong."""

from __future__ import annotations

import math
from collections import defaultdict
from typing import Any

_PHASES = {"X", "b", "e", "s", "f", "M"}
_METADATA = {"process_name", "process_sort_index", "thread_name", "thread_sort_index"}


def problems(tree: Any) -> list[str]:
    """What an importer would drop or draw wrongly; empty for a sound file."""
    found: list[str] = []
    if not isinstance(tree, dict) or not isinstance(tree.get("traceEvents"), list):
        return ["not the JSON object form"]
    if tree.get("displayTimeUnit") not in ("ms", "ns"):
        found.append("displayTimeUnit is neither ms nor ns")
    slices: dict[tuple[int, int], list[tuple[float, float, str]]] = defaultdict(list)
    flights: dict[tuple[str, int, str], list[tuple[float, str]]] = defaultdict(list)
    arrows: dict[tuple[str, int], list[tuple[str, float, tuple[int, int]]]] = defaultdict(list)
    named: set[tuple[int, int]] = set()
    for number, event in enumerate(tree["traceEvents"]):
        wrong = _field_problem(event)
        if wrong:
            found.append(f"event {number}: {wrong}: {event}")
            continue
        thread = (event["pid"], event["tid"])
        if event["ph"] == "M" and event["name"] == "thread_name":
            named.add(thread)
        elif event["ph"] == "X":
            slices[thread].append((event["ts"], event["ts"] + event["dur"], event["name"]))
        elif event["ph"] in "be":
            flights[event["cat"], event["pid"], event["id"]].append((event["ts"], event["ph"]))
        elif event["ph"] in "sf":
            arrows[event["cat"], event["id"]].append((event["ph"], event["ts"], thread))
    for thread, own in slices.items():
        if thread not in named:
            found.append(f"thread {thread} has no name")
        found += _nesting(thread, own)
    for key, ends in flights.items():
        if [kind for _, kind in sorted(ends, key=lambda end: (end[0], end[1] == "e"))] != ["b", "e"]:
            found.append(f"async {key} isn't one begin and one end: {ends}")
    for arrow, points in arrows.items():
        if sorted(kind for kind, _, _ in points) != ["f", "s"]:
            found.append(f"arrow {arrow} hasn't one start and one finish: {points}")
        for kind, at, thread in points:
            if not any(begin - 1e-6 <= at <= end + 1e-6 for begin, end, _ in slices[thread]):
                found.append(f"arrow {arrow}: no slice at its {kind}, {at} of {thread}")
    return found


def _field_problem(event: Any) -> str:
    if not isinstance(event, dict) or event.get("ph") not in _PHASES:
        return "unknown ph"
    for name, kinds in (("name", str), ("pid", int), ("tid", int), ("ts", (int, float))):
        if not isinstance(event.get(name), kinds) or isinstance(event.get(name), bool):
            return f"{name} is missing or of a wrong kind"
    if not math.isfinite(event["ts"]) or event["ts"] < 0:
        return "ts isn't a time"
    kind = event["ph"]
    if kind == "X" and (not isinstance(event.get("dur"), int | float) or not 0 <= event["dur"] < math.inf):
        return "dur isn't a length"
    if kind == "M" and (event["name"] not in _METADATA or not isinstance(event.get("args"), dict)):
        return "unknown metadata"
    if kind in "besf" and (not event.get("cat") or not isinstance(event.get("id"), int | str)):
        return "cat or id is missing"
    if kind == "f" and event.get("bp") != "e":
        return "a finish that doesn't bind to the slice that it is in"
    return ""


def _nesting(thread: tuple[int, int], slices: list[tuple[float, float, str]]) -> list[str]:
    """Slices of a thread lie within each other or beside each other."""
    found, open_ends = [], []
    for begin, end, name in sorted(slices, key=lambda one: (one[0], -one[1])):
        while open_ends and open_ends[-1] <= begin + 1e-6:
            open_ends.pop()
        if open_ends and end > open_ends[-1] + 1e-6:
            found.append(
                f"{name} at {begin} of thread {thread} ends {end - open_ends[-1]} us after the slice that it began in"
            )
        open_ends.append(end)
    return found
