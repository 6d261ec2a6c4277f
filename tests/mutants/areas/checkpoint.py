"""Defects of saving beside training and of what a run begins from."""

from __future__ import annotations

from tests.mutants.listed import Mutant

_LOOP = "trainer/loop.py"
_SAVES = "trainer/save_schedule.py"
_RESUME = "trainer/checkpoints.py"
_SAVER = "faulttol/staged/saver.py"
_BUFFERS = "faulttol/staged/buffers.py"
_WRITER = "faulttol/staged/writer.py"
_READING = "faulttol/checkpoint/reading.py"
_HANDOVER = "trainer/device_memory.py"
_SHARDS = "faulttol/checkpoint/shards.py"
_REPLICAS = "trainer/parallel/replicas.py"

_RUN = "tests/trainer/test_resume.py::test_"
_SAVED = "tests/faulttol/staged/test_saver.py::test_"
_BESIDE = f"{_SAVED}the_state_of_the_moment_is_committed"
_MEMORY = f"{_RUN}the_newest_snapshot_in_memory_is_what_the_next_attempt_begins_with"
_FAILED = f"{_RUN}failed_saves_are_told_and_counted_and_training_goes_on"
_OTHER = f"{_RUN}a_run_begins_where_another_stands_and_only_reads_it"
_YOUNG = f"{_RUN}the_interval_follows_what_saves_cost_and_how_often_the_run_fails"
_PAGES = "tests/faulttol/staged/test_buffers.py::test_"
_NEXT = "tests/trainer/test_stopping.py::test_"
_SUMS = "tests/trainer/parallel/test_checksums.py::test_"
_DRIFT = "tests/trainer/parallel/test_replicas.py::test_"
_BUSY = f"{_SAVED}a_save_while_one_is_being_written"

MUTANTS = [
    Mutant(
        "training doesn't wait for the copy",
        _BUFFERS,
        "self._done.wait()",
        "pass",
        f"{_SAVED}training_waits_for_the_copy",
    ),
    Mutant(
        "a copy is taken twice",
        _SAVER,
        "if not job.copied:",
        "if True:",
        f"{_SAVED}what_was_copied_is_not_copied_again",
    ),
    Mutant(
        "a failed rank is left out of the count",
        _SAVER,
        'failed = [(rank, one["failed"]) for rank, one in enumerate(receipts) if "failed" in one]',
        "failed: list[Any] = []",
        f"{_SAVED}a_rank_that_cannot_write_is_named_and_the_next_save_commits",
    ),
    Mutant(
        "what a failed save wrote stays",
        _SAVER,
        "self._writer.request(discard, lambda _: None)",
        "pass",
        f"{_SAVED}a_rank_that_cannot_write_is_named_and_the_next_save_commits",
    ),
    Mutant(
        "a plan is known forever",
        _SAVER,
        "for plan in plans if plan not in self._known}",
        "for plan in plans if not self._known}",
        f"{_SAVED}a_changed_plan_is_checked_anew",
    ),
    Mutant(
        "a new writer isn't told the plans",
        _SAVER,
        "if self._known_by != self.writer_pid:",
        "if False:",
        f"{_SAVED}a_new_writer_is_told_all_plans",
    ),
    Mutant(
        "a busy save is never left out",
        _SAVER,
        'if self._policy.busy == "skip" and self._any_busy():',
        "if False:",
        f"{_BUSY}[skip]",
    ),
    Mutant(
        "a busy save is always left out",
        _SAVER,
        'if self._policy.busy == "skip" and self._any_busy():',
        "if self._any_busy():",
        f"{_BUSY}[wait]",
    ),
    Mutant(
        "a dead writer is asked again",
        _WRITER,
        "if self.pid is not None:",
        "if self._process is not None:",
        f"{_SAVED}a_writer_that_is_killed_fails_one_save",
    ),
    Mutant(
        "the writer outlives its rank",
        _WRITER,
        "die_with_parent(os.environ)",
        "pass",
        f"{_SAVED}a_writer_ends_with_its_rank",
    ),
    Mutant(
        "the index isn't put into the buffer",
        _WRITER,
        "view[layout.offsets[-1] : layout.size] = index[0]",
        "pass",
        f"{_SAVED}a_snapshot_is_a_whole_file",
    ),
    Mutant(
        "the header isn't put into the buffer",
        _WRITER,
        "view[: len(layout.header)] = layout.header",
        "pass",
        f"{_SAVED}a_snapshot_is_a_whole_file",
    ),
    Mutant(
        "the newest snapshot is overwritten",
        _BUFFERS,
        "if buffer is None or buffer is not self._newest",
        "if True or buffer is not self._newest",
        f"{_SAVED}the_newest_snapshot_stays_whole_while_the_next_is_made",
    ),
    Mutant(
        "values of a file aren't aligned",
        _SHARDS,
        "-(len(text) + 8) % ALIGNMENT",
        "-(len(text) + 8) % 8",
        f"{_SAVED}values_lie_at_pages",
    ),
    Mutant("a failed save isn't counted", _SAVES, "self.failed_in_a_row += 1", "pass", _FAILED),
    Mutant(
        "failures are counted over commits",
        _SAVES,
        "self._last, self.failed_in_a_row = outcome, 0",
        "self._last = outcome",
        _FAILED,
    ),
    Mutant(
        "the last save is tried once",
        _LOOP,
        "for wait in (*_SAVE_RETRY_SECONDS, None):",
        "for wait in (None,):",
        f"{_RUN}the_last_save_is_tried_again",
    ),
    Mutant(
        "a failed save ends the run",
        _LOOP,
        "if isinstance(error, UserError | SaveSuperseded):",
        "if error is not None:",
        _FAILED,
    ),
    Mutant(
        "the last save may fail",
        _LOOP,
        "                raise self.progress.save_error\n",
        "                return\n",
        f"{_RUN}the_last_save_must_succeed",
    ),
    Mutant(
        "the last save isn't waited for",
        _LOOP,
        """            with self.clock.phase("checkpoint"):
                self.checkpoints.finish()
""",
        """            with self.clock.phase("checkpoint"):
                pass
""",
        f"{_RUN}saves_are_told_when_they_are_durable",
    ),
    Mutant(
        "the optimizer doesn't wait for the copy",
        _LOOP,
        'if name == "optimizer":',
        "if False:",
        f"{_RUN}the_optimizer_waits_for_the_copy",
    ),
    Mutant(
        "saves are told as they begin",
        "trainer/metric_log.py",
        "outcome.held, outcome.tier",
        "outcome.seconds, outcome.tier",
        f"{_RUN}held_and_durable_are_two_things",
    ),
    Mutant(
        "the interval is always fixed", _SAVES, 'if self._config.interval == "fixed":', "if True:", _YOUNG
    ),
    Mutant(
        "failures don't shorten the interval",
        _SAVES,
        "self._attempt - 1, worst.hours",
        "0, worst.hours",
        _YOUNG,
    ),
    Mutant(
        "the interval begins at step 0",
        _SAVES,
        "self._next = step + self._config.every\n\n",
        "self._next = self._config.every\n\n",
        _YOUNG,
    ),
    Mutant("no snapshot is made", _SAVES, "if every is not None and step % every == 0", "if False", _MEMORY),
    Mutant(
        "memory is never read",
        _RESUME,
        "tiers = [*self._snapshots(self._snapshot_folder, stack), *tiers]",
        "pass",
        _MEMORY,
    ),
    Mutant(
        "memory is read forever",
        _RESUME,
        "return memory.reason_to_skip_memory(history)",
        "return None",
        f"{_RUN}memory_that_led_to_the_same_end_twice_is_passed_over",
    ),
    Mutant(
        "the end leaves memory behind", _RESUME, "memory.remove_run(self._snapshot_folder)", "pass", _MEMORY
    ),
    Mutant("lineage is forgotten", _RESUME, '"lineage": self._lineage,', '"lineage": [],', _OTHER),
    Mutant(
        "the step that resume names isn't heeded",
        _RESUME,
        "root, step = parse_checkpoint_path(self._config.resume)",
        "root, step = parse_checkpoint_path(self._config.resume)[0], None",
        f"{_RUN}one_step_of_another_run_is_where_a_run_begins",
    ),
    Mutant(
        "only the first pages are mapped",
        _BUFFERS,
        "range(0, size, _PIECE)",
        "range(0, 1, _PIECE)",
        f"{_PAGES}pages_are_there_before_the_driver_asks_for_them",
    ),
    Mutant(
        "memory that isn't there ends the process later",
        _BUFFERS,
        "    if errors - {errno.EINVAL}:\n",
        "    if False:\n",
        f"{_PAGES}memory_that_the_kernel_cannot_map_is_an_error_and_no_signal",
    ),
    Mutant(
        "each further digit of a step takes new memory",
        _SHARDS,
        "_DIGITS - len(str(self.step))",
        "_DIGITS",
        f"{_SAVED}the_file_of_a_later_step_fits_into_the_same_memory[False]",
    ),
    Mutant(
        "memory is prepared beside a save",
        _SAVER,
        " or self._count:\n",
        ":\n",
        f"{_SAVED}nothing_is_prepared_beside_a_save_that_has_begun",
    ),
    Mutant(
        "memory that spans are read into is too short for a longer one",
        _READING,
        "if memory is None or len(memory) < size:",
        "if memory is None:",
        "tests/faulttol/checkpoint/test_restore.py::test_spans_of_any_length_are_read_into_the_same_memory",
    ),
    Mutant(
        "an attempt takes what the last one had, and no more, for room",
        _HANDOVER,
        "free >= _PEAK_FACTOR * previous_peak + _RESERVE_BYTES:",
        "free >= previous_peak:",
        f"{_NEXT}an_attempt_goes_on_beside_the_last_one_where_there_is_room_for_both",
    ),
    Mutant(
        "an open gate is all that is looked at",
        _HANDOVER,
        "if ended_at is not None and (previous_peak is None or free >= previous_peak):",
        "if ended_at is not None:",
        f"{_NEXT}where_there_is_not_it_waits_for_the_end_of_the_last_one",
    ),
    Mutant(
        "another layout's memory counts",
        _HANDOVER,
        "if before.config.exists() or rank.paths.config.exists():",
        "if False:",
        f"{_NEXT}with_another_layout_room_says_nothing[1]",
    ),
    Mutant(
        "a context is made again at once",
        _HANDOVER,
        "    while not Path(gate).exists():\n        time.sleep(_POLL_SECONDS)\n",
        "",
        f"{_NEXT}a_context_that_finds_no_room_is_made_again_after_the_end_of_the_last_one",
    ),
    Mutant(
        "copies of moments aren't compared",
        _REPLICAS,
        "if part.replicas > 1 and part.tensor.numel()]",
        'if part.replicas > 1 and "/" not in part.name and part.tensor.numel()]',
        f"{_DRIFT}the_rank_with_a_flipped_bit_is_named[2]",
    ),
    Mutant(
        "a checksum doesn't see where a value lies",
        _REPLICAS,
        "(torch.cat(list(flats)).long() * weights)",
        "(torch.cat(list(flats)).long() * weights.clamp(max=1))",
        f"{_SUMS}bits_are_summed_and_not_numbers",
    ),
    Mutant(
        "half of the copies are a majority",
        _REPLICAS,
        "if 2 * len(most) > len(everybody):",
        "if 2 * len(most) >= len(everybody):",
        f"{_SUMS}a_strict_majority_names_the_others",
    ),
    Mutant(
        "groups of tp that sum apart are compared with each other",
        "trainer/engines/native.py",
        "exact = replicas if replicas > 2 else 0",
        "exact = 0",
        f"{_DRIFT}groups_that_sum_apart_may_differ_in_a_last_bit",
    ),
    Mutant(
        "all ranks say that a wrong copy is theirs",
        _REPLICAS,
        "raise error if mesh.rank in drift.suspects else exits.mark_as_peers(error)",
        "raise error",
        f"{_DRIFT}the_rank_with_a_flipped_bit_is_named[4]",
    ),
    Mutant(
        "copies are compared once the save is on its way",
        _LOOP,
        """            agree = self.config.checkpoint.compare == "none" or self._replicas_agree()
            pinned_step = None if agree else self.agreed_step
            self.checkpoints.stage(self.engine, progress.step, samples, progress.loss, tiers, pinned_step)
""",
        """            self.checkpoints.stage(self.engine, progress.step, samples, progress.loss, tiers)
            if self.config.checkpoint.compare != "none":
                self._replicas_agree()
""",
        f"{_DRIFT}a_save_of_copies_that_differ_ends_the_attempt_and_is_not_resumed_from",
    ),
    Mutant(
        "copies that differ end an attempt that was to be warned",
        _LOOP,
        'if self.config.checkpoint.compare != "warn":',
        'if self.config.checkpoint.compare != "stop":',
        f"{_DRIFT}a_warning_names_the_copies_and_the_run_goes_on",
    ),
    Mutant(
        "a host is accused without a majority",
        "faulttol/detect/death.py",
        "replace(_verdict(snapshot, rank, kind, text), rank=None, node=None) for",
        "_verdict(snapshot, rank, kind, text) for",
        "tests/faulttol/detect/test_death.py::test_"
        "copies_that_differ_name_no_node_where_nobody_knows_which_is_wrong",
    ),
    Mutant(
        "the host of a wrong copy is kept",
        "orchestrator/decide/recovery.py",
        """    VerdictKind.NODE_UNFIT,
    VerdictKind.REPLICAS_DIFFER,
""",
        """    VerdictKind.NODE_UNFIT,
""",
        "tests/orchestrator/control/test_turns.py::test_a_wrong_copy_of_the_state_evicts_its_host",
    ),
    Mutant(
        "the last step whose copies agreed is pushed out",
        "faulttol/checkpoint/save.py",
        'if facts.get("agreed") is not None:',
        "if False:",
        f"{_DRIFT}a_warning_names_the_copies_and_the_run_goes_on",
    ),
    Mutant(
        "a run pins again what a person has unpinned",
        "faulttol/checkpoint/retention.py",
        '    if any(name.endswith(f".unpinned-agreed-{step}") for name in store.names(folder_of(step))):',
        "    if False:",
        "tests/faulttol/checkpoint/test_retention.py::test_what_a_person_unpins_is_not_pinned_again_by_the_saves_that_follow",
    ),
    Mutant(
        "a step whose copies differ is taken for one that agreed",
        "trainer/loop.py",
        'if outcome.tier == "store" and not differs:',
        'if outcome.tier == "store":',
        f"{_DRIFT}a_warning_names_the_copies_and_the_run_goes_on",
    ),
]
