"""Network presets, and which of their variables are set where."""

from __future__ import annotations

import re
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from configs.compose import choices, compose, dump, load
from configs.errors import UserError
from configs.fabric import LibrarySetting, NetworkConfig
from configs.library_environment import Kind, Version, environment

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]

PRESETS = choices("network")
#: Values that only a site knows.
SITE = {
    "NCCL_SOCKET_IFNAME",
    "NCCL_IB_HCA",
    "NCCL_IB_GID_INDEX",
    "NCCL_IB_TC",
    "NCCL_IB_FIFO_TC",
    "NCCL_IB_SL",
}
#: (variable, value) that switch off a transport's errors, or a flush that data need.
HIDING = {
    ("NCCL_IB_RETURN_ASYNC_EVENTS", "0"), ("NCCL_DEBUG", "NONE"), ("NCCL_IB_TIMEOUT", "0"),
    ("NCCL_GDR_FLUSH_DISABLE", "1"), ("TORCH_NCCL_ASYNC_ERROR_HANDLING", "0"), ("NCCL_RAS_ENABLE", "0"),
}  # fmt: skip


@cache
def preset(name: str) -> NetworkConfig:
    return compose([f"network={name}"]).network


def setting(variable: str = "NCCL_X", value: str = "1", library: str = "both", versions: str = ">=0") -> dict:
    return {
        "variable": variable, "value": value, "library": library, "versions": versions,
        "reason": "a test", "source": "a test",
    }  # fmt: skip


def network(*settings: dict) -> NetworkConfig:
    return NetworkConfig.model_validate({"name": "test", "settings": settings})


@pytest.mark.parametrize("name", PRESETS)
def test_every_preset_composes_and_comes_back_equal(name: str, tmp_path: Path) -> None:
    config = compose([f"network={name}"])
    assert config.network.name == name
    (path := tmp_path / "config.yaml").write_text(dump(config))
    assert load(path) == config


def test_there_is_a_preset_for_each_fabric() -> None:
    assert {"efa", "infiniband", "none", "pollara", "roce"} <= set(PRESETS)
    assert [name for name in PRESETS if not preset(name).settings] == ["none"]


@pytest.mark.parametrize("name", PRESETS)
def test_every_setting_is_told_in_full(name: str) -> None:
    settings = preset(name).settings
    for one in settings:
        assert re.fullmatch(r"[A-Z][A-Z0-9_]+", one.variable) and one.value
        assert one.source and re.fullmatch(r"\S.{20,250}\.", one.reason), one.variable
        assert not (one.library == "ofi" and one.versions != ">=0"), "nobody knows the plug-in's version"
        assert one.variable not in SITE and (one.variable, one.value) not in HIDING
    assert len({one.variable for one in settings}) == len(settings)


def test_the_users_environment_wins() -> None:
    applied = environment(
        preset("roce"), "cuda", (2, 27, 5), {"NCCL_IB_QPS_PER_CONNECTION": "8", "PATH": "/bin"}
    )
    assert applied.kept == {"NCCL_IB_QPS_PER_CONNECTION": "8"}
    assert "NCCL_IB_QPS_PER_CONNECTION" not in applied.set
    assert applied.set["NCCL_NET"] == "IB"


def test_an_empty_value_is_the_users_too() -> None:
    assert environment(network(setting()), "cuda", None, {"NCCL_X": ""}).kept == {"NCCL_X": ""}


@pytest.mark.parametrize(
    ("library", "kinds"),
    [("nccl", {"cuda"}), ("rccl", {"rocm"}), ("both", {"cuda", "rocm"}), ("ofi", {"cuda", "rocm"})],
)
def test_each_library_has_its_own(library: str, kinds: set[str]) -> None:
    settings = network(setting(library=library))
    assert {kind for kind in ("cpu", "cuda", "rocm") if environment(settings, kind, None, {}).set} == kinds


def test_the_reason_names_both_libraries() -> None:
    settings = network(setting("A", library="nccl"), setting("B", library="rccl"))
    assert environment(settings, "cuda", None, {}).skipped == {"B": "read by RCCL, and cuda has NCCL"}
    assert environment(settings, "rocm", None, {}).skipped == {"A": "read by NCCL, and rocm has RCCL"}


@pytest.mark.parametrize("name", PRESETS)
def test_nothing_applies_on_cpu(name: str) -> None:
    applied = environment(preset(name), "cpu", (2, 27, 5), {"NCCL_NET": "Socket"})
    assert not applied.set and not applied.kept
    assert set(applied.skipped) == {one.variable for one in preset(name).settings}


@pytest.mark.parametrize("kind", ["cpu", "cuda", "rocm"])
@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("version", [None, (2, 18, 3), (2, 22, 3), (2, 27, 5)])
def test_each_variable_is_in_one_place(name: str, kind: Kind, version: Version | None) -> None:
    applied = environment(preset(name), kind, version, {"NCCL_NET": "Socket"})
    places = [set(applied.set), set(applied.kept), set(applied.skipped)]
    assert not any(one & other for one, other in [*pairwise(places), (places[0], places[2])])
    assert set.union(*places) == {one.variable for one in preset(name).settings}


def test_pollara_is_for_rccl_and_efa_for_nccl() -> None:
    assert not environment(preset("pollara"), "cuda", (2, 27, 5), {}).set
    assert environment(preset("pollara"), "rocm", (2, 27, 7), {}).set["NCCL_NET_PLUGIN"] == "librccl-anp.so"
    assert environment(preset("efa"), "cuda", (2, 27, 5), {}).set["NCCL_NET"] == "AWS Libfabric"


def test_a_version_gate_opens_and_closes() -> None:
    def value(version: tuple[int, ...]) -> str | None:
        return environment(preset("roce"), "cuda", version, {}).set.get("NCCL_IB_SPLIT_DATA_ON_QPS")

    assert [value(version) for version in [(2, 17, 1), (2, 18), (2, 19, 4), (2, 20, 0)]] == [
        None,
        "0",
        "0",
        None,
    ]


def test_a_version_outside_is_told() -> None:
    skipped = environment(preset("roce"), "rocm", (2, 20, 5), {}).skipped
    assert skipped["NCCL_IB_ROCE_VERSION_NUM"] == "needs RCCL >=2.21, and this is 2.20.5"


def test_an_unknown_version_takes_only_what_is_for_all() -> None:
    settings = network(setting("A"), setting("B", versions=">=2.10"), setting("C", versions="<9"))
    applied = environment(settings, "cuda", None, {})
    assert applied.set == {"A": "1"}
    assert applied.skipped["B"] == "needs NCCL >=2.10, and its version is unknown"
    assert "C" in applied.skipped


def test_the_version_of_nccl_says_nothing_of_the_plug_in() -> None:
    applied = environment(network(setting(library="ofi", versions=">=1.7")), "cuda", (2, 27, 5), {})
    assert applied.skipped == {"NCCL_X": "needs the libfabric plug-in >=1.7, and its version is unknown"}


def test_one_variable_may_differ_by_library_and_version() -> None:
    settings = network(
        setting(value="old", library="nccl", versions="<2.20"),
        setting(value="new", library="nccl", versions=">=2.20"),
        setting(value="amd", library="rccl"),
    )
    assert environment(settings, "cuda", (2, 19), {}).set == {"NCCL_X": "old"}
    assert environment(settings, "cuda", (2, 27), {}).set == {"NCCL_X": "new"}
    assert environment(settings, "rocm", (2, 27), {}).set == {"NCCL_X": "amd"}
    assert not environment(settings, "cuda", (2, 27), {}).skipped


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        (">=2.18", [(2, 18), (2, 18, 0), (2, 100), (3,)], [(2, 9, 9), (2, 17, 1), (2,)]),
        (">=2.12,<2.28", [(2, 12, 0), (2, 27, 9)], [(2, 28), (2, 28, 0), (2, 3)]),
        (">=2.27,!=2.28.3", [(2, 27), (2, 28, 4)], [(2, 28, 3)]),
    ],
)
def test_versions_compare_by_number(text: str, inside: list[Version], outside: list[Version]) -> None:
    settings = network(setting(versions=text))
    assert all(environment(settings, "cuda", version, {}).set for version in inside)
    assert not any(environment(settings, "cuda", version, {}).set for version in outside)


@pytest.mark.parametrize("text", ["2.18", "", ",", ">=", ">=2.x", ">=2.18 <3", ">=2..1", ">=²"])
def test_a_malformed_range_is_refused(text: str) -> None:
    with pytest.raises(ValidationError) as error:
        LibrarySetting.model_validate(setting(versions=text))
    assert f"versions of NCCL_X: '{text}' is not a range of versions" in str(error.value)


def test_a_malformed_range_in_a_file_is_told_in_one_line(tmp_path: Path) -> None:
    (path := tmp_path / "mine.yaml").write_text(
        yaml.safe_dump({"network": {"settings": [setting(versions="2.18")]}})
    )
    with pytest.raises(UserError) as error:
        compose([], path)
    assert str(error.value) == (
        "network.settings: versions of NCCL_X: '2.18' is not a range of versions; "
        "type e.g. '>=2.18' or '>=2.12,<2.28'"
    )
