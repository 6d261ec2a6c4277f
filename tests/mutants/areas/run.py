"""Defects of the loop, of resuming, and of the bench."""

from __future__ import annotations

from tests.mutants.listed import Mutant

_LOOP = "trainer/loop.py"
_RESUME = "trainer/checkpoints.py"
_FINGERPRINT = "trainer/fingerprint.py"
_ROUTING = "trainer/bench/routing.py"
_VARIANTS = "trainer/bench/variants.py"
_COMMAND = "trainer/bench/command.py"

_TEST = "tests/trainer/test_resume.py::test_"
_REFUSED = f"{_TEST}what_would_train_on_as_another_run_is_refused"
_ANOTHER = f"{_TEST}another_batch_goes_on_behind_the_samples_that_were_taken"
_BENCH = "tests/trainer/bench/test_variants.py::test_"
_WAITING = (
    "tests/trainer/test_bench.py::test_what_a_collective_takes_longer_than_where_it_is_shortest_is_waiting"
)
_FULLEST = f"{_BENCH}the_fullest_rank_is_that_of_each_layer"
_ROW = f"{_BENCH}a_row_has_a_forecast_for_the_rows_that_were_measured_too"
_RATES = f"{_TEST}every_step_has_its_rate_and_its_samples"

MUTANTS = [
    Mutant(
        "the fingerprint isn't looked at",
        _RESUME,
        'refused, changes = compare_fingerprints(newest.facts.get("fingerprint", {}), self._fingerprint)',
        "refused, changes = [], []",
        f"{_TEST}another_run_isnt_resumed",
    ),
    Mutant(
        "another seed is resumed",
        _FINGERPRINT,
        'if old.get("seed", new["seed"]) != new["seed"]:',
        "if False:",
        f"{_REFUSED}[train.seed=7-train.seed was 1234 and is 7]",
    ),
    Mutant(
        "another corpus is resumed",
        _FINGERPRINT,
        'return refusals + (differences(old["data"], new["data"]) if old.get("data") else []), notes',
        "return refusals, notes",
        f"{_TEST}other_data_is_refused_and_an_older_checkpoint_taken",
    ),
    Mutant(
        "another model is only said",
        _FINGERPRINT,
        'if section == "model" and name in _CHANGEABLE',
        'if section == "model"',
        f"{_REFUSED}[model.heads=4-model.heads was 2 and is 4]",
    ),
    Mutant(
        "another optimizer is resumed",
        _FINGERPRINT,
        'for section in ("model", "optim"):',
        'for section in ("model",):',
        f"{_REFUSED}[optim.kind=muon-optim.kind was adamw and is muon]",
    ),
    Mutant(
        "the router's settings aren't remembered",
        "faulttol/checkpoint/manifest.py",
        'if isinstance(value, dict) else {f"{prefix}{name}": value}',
        'if isinstance(value, dict) and False else {f"{prefix}{name}": str(type(value))}',
        f"{_REFUSED}[model.router.score=sigmoid-model.router.score was softmax and is sigmoid]",
    ),
    Mutant(
        "samples that were taken are taken again",
        _LOOP,
        "self.progress.sample_offset = loaded.samples - consumed_samples(self.config.train, loaded.step)",
        "self.progress.sample_offset = 0",
        _ANOTHER,
    ),
    Mutant(
        "a resumed run begins at the first step",
        _LOOP,
        "self.progress.step = self.progress.line_step = loaded.step",
        "self.progress.line_step = loaded.step",
        f"{_TEST}a_resumed_run_goes_on_as_it_was",
    ),
    Mutant(
        "tokens are those of the configured batch",
        _LOOP,
        "return consumed_samples(self.config.train, step) + self.progress.sample_offset",
        "return consumed_samples(self.config.train, step)",
        _ANOTHER,
    ),
    Mutant(
        "a step has the next one's rate",
        _LOOP,
        "lr = learning_rate(self.config.optim, index, train.steps)",
        "lr = learning_rate(self.config.optim, index + 1, train.steps)",
        _RATES,
    ),
    Mutant(
        "losses are weighted by the full batch while it grows",
        _LOOP,
        "batches, global_batch_size(train, index), lr",
        "batches, train.global_batch, lr",
        f"{_TEST}losses_of_a_growing_batch_are_means",
    ),
    Mutant(
        "skipped steps aren't counted",
        _LOOP,
        "self.skipped[0] += result.skipped",
        "self.skipped[0] += 0 * result.skipped",
        f"{_TEST}skipped_steps_are_counted_and_too_many_in_a_row_end_the_run",
    ),
    Mutant(
        "skipped steps never end a run",
        _LOOP,
        "(self.skipped[1] + result.skipped) * result.skipped",
        "(self.skipped[1] + result.skipped) * 0",
        f"{_TEST}skipped_steps_are_counted_and_too_many_in_a_row_end_the_run",
    ),
    # The bench.
    Mutant(
        "ranks wait at the end of a collective",
        "trainer/bench/kernels.py",
        "return [(end - least, end) for (_, _, end), least",
        "return [(start, start + least) for (_, start, _), least",
        _WAITING,
    ),
    Mutant(
        "what waits under computation counts too",
        "trainer/bench/kernels.py",
        "_union([*others, *moving])",
        "_union(moving)",
        _WAITING,
    ),
    Mutant(
        "ranks with other collectives wait for nothing",
        "trainer/bench/kernels.py",
        "if moving is None:\n        return None",
        "if moving is None:\n        return 0.0",
        _WAITING,
    ),
    Mutant(
        "a rank's experts are every second one",
        _ROUTING,
        "unflatten(1, (ep, -1)).sum(dim=2)",
        "unflatten(1, (-1, ep)).sum(dim=1)",
        _FULLEST,
    ),
    Mutant(
        "one rank is the fullest of all layers",
        _ROUTING,
        "(rows.amax(dim=1) / rows.mean(dim=1)).mean()",
        "rows.sum(dim=0).amax() / rows.sum(dim=0).mean()",
        _FULLEST,
    ),
    Mutant(
        "large layers count more for the fullest rank",
        _ROUTING,
        "(rows.amax(dim=1) / rows.mean(dim=1)).mean()",
        "rows.amax(dim=1).sum() / rows.mean(dim=1).sum()",
        _FULLEST,
    ),
    Mutant(
        "the forecast for measured rows is that of a plan",
        _VARIANTS,
        "forecast(config, world, measured.fullest)",
        "forecast(config, world)",
        _ROW,
    ),
    Mutant(
        "balanced rows are forecast as a plan expects them",
        _VARIANTS,
        "forecast(config, world, imbalance_of(routing))",
        "forecast(config, world)",
        _ROW,
    ),
    Mutant(
        "a forecast takes all rows for even ones",
        _VARIANTS,
        "job = replace(job, imbalance=imbalance)",
        "job = replace(job, imbalance=1.0)",
        f"{_BENCH}a_forecast_is_for_the_rows_of_the_fullest_rank",
    ),
    Mutant(
        "without split experts a rank is the fullest",
        _COMMAND,
        "if ep > 1 else None",
        "if True else None",
        f"{_BENCH}the_rows_of_the_fullest_rank_are_those_of_a_step[1-None]",
    ),
    Mutant(
        "variants are shown as of real text",
        _COMMAND,
        "measured, case.options.routing)",
        "measured)",
        f"{_BENCH}each_variant_is_shown_with_its_own_routing",
    ),
]
