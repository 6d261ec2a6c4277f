"""Defects of the control plane: its turns, its log, and what it decides."""

from __future__ import annotations

from tests.mutants.listed import Mutant

_CONTROLLER = "orchestrator/control/controller.py"
_LOG = "orchestrator/record/log.py"
_EPOCHS = "orchestrator/control/epochs.py"
_TURN = "orchestrator/control/turn.py"
_RUN_CONTROL = "orchestrator/control/run_controller.py"
_BACKOFF = "orchestrator/decide/backoff.py"
_QUEUEING = "orchestrator/control/scheduler.py"
_RECOVERY = "orchestrator/decide/recovery.py"
_QUEUE = "orchestrator/decide/queue.py"
_PREEMPT = "orchestrator/decide/preempt.py"
_NODES = "orchestrator/decide/nodes.py"
_CLUSTER_LOG = "orchestrator/record/cluster_log.py"
_PLACEMENT = "orchestrator/decide/placement.py"
_PROGRESS = "orchestrator/control/progress.py"
_NODES_CONTROL = "orchestrator/control/node_controller.py"
_PUBLISH = "orchestrator/control/publish.py"
_HOLDINGS = "orchestrator/decide/foreign_usage.py"
_JOBS = "orchestrator/ray_jobs.py"

_OF_TURNS = "tests/orchestrator/control/test_turns.py::test_"
_OF_LOG = "tests/orchestrator/record/test_log.py::test_"
_OF_EPOCHS = "tests/orchestrator/control/test_epochs.py::test_"
_OF_FAULTS = "tests/orchestrator/control/test_faults.py::test_"
_OF_BACKOFF = "tests/orchestrator/decide/test_backoff.py::test_"
_OF_RECOVERY = "tests/orchestrator/decide/test_recovery.py::test_"
_OF_CONTROLLER = "tests/orchestrator/control/test_controller.py::test_"
_OF_QUEUE = "tests/orchestrator/decide/test_queue.py::test_"
_OF_PREEMPT = "tests/orchestrator/decide/test_preempt.py::test_"
_OF_NODES = "tests/orchestrator/decide/test_nodes.py::test_"
_OF_PLACEMENT = "tests/orchestrator/decide/test_placement.py::test_"
_OF_QUEUEING = "tests/orchestrator/control/test_scheduler.py::test_"
_OF_PROGRESS = "tests/orchestrator/control/test_progress.py::test_"
_OF_HOLDINGS = "tests/orchestrator/decide/test_foreign_usage.py::test_"
_OF_JOBS = "tests/orchestrator/test_ray_jobs.py::test_"

MUTANTS = [
    Mutant(
        "published before the queue has decided",
        _CONTROLLER,
        "self._nodes, self._runs, self._scheduler.held, self._parked(), self._damages(), now",
        "self._nodes, self._runs, [], self._parked(), self._damages(), now",
        f"{_OF_TURNS}a_run_that_is_being_placed_is_not_counted_on_to_make_room",
    ),
    Mutant(
        "old epochs count",
        _LOG,
        "if written < epoch:",
        "if False:",
        f"{_OF_LOG}what_a_replaced_writer_still_writes_does_not_count",
    ),
    Mutant(
        "a gone own epoch isn't noticed",
        _EPOCHS,
        "or not (self.folder / _name(self.number)).exists()",
        "or False",
        f"{_OF_EPOCHS}controllers_that_begin_at_once_get_numbers_of_their_own",
    ),
    Mutant(
        "the fence isn't asked",
        _LOG,
        "        self._fence()\n",
        "",
        f"{_OF_LOG}the_fence_is_asked_before_each_record",
    ),
    Mutant(
        "stacks aren't waited for",
        _TURN,
        "waited < _INSPECT_SECONDS",
        "waited < 0",
        f"{_OF_FAULTS}a_hang_keeps_the_stacks_before_anything_is_killed",
    ),
    Mutant(
        "a restart doesn't wait",
        _RUN_CONTROL,
        "draft.clock >= draft.view.retry_clock",
        "draft.clock >= 0",
        f"{_OF_TURNS}restarts_without_progress_wait_twice_as_long_each_time",
    ),
    Mutant(
        "back-off doubles at once",
        _BACKOFF,
        "failures - 1",
        "failures",
        f"{_OF_BACKOFF}a_wait_doubles_up_to_its_cap_however_often_it_failed",
    ),
    Mutant(
        "ungranted slots are asked for at once",
        _QUEUEING,
        "return control.clock(now) - view.waiting_clock < wait",
        "return control.clock(now) - view.waiting_clock < 0",
        f"{_OF_FAULTS}slots_that_ray_does_not_grant_are_asked_for_less_and_less_and_elsewhere",
    ),
    Mutant(
        "a node that broke the run twice isn't evicted",
        _RECOVERY,
        "(cause.kind in NODE_FAULTS or _broke_before(view, cause.node, clock))",
        "cause.kind in NODE_FAULTS",
        f"{_OF_RECOVERY}a_node_that_broke_the_run_before_is_evicted_whatever_it_was",
    ),
    Mutant(
        "a node is avoided after three faults only",
        _RECOVERY,
        "faults.count(node) > 1",
        "faults.count(node) > 2",
        f"{_OF_RECOVERY}nodes_are_avoided_that_were_lost_once_or_broke_the_run_twice",
    ),
    Mutant(
        "a stop isn't given its grace",
        _TURN,
        "DesiredState.STOPPED, stop.grace + _ACKNOWLEDGE_SECONDS",
        "DesiredState.STOPPED, _ACKNOWLEDGE_SECONDS",
        f"{_OF_TURNS}ranks_that_save_for_long_have_all_of_their_grace",
    ),
    Mutant(
        "a stop that isn't answered is waited for forever",
        _TURN,
        "if not self.status.stopped and not self._overdue(\n",
        "if not self.status.stopped or not self.status.stopped and not self._overdue(\n",
        f"{_OF_TURNS}a_stop_that_nobody_acknowledges_is_left_to_ray_in_the_end",
    ),
    Mutant(
        "a release that isn't answered is waited for forever",
        _TURN,
        "            and not self._overdue(DesiredState.RELEASED, _ACKNOWLEDGE_SECONDS)\n",
        "",
        f"{_OF_TURNS}a_stop_that_nobody_acknowledges_is_left_to_ray_in_the_end",
    ),
    Mutant(
        "a cancel in a hurry is let pass",
        _RUN_CONTROL,
        "stop.grace <= grace",
        "stop.grace >= grace",
        f"{_OF_CONTROLLER}two_cancels_at_once_and_one_that_is_in_a_hurry",
    ),
    Mutant(
        "no back-fill",
        _QUEUE,
        "if run.waited < patience:",
        "if False:",
        f"{_OF_QUEUE}a_higher_priority_overtakes",
    ),
    Mutant(
        "slots aren't kept",
        _QUEUE,
        "self._available[index] = max(0, self._free[index] - count)",
        "pass",
        f"{_OF_QUEUE}small_runs_pass_a_blocked_gang_until_its_patience_ends",
    ),
    Mutant(
        "a quota counts one run too few",
        _QUEUE,
        "if used + gang.ranks > quota:",
        "if used > quota:",
        f"{_OF_QUEUE}an_owner_gets_no_more_than_the_quota_and_blocks_nobody",
    ),
    Mutant(
        "the quota of everybody counts for nobody",
        _QUEUE,
        "self._quotas.get(run.owner, self._quotas.get(DEFAULT_OWNER))",
        "self._quotas.get(run.owner)",
        f"{_OF_QUEUE}what_runs_counts_against_the_quota_and_everybody_has_that_of_the_star",
    ),
    Mutant(
        "what starts in one decision isn't counted",
        _QUEUE,
        "            used.add(run.owner, gang.ranks)\n",
        "",
        f"{_OF_QUEUE}an_owner_gets_no_more_than_the_quota_and_blocks_nobody",
    ),
    Mutant(
        "equals are preempted",
        _QUEUE,
        "if h.priority < run.priority",
        "if h.priority <= run.priority",
        f"{_OF_QUEUE}a_big_gang_starts_in_bounded_time_behind_an_endless_stream[gang0-0]",
    ),
    Mutant(
        "more are stopped than needed",
        _PREEMPT,
        "            chosen.remove(holder)\n",
        "            pass\n",
        f"{_OF_PREEMPT}the_victims_are_enough_none_is_too_many_and_their_priority_is_the_lowest_that_does",
    ),
    Mutant(
        "a run that starts its ranks may be stopped",
        _QUEUEING,
        "    trains = view.state in (State.STARTING, State.RUNNING)\n",
        "    trains = True\n",
        f"{_OF_TURNS}a_run_that_is_being_placed_is_not_counted_on_to_make_room",
    ),
    Mutant(
        "a cordon bars nothing",
        _NODES,
        '        barred = f"cordoned: {record.cordon.reason}"',
        "        pass",
        f"{_OF_NODES}several_ray_nodes_at_one_address_are_one_node",
    ),
    Mutant(
        "cordons without a bound",
        _NODES,
        "or self._left <= 0:",
        "or False:",
        f"{_OF_NODES}the_controller_cordons_a_bounded_share_by_itself[5-1]",
    ),
    Mutant(
        "a cordon makes nobody count down",
        _NODES,
        "        self._left -= 1\n",
        "",
        f"{_OF_NODES}a_finding_that_says_so_cordons_its_hosts_once",
    ),
    Mutant(
        "a drain is said again",
        _NODES,
        "if on and not run.stopping:",
        "if on:",
        f"{_OF_NODES}runs_on_a_draining_node_are_told_why_they_move",
    ),
    Mutant(
        "quarantine lasts over a new start",
        _NODES,
        "            and record.joined <= fault.clock\n",
        "",
        f"{_OF_NODES}a_silent_node_is_out_until_ray_has_noticed_or_it_has_joined_anew",
    ),
    Mutant(
        "uncordon leaves the past",
        _CLUSTER_LOG,
        "cordon=None, drain=None, faults=(), left=()",
        "cordon=None, drain=None",
        f"{_OF_NODES}a_node_that_comes_and_goes_is_cordoned",
    ),
    Mutant(
        "spares are for everybody",
        _PLACEMENT,
        "(node.spare and not recovering)",
        "False",
        f"{_OF_PLACEMENT}a_barred_node_is_never_used_and_a_spare_only_by_a_run_that_recovers",
    ),
    Mutant(
        "damage isn't named",
        _LOG,
        '            damage.append(f"{path} at',
        '            str(f"{path} at',
        f"{_OF_LOG}a_damaged_line_is_named_and_stepped_over[]",
    ),
    Mutant(
        "a checksum isn't looked at",
        _LOG,
        "    if sealed and tail",
        "    if False and tail",
        f"{_OF_LOG}a_record_with_a_flipped_bit_is_never_believed[1]",
    ),
    Mutant(
        "a damaged seal makes an old record",
        _LOG,
        '    if not sealed and "events" in record',
        '    if False and "events" in record',
        f"{_OF_LOG}a_record_with_a_flipped_bit_is_never_believed[1]",
    ),
    Mutant(
        "a full disk leaves a part",
        _LOG,
        "            os.ftruncate(self._fd, self._end)\n            raise",
        "            raise",
        f"{_OF_LOG}a_full_disk_leaves_nothing[write]",
    ),
    Mutant(
        "a defect of a run ends the turn",
        _CONTROLLER,
        "        except Exception as error:  # one run's defect or file must not stop the others",
        "        except OSError as error:",
        f"{_OF_QUEUEING}a_queued_run_whose_configuration_is_broken_keeps_no_other_waiting",
    ),
    Mutant(
        "a defect of a part ends the turn",
        _CONTROLLER,
        "        except Exception as error:  # the next turn tries again",
        "        except OSError as error:",
        f"{_OF_TURNS}a_part_of_the_turn_that_raises_stops_no_other[error1]",
    ),
    Mutant(
        "a parked run is tried in each turn",
        _CONTROLLER,
        "        if now.mono < self._retry_at(run_id):\n            return\n",
        "",
        f"{_OF_FAULTS}the_waits_of_a_parked_run_double_and_its_log_holds_the_error_once",
    ),
    Mutant(
        "a run that can't be opened stops the controller",
        _CONTROLLER,
        "            except Exception as error:  # a file of this run alone",
        "            except UserError as error:",
        f"{_OF_FAULTS}a_log_that_can_not_be_opened_is_tried_again",
    ),
    Mutant(
        "a save is told twice",
        _PROGRESS,
        "return (line.attempt, line.step) > (known.attempt, known.step)",
        "return (line.attempt, line.step) >= (known.attempt, known.step)",
        f"{_OF_PROGRESS}a_commit_in_storage_is_told_once",
    ),
    Mutant(
        "a finding is told twice",
        _PROGRESS,
        "([] if finding in view.findings else [finding])",
        "[finding]",
        f"{_OF_PROGRESS}a_finding_is_told_once_and_by_attempt",
    ),
    Mutant(
        "an end is told twice",
        _PROGRESS,
        "case EndedLine() if view.finished is None:",
        "case EndedLine():",
        f"{_OF_PROGRESS}the_end_is_told_once",
    ),
    Mutant(
        "lines are read again",
        _PROGRESS,
        "lines_offset=max(self.lines_offset, *(report.offset for report in reports))",
        "lines_offset=max(report.offset for report in reports)",
        f"{_OF_PROGRESS}the_newest_report_of_a_rank_holds_and_the_others_stay",
    ),
    Mutant(
        "again on a cordoned node",
        _TURN,
        "any(share.ip in self.barred for share in view.placed.shares)",
        "False",
        f"{_OF_TURNS}a_fault_on_a_cordoned_node_moves_the_run",
    ),
    Mutant(
        "again in a smaller layout",
        _TURN,
        "if view.smaller or any(",
        "if any(",
        f"{_OF_TURNS}a_fault_in_a_smaller_layout_looks_for_the_whole_of_it",
    ),
    Mutant(
        "again though it has to wait",
        _TURN,
        "decided.wait_seconds > 0 or ",
        "",
        f"{_OF_TURNS}a_second_restart_without_progress_waits_though_its_nodes_are_sound",
    ),
    Mutant(
        "time of earlier attempts isn't counted",
        _TURN,
        "ran = view.ran_seconds + self.clock - view.attempt_clock",
        "ran = self.clock - view.attempt_clock",
        f"{_OF_TURNS}the_limit_of_a_runs_time_counts_all_of_its_attempts",
    ),
    Mutant(
        "stale nodes stay",
        _NODES_CONTROL,
        "                self.nodes = []\n",
        "                pass\n",
        "tests/orchestrator/control/test_nodes.py::test_nodes_that_ray_does_not_tell_of_for_long_get_no_work",
    ),
    Mutant(
        "queue.json has no beat",
        _PUBLISH,
        "if text == self._text and now.mono - self._written < _BEAT:",
        "if text == self._text:",
        f"{_OF_TURNS}the_published_view_beats_though_nothing_changes",
    ),
    Mutant(
        "smaller looks begin anew at each change",
        _QUEUEING,
        "(search.done and not search.matches(*question))",
        "not search.matches(*question)",
        f"{_OF_QUEUEING}a_search_for_a_smaller_layout_is_finished_though_slots_come_and_go",
    ),
    Mutant(
        "others' slots count as free",
        _HOLDINGS,
        "    return {resource: max(one[resource] for one in free) for resource in node.slots}",
        "    return {resource: min(one[resource] for one in free) for resource in node.slots}",
        f"{_OF_HOLDINGS}a_slot_is_anothers_where_each_of_the_newest_looks_says_so",
    ),
    Mutant(
        "own groups are others'",
        _CONTROLLER,
        "{attempt.group for attempt in placed if attempt is not None}",
        "set()",
        f"{_OF_QUEUEING}what_a_run_of_this_home_holds_is_counted_once",
    ),
    Mutant(
        "the same person's word twice is a mistake",
        _NODES,
        "(there.reason, there.by) != said",
        "True",
        f"{_OF_NODES}marks_are_acted_on_and_taken_back",
    ),
    Mutant(
        "missed lines aren't caught up before an incident",
        _TURN,
        "        if fatal:\n            self._catch_up()\n",
        "",
        f"{_OF_TURNS}an_incident_knows_the_steps_that_no_agent_has_reported",
    ),
    Mutant(
        "a complete run that was stopped queues again",
        _TURN,
        "if to is State.QUEUED and complete:",
        "if False:",
        f"{_OF_TURNS}a_run_that_completes_while_it_is_made_to_stop_has_succeeded",
    ),
    # A command that is carried to a dashboard.
    Mutant(
        "what git ignores travels",
        _JOBS,
        ', *(f"/{_literal(path)}" for path in self._ignored_paths())]',
        "]",
        f"{_OF_JOBS}what_git_ignores_by_any_list_stays_at_home",
    ),
    Mutant(
        "a name with a star leaves out others",
        _JOBS,
        'return re.sub(r"([\\\\*?\\[\\] ])", r"\\\\\\1", path)',
        "return path",
        f"{_OF_JOBS}what_git_ignores_by_any_list_stays_at_home",
    ),
    Mutant(
        "code that is too large is no dashboard",
        _JOBS,
        '_TOO_LARGE = ("status code 413", ',
        '_TOO_LARGE = ("status code 414", ',
        f"{_OF_JOBS}code_that_is_too_large_is_named_with_its_largest_folders",
    ),
    Mutant(
        "a failed command ends well",
        _JOBS,
        "driver_exit_code or 1",
        "driver_exit_code or 0",
        f"{_OF_JOBS}a_command_that_fails_there_fails_here_with_its_code",
    ),
    Mutant(
        "a dashboard is given up at once",
        _JOBS,
        "if time.monotonic() - answered < _SILENCE_SECONDS:",
        "if False:",
        f"{_OF_JOBS}a_dashboard_that_stops_answering_is_waited_for_and_then_said_in_one_line",
    ),
    Mutant(
        "a full disk is a dashboard that is silent",
        _JOBS,
        "if isinstance(error, OSError) and error.errno in DISK_ERRORS:",
        "if False:",
        f"{_OF_JOBS}a_disk_that_is_full_here_is_no_dashboard_that_is_silent",
    ),
]
