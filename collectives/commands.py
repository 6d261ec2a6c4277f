"""What the commands that read a measurement do, and the measurement of one device. They return text and print none."""

from __future__ import annotations

import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

from collectives.analysis.compare import against_baseline, against_limit, among_peers, pair_rates
from collectives.analysis.judge import BandwidthFinding, FindingKind
from collectives.store.results import Metadata, Results, ResultStore
from collectives.store.resume import settings_of
from configs import profile as profiles
from configs.compose import compose
from configs.errors import UserError
from configs.fabric import CollectivesConfig
from configs.paths import HomePaths, RunPaths, default_home
from configs.profile import DeviceProfile, FabricProfile
from configs.schema import HardwareConfig, RunConfig


def open_measurement(name: Path) -> ResultStore:
    """The measurement in a folder, in a folder of `run --out`, or of a submitted run by its id.

    Raises:
        UserError: where there is none, or nothing was measured yet.
    """
    for folder in (name, RunPaths(name).measurement):
        if (folder / "metadata.json").exists():
            return ResultStore(folder)
    home = HomePaths(default_home())
    if not name.exists() and any(run.startswith(name.name) for run in home.run_ids()):
        store = ResultStore(home.existing(name.name).measurement)
        if store.metadata.exists():
            return store
    raise UserError(
        f"{name} holds no measurement; name the folder that `python -m collectives run` printed, or the id of a run that "
        "was submitted with workload=collectives"
    )


def _rows(store: ResultStore) -> Results:
    results = store.read()
    if not any(row.timings for row in results.rows):
        raise UserError(
            f"{store.folder} has no rows with times; this command reads sweeps (collectives.study=sweep)"
        )
    if missing := [name for name in ("hardware", "hosts") if name not in results.metadata.system]:
        raise UserError(
            f"{store.metadata} is damaged (its system has no {', '.join(missing)}); put a copy of it there, or measure "
            "into another folder"
        )
    return results


def _settings(about: Metadata) -> dict[str, Any]:
    """The measurement's own settings; what an earlier version didn't know has its default."""
    return settings_of(CollectivesConfig()) | about.settings["collectives"]


def _hardware(results: Results) -> HardwareConfig:
    return compose([f"hardware={results.metadata.system['hardware']}"]).hardware


def fit(store: ResultStore, name: str | None, confidence: float) -> str:
    """Fit a sweep, write the profile, and tell it as a table."""
    from collectives.analysis import curves  # loads matplotlib

    if not 0.5 < confidence < 1:
        raise UserError(f"--confidence={confidence} is out of range; type one between 0.5 and 1, e.g. 0.95")
    paths = [_profile_path("fabric", name)] if name is not None else []
    results = _rows(store)
    profile = curves.profile(
        results, name or store.folder.parent.name, results.metadata.system["hardware"], confidence
    )
    _save(profile, paths)
    beside = store.folder / "fabric.yaml"
    try:
        profiles.save(profile, beside)
        kept = [f"profile: {beside}"]
    except OSError as error:  # another's measurement may be read, and not written to
        kept = (
            []
            if name
            else [f"# not kept: {beside} can't be written ({error.strerror}); --name keeps it elsewhere"]
        )
    return "\n".join([*curves.table(profile), *kept, *(f"profile: {path}" for path in paths)])


def _profile_path(kind: str, name: str) -> Path:
    """Where a profile with the name is kept, and looked for.

    Raises:
        UserError: for a name with which it would lie elsewhere.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise UserError(
            f"--name='{name}' can't name a profile; type letters, digits, ., - and _, e.g. --name lab"
        )
    return profiles.FOLDER / kind / f"{name}.yaml"


def _refuse_unwritable(path: Path) -> None:
    """Before minutes of measuring, whose outcome couldn't be kept."""
    there = next(place for place in (path, *path.parents) if place.exists())
    if there.is_dir() == (there != path) and os.access(there, os.W_OK):
        return
    why = "it is a folder" if there == path and path.is_dir() else f"{there} isn't writable"
    raise UserError(
        f"the profile can't be written to {path}: {why}; change to a folder that you may write, or use another --name"
    )


def _save(profile: FabricProfile | DeviceProfile, paths: list[Path]) -> None:
    for path in paths:
        try:
            profiles.save(profile, path)
        except OSError as error:
            raise UserError(f"can't write {path} ({error.strerror}); free it, or leave --name out") from None


def compare(
    store: ResultStore, baseline: ResultStore | None, tolerance: float, warn: Callable[[str], None]
) -> list[BandwidthFinding]:
    """Findings of a measurement: its own first, then those of a sweep against baseline, limit and peers."""
    if not 0 < tolerance < 1:
        raise UserError(f"--tolerance={tolerance} is out of range; type one between 0 and 1, e.g. 0.1")
    own = _findings(store, "findings")
    if _settings(store.read_metadata()[0])["study"] != "sweep":
        return own
    results = _rows(store)
    slow_ratio = _settings(results.metadata)["slow_ratio"]
    compared = against_limit(results, _hardware(results), slow_ratio) + among_peers(results, slow_ratio)
    if baseline is not None:
        compared += against_baseline(results, _rows(baseline), tolerance, warn)
    try:
        store.write_json("comparison", [finding.to_json() for finding in compared])
    except OSError as error:  # another's measurement may be read, and not written to
        warn(f"not kept for `report`: {store.folder} can't be written ({error.strerror})")
    return own + compared


def _findings(store: ResultStore, name: str) -> list[BandwidthFinding]:
    with store.readable(name):
        return [_finding(tree) for tree in store.read_json(name) or ()]


def _finding(tree: dict[str, Any]) -> BandwidthFinding:
    """A finding that `BandwidthFinding.to_json` wrote."""
    return BandwidthFinding(
        FindingKind(tree["kind"]), tree["what"], tuple(tree["hosts"]), tuple(tree["ranks"]), tree["ratio"], tree["evidence"]
    )  # fmt: skip


def report(store: ResultStore, baseline: ResultStore | None) -> list[Path]:
    """Write plots and the page; their paths."""
    from collectives.analysis import curves
    from collectives.analysis.probes import Direction, Endpoint, Probes
    from collectives.report import write as reporting

    results = store.read()
    fitted = store.folder / "fabric.yaml"
    fits = curves.curves(profiles.load(FabricProfile, str(fitted))) if fitted.exists() else ()
    pairs = pair_rates(results)
    probes = store.read_json("probes")
    if probes:
        with store.readable("probes"):
            directions = [
                Direction(**{**d, "passes": tuple(map(tuple, d["passes"]))}) for d in probes["directions"]
            ]
            endpoints = [Endpoint(**endpoint) for endpoint in probes["endpoints"]]
            pairs = Probes(probes["size"], tuple(endpoints), tuple(directions)).rates()
    with store.readable("moe"):
        layers = [layer for layer in store.read_json("moe") or () if layer["routing"].startswith("curve ")]
        even = min(layers, key=lambda layer: layer["imbalance"])["sequential_us"] if layers else 1.0
    findings = _findings(store, "findings") + _findings(store, "comparison")
    try:
        return reporting.write(
            store,
            fits=fits,
            findings=[finding.to_json() for finding in findings],
            baseline=baseline.read() if baseline else None,
            pairs=pairs,
            curves=[
                (layer["imbalance"], layer["sequential_us"] / even, layer["imbalance"]) for layer in layers
            ],
        )
    except OSError as error:
        raise UserError(
            f"can't write the report into {store.folder} ({error.strerror}); copy the measurement to a folder that you may "
            "write, and name that"
        ) from None


def device(
    config: RunConfig, name: str | None, seconds: float, against: str | None, progress: Callable[[str], None]
) -> tuple[str, bool]:
    """Measure one device; the outcome as text, and whether it agrees with the profile to compare with."""
    from collectives.device import kernels
    from collectives.device import profile as measuring  # loads torch
    from collectives.timing.team import choose_device
    from configs.rank import RankContext

    path = _profile_path("device", name) if name is not None else Path("device.yaml").absolute()
    known = profiles.load(DeviceProfile, against) if against else None
    _refuse_unwritable(path)
    rank = RankContext.from_environment({}, Path.cwd())
    profile = measuring.measure(config, choose_device(config, rank), seconds, progress)
    lines = kernels.table(profile)
    _save(profile.model_copy(update={"name": name or "device"}), [path])
    lines.append(f"profile: {path}")
    if known is None:
        return "\n".join(lines), True
    agreement = kernels.agreement(known, profile)
    return "\n".join([*lines, str(agreement)]), agreement.agrees
