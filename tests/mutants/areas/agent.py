"""Defects of a node's agent: ends of processes, interpreters that wait, and what ranks are given."""

from __future__ import annotations

from tests.mutants.listed import Mutant

_ATTEMPT = "orchestrator/agent/attempt.py"
_DRIVER = "orchestrator/agent/driver.py"
_ENVIRONMENT = "orchestrator/agent/environment.py"
_SPAWNER = "orchestrator/agent/spawner.py"
_STANDBY = "orchestrator/agent/standby.py"
_STANDBYS = "orchestrator/agent/standby_pool.py"
_PROC = "faulttol/proc.py"

_OF_ENDS = "tests/orchestrator/agent/test_spawner.py::test_"
_OF_STANDBYS = "tests/orchestrator/agent/test_standby_pool.py::test_"
_OF_STOPS = "tests/orchestrator/agent/test_stops.py::test_"
_OF_SLOTS = "tests/orchestrator/agent/test_slots.py::test_"
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
        "an interpreter that still imports outlives its agent",
        _STANDBY,
        "    die_with_parent(os.environ)\n",
        "",
        f"{_OF_STANDBYS}one_ends_by_itself_where_its_agent_is_killed[imports]",
    ),
    Mutant(
        "an interpreter that is being started while its agent closes stays",
        _STANDBYS,
        "        if self._closed:  # meanwhile",
        "        if False:  # meanwhile",
        f"{_OF_STANDBYS}one_that_is_being_started_while_the_agent_closes_ends_too",
    ),
    Mutant(
        "libraries wait beside a gang that starts",
        _STANDBYS,
        "if not (self._demands or self._starting) else None",
        "if not self._demands else None",
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
    Mutant(
        "the ranks of the next attempt wait for nothing",
        _ATTEMPT,
        "                    own[GATE] = str(self._gate)\n",
        "                    pass\n",
        f"{_OF_STOPS}the_next_attempt_starts_while_the_kernel_takes_back_what_the_last_one_held",
    ),
    Mutant(
        "memory that the next attempt holds is the last one's fault",
        _ATTEMPT,
        "            one._has_successor = True",
        "            one._has_successor = False",
        f"{_OF_STOPS}the_next_attempt_starts_while_the_kernel_takes_back_what_the_last_one_held",
    ),
    Mutant(
        "what never ends is nobody's fault for the next attempt",
        _ATTEMPT,
        "                    self._report_unfit(stuck)\n",
        "                    pass\n",
        f"{_OF_STOPS}what_never_ends_is_the_fault_of_the_node_for_the_next_attempt_too",
    ),
    Mutant(
        "a run on cores waits for devices",
        _ATTEMPT,
        "        if ending and launch.uses_devices:\n",
        "        if ending:\n",
        f"{_OF_STOPS}a_run_on_cores_waits_for_no_device",
    ),
    Mutant(
        "a program that knows of no gate starts at once",
        _ATTEMPT,
        "                self._await_gate(self._gate)",
        "                pass",
        f"{_OF_STOPS}a_program_that_knows_of_no_gate_starts_once_the_last_one_is_gone",
    ),
    Mutant(
        "slots are let go while the kernel takes back what their ranks held",
        _DRIVER,
        "gang.desired is DesiredState.RELEASED and member.phase is AttemptPhase.STOPPED:",
        "gang.desired is DesiredState.RELEASED and member.phase is not AttemptPhase.STOPPING:",
        f"{_OF_SLOTS}the_next_attempt_need_not_wait_for_the_kernel_and_another_run_must",
    ),
    Mutant(
        "an interpreter that has opened the driver is taken for other devices",
        _STANDBYS,
        "_kept(env, PER_RANK))",
        "_kept(env, SETTABLE_AFTER_LIBRARIES))",
        f"{_OF_STANDBYS}one_is_taken_only_for_the_same_program_code_and_environment",
    ),
    Mutant(
        "a process that a debugger holds runs no more",
        _PROC,
        "    return any(stat is not None and not int(stat[1][6]) & _EXITING for stat in stats)",
        "    return any(stat is not None and int(stat[1][6]) & _EXITING for stat in stats)",
        f"{_OF_ENDS}a_process_that_a_debugger_holds_is_not_ending",
    ),
]
