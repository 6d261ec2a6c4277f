"""Defects of the dashboard's server, its ledger and its metrics."""

from __future__ import annotations

from tests.mutants.listed import Mutant

_LEDGER = "orchestrator/record/ledger.py"
_PARTITION = "orchestrator/record/partition.py"
_STORY = "orchestrator/record/history.py"
_SECURITY = "orchestrator/web/security.py"
_SERVER = "orchestrator/web/server.py"
_COLUMNS = "orchestrator/web/columns.py"
_ACTIONS = "orchestrator/web/actions.py"
_EXPORT = "orchestrator/web/export.py"
_REDACT = "orchestrator/web/redact.py"

_OF_LEDGER = "tests/web/test_ledger.py::test_"
_OF_API = "tests/web/test_api.py::test_"
_OF_SECURITY = "tests/web/test_security.py::test_"
_OF_ACTIONS = "tests/web/test_actions.py::test_"
_OF_RESILIENCE = "tests/web/test_resilience.py::test_"

MUTANTS = [
    Mutant(
        "an interval of the ledger begins before the one before it has ended",
        _PARTITION,
        "ends = np.maximum.accumulate(np.maximum(ends, self.end))",
        "ends = np.asarray(ends)",
        f"{_OF_LEDGER}a_tape_never_goes_back",
    ),
    Mutant(
        "what a save held is told as overhead",
        _LEDGER,
        "saving = np.minimum(_within(held[0], held[1], edges), spans)",
        "saving = np.zeros_like(spans)",
        f"{_OF_LEDGER}a_run_without_faults",
    ),
    Mutant(
        "steps that are trained again count twice as productive",
        _LEDGER,
        "if least is not None:\n            lost[number] = least",
        "if least is None:\n            lost[number] = 1 << 60",
        f"{_OF_LEDGER}a_fault_costs_detection_restart_and_what_was_trained_again",
    ),
    Mutant(
        "the clock of rank 0's host is taken for the controller's",
        _LEDGER,
        "self._skew = seen - dated",
        "self._skew = 0.0",
        f"{_OF_LEDGER}a_host_whose_clock_is_off_by_an_hour",
    ),
    Mutant(
        "a resumed run's start-up counts as a restart",
        _STORY,
        "if move.reason in (Reason.SUBMITTED, Reason.RESUME_ASKED):",
        "if move.reason in (Reason.SUBMITTED,):",
        f"{_OF_LEDGER}preemption_idle_time_and_a_resume",
    ),
    Mutant(
        "any host name is answered",
        _SECURITY,
        'if (name := _name(f"//{host}")) not in self.names:',
        'if not (name := _name(f"//{host}")):',
        f"{_OF_SECURITY}other_hosts_are_refused",
    ),
    Mutant(
        "an origin on another port is taken for the own one",
        _SECURITY,
        "split.netloc.lower() == host.lower()",
        "split.hostname in self.names",
        f"{_OF_SECURITY}other_origins_are_refused",
    ),
    Mutant(
        "the cookie holds the token",
        _SECURITY,
        'return hmac.new(token.encode(), b"megaray dashboard cookie", hashlib.sha256).hexdigest()',
        "return token",
        f"{_OF_SECURITY}the_link_becomes_a_cookie_that_is_no_token",
    ),
    Mutant(
        "a form of another page may act with the cookie",
        _SERVER,
        'if request.content_type != "application/json":',
        'if request.content_type == "":',
        f"{_OF_SECURITY}a_form_of_another_page_can_do_nothing",
    ),
    Mutant(
        "a confirmation holds for any action",
        _ACTIONS,
        "if known is None or known.key != key:",
        "if known is None:",
        f"{_OF_ACTIONS}a_confirmation_holds_for_what_was_asked_alone",
    ),
    Mutant(
        "a confirmation counts forever",
        _ACTIONS,
        "known = self._questions.pop(nonce, None)",
        "known = self._questions.get(nonce)",
        f"{_OF_ACTIONS}an_action_is_asked_once_more_and_done_once",
    ),
    Mutant(
        "a script in a run's text ends the data of an exported file",
        _EXPORT,
        'data.replace("<", "\\\\u003c")',
        "data",
        "tests/web/test_export.py::test_its_policy_allows_its_own_script_alone",
    ),
    Mutant(
        "secrets of the environment are left in logs",
        _REDACT,
        "text = self._known.sub(REDACTED, text)",
        "pass",
        f"{_OF_SECURITY}secrets_are_taken_out_of_all_answers",
    ),
    Mutant(
        "joined lines lose the seconds of their steps",
        _COLUMNS,
        'joined["busy"] = places["busy"].sum(axis=1)',
        "pass",
        f"{_OF_RESILIENCE}memory_is_bounded_and_spikes_stay",
    ),
    Mutant(
        "a file that got shorter is read on from where it was",
        _COLUMNS,
        "if self.size < self.offset:  # another file",
        "if self.size < 0:",
        f"{_OF_RESILIENCE}a_line_that_rank_0_died_in",
    ),
    Mutant(
        "one run that can't be read stops all",
        "orchestrator/web/cached_run.py",
        "except Exception as error:  # whatever it is, it is this run's, and is reported as such",
        "except KeyError as error:",
        f"{_OF_RESILIENCE}one_broken_run_stops_no_other",
    ),
    Mutant(
        "answers from memory stand in line with those from storage",
        _SERVER,
        "pool = self.quick if quick else self.threads",
        "pool = self.threads",
        f"{_OF_RESILIENCE}storage_that_hangs_leaves_the_page_as_it_was",
    ),
    Mutant(
        "runs that ended stay in the metrics",
        "orchestrator/web/read_model.py",
        "now - float(ended) < EXPORT_SECONDS",
        "now - float(ended) >= 0",
        "tests/web/test_monitoring.py::test_labels_are_bounded_and_runs_that_ended_leave",
    ),
    Mutant(
        "steps that were trained again are drawn as kept",
        "orchestrator/web/views/series.py",
        "return ledger.lost_after({number: line.step if line else None for number, line in resumed.items()})",
        "return dict.fromkeys(resumed, 1 << 60)",
        f"{_OF_API}series_keep_what_was_lost_apart",
    ),
]
