"""Whether what is measured now continues what a folder holds: the same cases, method, software and machines. Pure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from collectives.store.results import Metadata, ResultStore
from configs.errors import UserError
from configs.fabric import CollectivesConfig

_SOFTWARE = ("backend", "torch", "cuda", "hip", "nccl_version", "python")


def settings_of(settings: CollectivesConfig) -> dict[str, Any]:
    """The `collectives` section as metadata keep it."""
    tree = settings.model_dump(mode="json")
    return tree | {"timer": tree["timer"] if tree["timer"] != "auto" else "by device"}


def first_difference(before: Metadata, now: dict[str, Any]) -> str:
    """The first field of `collectives` that differs, with its earlier value; empty where none does.

    A field that the earlier measurement doesn't know yet differs where it isn't its default.
    """
    old = before.settings["collectives"]
    defaults = settings_of(CollectivesConfig())
    field = next((name for name in now if old.get(name, defaults.get(name)) != now[name]), None)
    return "" if field is None else f"collectives.{field}={old.get(field, defaults.get(field))}"


def difference(before: Metadata, now: Metadata) -> str:
    """What differs between two measurements, as it was before; empty where one continues the other."""
    if differs := first_difference(before, now.settings["collectives"]):
        return differs
    for name in ("ranks", "layout", "network"):
        if before.settings[name] != now.settings[name]:
            return f"{name}={before.settings[name]}"
    for name in _SOFTWARE:
        if before.software.get(name) != now.software.get(name):
            return f"{name} {before.software.get(name)}, now {now.software.get(name)}"
    old, new = (about.software.get("environment", {}) for about in (before, now))
    for name in sorted({*old, *new}):
        if old.get(name) != new.get(name):
            return f"{name}={old.get(name, 'unset')} in the environment, now {new.get(name, 'unset')}"
    if before.system["hardware"] != now.system["hardware"]:
        return f"hardware={before.system['hardware']}"
    hosts = [_hosts(about) for about in (before, now)]
    return "" if hosts[0] == hosts[1] else f"on {_named(hosts[0])}, now {_named(hosts[1])}"


def _hosts(about: Metadata) -> list[tuple[str, str, tuple[int, ...]]]:
    """Each host with its device and the ranks on it."""
    return [
        (str(host["hostname"]), str(host.get("device_info", "")), tuple(host["ranks"]))
        for host in about.system["hosts"]
    ]


def _named(hosts: list[tuple[str, str, tuple[int, ...]]]) -> str:
    shown = ", ".join(f"{name} ({device}, ranks {_span(ranks)})" for name, device, ranks in hosts[:4])
    return shown + (f" and {len(hosts) - 4} hosts more" if len(hosts) > 4 else "")


def _span(ranks: tuple[int, ...]) -> str:
    whole = ranks == tuple(range(ranks[0], ranks[-1] + 1)) if ranks else False
    return f"{ranks[0]} to {ranks[-1]}" if whole and len(ranks) > 1 else ",".join(map(str, ranks))


def refuse_finished(store: ResultStore) -> None:
    """Refuse to measure into a folder that holds a whole measurement.

    Raises:
        UserError: where it does.
    """
    if store.metadata.exists() and store.read_metadata()[1] is not None:
        raise UserError(
            f"{store.folder} holds a finished measurement; name another folder with --out, or remove it"
        )


def other_measurement_error(folder: Path, differs: str) -> UserError:
    """What is said where a folder holds another measurement."""
    return UserError(
        f"{folder} holds another measurement ({differs}); name another folder with --out, or remove it"
    )
