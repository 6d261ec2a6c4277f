"""Defects of a node's agent: ends of processes, interpreters that wait, and what ranks are given."""

from __future__ import annotations

from tests.mutants.listed import Mutant

_ENVIRONMENT = "orchestrator/agent/environment.py"
_SPAWNER = "orchestrator/agent/spawner.py"
_STANDBY = "orchestrator/agent/standby.py"
_STANDBYS = "orchestrator/agent/standbys.py"
_PROC = "faulttol/proc.py"

_OF_ENDS = "tests/orchestrator/agent/test_spawner.py::test_"
_OF_STANDBYS = "tests/orchestrator/agent/test_standbys.py::test_"
_OF_BYTECODE = "tests/orchestrator/agent/test_environment.py::test_"

MUTANTS = [
    Mutant(
        "the kernel's word for an end counts as an exit code",
        _PROC,
        "os.waitstatus_to_exitcode(int(stat[1][49]))",
        "int(stat[1][49])",
        f"{_OF_ENDS}the_kernel_says_how_a_process_that_nobody_has_waited_for_ends[import sys; sys.exit(3)-0-3]",
    ),
    Mutant(
        "an end is reported twice",
        _SPAWNER,
        "                if not one.reported:\n",
        "                if True:\n",
        f"{_OF_ENDS}a_failure_is_told_while_the_process_still_gives_up_its_memory",
    ),
    Mutant(
        "interpreters of an idle node keep the node's own code",
        _STANDBY,
        "        del sys.modules[name]\n",
        "        pass\n",
        f"{_OF_STANDBYS}libraries_alone_serve_the_first_gang_of_whichever_run_comes",
    ),
    Mutant(
        "libraries wait beside a gang that starts",
        _STANDBYS,
        "if not (self._needs or self._starting) else None",
        "if not self._needs else None",
        f"{_OF_STANDBYS}libraries_give_way_to_a_gang_and_come_back_after_it",
    ),
    Mutant(
        "libraries that were imported under another environment are taken",
        _STANDBYS,
        "and _early(self.env) == _early(other.env)",
        "",
        f"{_OF_STANDBYS}libraries_alone_serve_the_first_gang_of_whichever_run_comes",
    ),
    Mutant(
        "others' folders give compiled modules",
        _ENVIRONMENT,
        " and not folder.lstat().st_mode & 0o022",
        "",
        f"{_OF_BYTECODE}a_folder_that_others_can_write_to_gives_no_modules",
    ),
]
