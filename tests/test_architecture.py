"""Imports go one way, each heavy library has one home, and quick commands load none of them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePath

import pytest

from tests.source_tree import ROOMS, ROOT, Import, Module, modules, write_tree

pytestmark = pytest.mark.unit

HOMES = {
    "ray": ("orchestrator/ray_*.py",),
    "wandb": ("orchestrator/sinks/wandb.py",),
    "deepspeed": ("trainer/engines/deepspeed.py", "faulttol/bench/deepspeed_baseline.py"),
}
"""Library -> the files that may import it."""
HEAVY = ("torch", "ray", "deepspeed", "wandb")
QUICK = ("orchestrator.__main__", "orchestrator.cli")
"""What `--help`, `plan`, `list` and `status` start from."""
GATE = "orchestrator.commands.cluster_commands"
"""The module behind which the commands that need a cluster load Ray; nothing quick goes through it."""
SPEAKERS = (
    "collectives/cli.py", "faulttol/cli.py", "trainer/cli.py", "trainer/loop.py", "orchestrator/cli.py",
    "orchestrator/commands/calls.py", "orchestrator/commands/console.py", "orchestrator/commands/cluster_commands.py",
    "*/__main__.py", "**/bench_*.py",
)  # fmt: skip
"""Files that may print: the command line, and the ranks' programs, whose output is their log file."""


def wrong_way(tree: Sequence[Module]) -> Iterator[str]:
    """Imports of a room by one that stands before it."""
    for module in tree:
        for found in module.imports:
            if found.top in ROOMS and ROOMS.index(found.top) > ROOMS.index(module.room):
                yield f"{module.path}:{found.line}: {module.room} imports {found.top}; it goes the other way"


def out_of_home(tree: Sequence[Module]) -> Iterator[str]:
    """Imports of a library outside the files that it belongs to."""
    for module in tree:
        for found in module.imports:
            homes = HOMES.get(found.top)
            if homes and not any(PurePath(module.path).match(home) for home in homes):
                yield f"{module.path}:{found.line}: {found.top} is imported only in {', '.join(homes)}"


def loads(found: Import, names: set[str]) -> Iterator[str]:
    """The project's modules that an import runs: the target and the packages around it."""
    parts = found.target.split(".")
    for length in range(1, len(parts) + 1):
        if (name := ".".join(parts[:length])) in names:
            yield name


def cycles(tree: Sequence[Module]) -> Iterator[str]:
    """Rings of imports. An import inside a function counts: it would only hide the ring."""
    names = {module.name for module in tree}
    packages = {module.name for module in tree if module.path.name == "__init__.py"}
    graph = {
        module.name: sorted(
            {name for found in module.imports for name in loads(found, names)} - packages - {module.name}
        )
        for module in tree
    }
    done: set[str] = set()
    for start in graph:
        yield from _rings(graph, start, [], done)


def _rings(graph: dict[str, list[str]], name: str, path: list[str], done: set[str]) -> Iterator[str]:
    if name in path:
        yield " -> ".join([*path[path.index(name) :], name])
    elif name not in done:
        for after in graph.get(name, ()):
            yield from _rings(graph, after, [*path, name], done)
        done.add(name)


def heavy_reach(tree: Sequence[Module]) -> Iterator[str]:
    """Chains of imports, late ones too, from a quick command to a heavy library, not through the gate."""
    by_name = {module.name: module for module in tree}
    came_from: dict[str, str] = {name: "" for name in QUICK if name in by_name}
    waiting = list(came_from)
    while waiting:
        name = waiting.pop()
        for found in by_name[name].imports:
            if found.top in HEAVY:
                yield f"{by_name[name].path}:{found.line}: {_chain(came_from, name)} -> {found.top}"
            for after in loads(found, set(by_name)):
                if after != GATE and after not in came_from:
                    came_from[after] = name
                    waiting.append(after)


def _chain(came_from: dict[str, str], name: str) -> str:
    return f"{_chain(came_from, came_from[name])} -> {name}" if came_from[name] else name


def prints(tree: Sequence[Module]) -> Iterator[str]:
    """Calls of `print` outside the files that speak to a person."""
    for module in tree:
        if any(PurePath(module.path).match(pattern) for pattern in SPEAKERS):
            continue
        for node in ast.walk(module.tree):
            if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print":
                yield f"{module.at(node)}: print; return the text, log it, or make it an event"


def json_by_hand(tree: Sequence[Module]) -> Iterator[str]:
    """JSON read in another way than `configs.errors.from_json`: what is nested deeply would end the program."""
    for module in tree:
        for node in ast.walk(module.tree):
            by_hand = isinstance(node, ast.Attribute) and ast.unparse(node) in ("json.loads", "json.load")
            if by_hand and module.name != "configs.errors":
                yield f"{module.at(node)}: {ast.unparse(node)}; use configs.errors.from_json"


Rule = Callable[[Sequence[Module]], Iterator[str]]
RULES: list[Rule] = [wrong_way, out_of_home, cycles, heavy_reach, prints, json_by_hand]


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_project_keeps_the_rule(rule: Rule) -> None:
    assert not list(rule(modules()))


BAD = {
    "wrong_way": {
        "configs/a.py": "from trainer import loop\n",
        "faulttol/b.py": "def late():\n    import orchestrator.decide.queue\n",
    },
    "out_of_home": {
        "orchestrator/decide/queue.py": "import ray\n",
        "trainer/loop.py": "from deepspeed.utils import groups\n",
        "orchestrator/commands/console.py": "def late():\n    import wandb\n",
    },
    "cycles": {
        "configs/a.py": "from configs import b\n",
        "configs/b.py": "from configs.c import x\n",
        "configs/c.py": "x = 1\ndef late():\n    from .a import y\n",
    },
    "heavy_reach": {
        "orchestrator/__init__.py": "",
        "orchestrator/cli.py": "def late():\n    from orchestrator.commands import console\n",
        "orchestrator/commands/console.py": "import configs.shapes\n",
        "configs/__init__.py": "import torch\n",
        "configs/shapes.py": "",
    },
    "prints": {"orchestrator/decide/queue.py": "def f():\n    print('admitted')\n"},
    "json_by_hand": {
        "trainer/a.py": "import json\nx = json.loads('1')\nwith open('f') as file:\n    y = json.load(file)\n",
        "configs/errors.py": "import json\nx = json.loads('1')\n",
    },
}
FAULTS = {"wrong_way": 2, "out_of_home": 3, "cycles": 1, "heavy_reach": 1, "prints": 1, "json_by_hand": 2}


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_rule_finds_each_fault_of_a_bad_tree(rule: Rule, tmp_path: Path) -> None:
    found = list(rule(write_tree(tmp_path, BAD[rule.__name__])))
    assert len(found) == FAULTS[rule.__name__], found


def test_the_rules_let_a_good_tree_pass(tmp_path: Path) -> None:
    good = write_tree(
        tmp_path,
        {
            "configs/schema.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import ray\n",
            "trainer/engines/deepspeed.py": "import deepspeed\nimport torch\nfrom configs import schema\n",
            "orchestrator/ray_cluster.py": "import ray\n",
            "orchestrator/commands/cluster_commands.py": "from orchestrator import ray_cluster\nprint('up')\n",
            "orchestrator/cli.py": "def go():\n    from orchestrator.commands import cluster_commands\n    print(1)\n",
        },
    )
    assert not [complaint for rule in RULES for complaint in rule(good)]


def test_quick_commands_load_no_heavy_library(tmp_path: Path) -> None:
    """As the static rule has it, and through third parties too."""
    script = (
        "import contextlib, sys\n"
        "from orchestrator.cli import main\n"
        "for words in (['list'], ['plan', 'experiment=demo'], ['--help']):\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        assert main(words) == 0\n"
        f"found = set({HEAVY!r}) & set(sys.modules)\n"
        "assert not found, found\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env={"PATH": "", "MEGARAY_HOME": str(tmp_path / "a home")},
        capture_output=True, text=True, timeout=60, stdin=subprocess.DEVNULL,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
