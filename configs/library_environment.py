"""Which environment variables of a network preset a rank sets for NCCL or RCCL, and which not, with the reason.

The process's environment wins over a preset. A preset wins over NCCL's configuration files (`/etc/nccl.conf`,
`~/.nccl.conf`, `NCCL_CONF_FILE`), which yield to every variable that is set when the library starts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

from packaging.specifiers import SpecifierSet

from configs.fabric import LibrarySetting, NetworkConfig

Version = tuple[int, ...]

Kind = Literal["cpu", "cuda", "rocm"]

_LIBRARY: dict[Kind, str] = {"cuda": "nccl", "rocm": "rccl"}
_NAMES = {"nccl": "NCCL", "rccl": "RCCL", "ofi": "the libfabric plug-in"}


@dataclass(frozen=True)
class Applied:
    """What becomes of a preset's variables; each is in one of the three."""

    set: dict[str, str] = field(default_factory=dict)
    """Variable -> value, to be set before the first communicator is made."""
    kept: dict[str, str] = field(default_factory=dict)
    """Variable -> value that the environment has already, and that stays."""
    skipped: dict[str, str] = field(default_factory=dict)
    """Variable -> why it doesn't apply here."""


def environment(
    network: NetworkConfig, kind: Kind, version: Version | None, present: Mapping[str, str]
) -> Applied:
    """The variables of `network` on devices of `kind`.

    `version` is that of NCCL, or of the NCCL interface that RCCL names, as (2, 27, 5); None where it is unknown,
    and then only settings for every version apply. `present` is the environment as the rank finds it. Of several
    settings of one variable the last that applies counts.
    """
    applied = Applied()
    for setting in network.settings:
        if reason := _obstacle(setting, kind, version):
            applied.skipped[setting.variable] = reason
        elif setting.variable in present:
            applied.kept[setting.variable] = present[setting.variable]
        else:
            applied.set[setting.variable] = setting.value
    for variable in applied.set | applied.kept:  # another setting of it applies
        applied.skipped.pop(variable, None)
    return applied


def _obstacle(setting: LibrarySetting, kind: Kind, version: Version | None) -> str | None:
    """Why the setting doesn't apply, or None where it does."""
    if kind == "cpu":
        return "no GPU library is in use on cpu"
    reader = _LIBRARY[kind] if setting.library == "both" else setting.library
    if reader not in (_LIBRARY[kind], "ofi"):
        return f"read by {_NAMES[reader]}, and {kind} has {_NAMES[_LIBRARY[kind]]}"
    if setting.versions == ">=0":
        return None
    if version is None or reader == "ofi":  # the plug-in doesn't tell its version to Python
        return f"needs {_NAMES[reader]} {setting.versions}, and its version is unknown"
    here = ".".join(map(str, version))
    if here not in SpecifierSet(setting.versions):
        return f"needs {_NAMES[reader]} {setting.versions}, and this is {here}"
    return None
