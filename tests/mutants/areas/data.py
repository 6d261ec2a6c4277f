"""Defects of the order of samples, of documents and of what a rank is fed."""

from __future__ import annotations

from tests.mutants.listed import Mutant

_FEED = "trainer/batch_loader.py"
_MIXTURE = "trainer/data/mixture.py"
_SAMPLER = "trainer/data/sampler.py"
_STORE = "trainer/data/store.py"
_STREAMS = "trainer/data/streams.py"

_TEST = "tests/trainer/data/test_sampler.py::test_"
_LAYOUTS = f"{_TEST}every_layout_has_the_same_samples_in_a_step"
_ORDER = f"{_TEST}the_order_depends_on_the_seed_and_the_epoch"
_EVERY_TOKEN = f"{_TEST}every_token_is_seen_in_every_epoch"
_DOCUMENTS = f"{_TEST}the_document_of_a_token_counts_the_separators_before_it"
_RUNS = f"{_TEST}a_stream_of_runs_reads_as_their_copy"
_FED = "tests/trainer/data/test_batch_loader.py::test_"
_PLACES = f"{_FED}every_place_gets_its_samples_of_each_step"

MUTANTS = [
    Mutant(
        "the seed doesn't change the order",
        _SAMPLER,
        "(self._seed, *words)",
        "(0, *words)",
        _ORDER,
    ),
    Mutant(
        "the seed's high bits don't change the order",
        _SAMPLER,
        "(self._seed, *words)",
        "(self._seed & 0xFFFFFFFF, *words)",
        f"{_FED}another_seed_gives_another_order",
    ),
    Mutant(
        "every epoch has the same order",
        _SAMPLER,
        "if len(self._streams) > 1 else ()), epoch, turn, value)",
        "if len(self._streams) > 1 else ()), turn, value)",
        _ORDER,
    ),
    Mutant(
        "samples come in the stream's order",
        _SAMPLER,
        "self.permute(position_in_epoch, epoch, part) * self._sequence",
        "position_in_epoch * self._sequence",
        f"{_TEST}the_samples_are_fixed_for_ever",
    ),
    Mutant(
        "windows are cut at the same places in every epoch",
        _SAMPLER,
        'self._hash("offset", part, epoch)',
        'self._hash("offset", part)',
        f"{_TEST}windows_are_cut_at_other_places_in_each_epoch",
    ),
    Mutant(
        "windows overlap",
        _SAMPLER,
        "self.permute(position_in_epoch, epoch, part) * self._sequence",
        "self.permute(position_in_epoch, epoch, part) * (self._sequence - 1)",
        f"{_EVERY_TOKEN}[7-64]",
    ),
    Mutant(
        "the tail is lost",
        _SAMPLER,
        "-(-(len(stream) - 1) // sequence)",
        "(len(stream) - 1) // sequence",
        f"{_EVERY_TOKEN}[7-65]",
    ),
    Mutant(
        "parts of a mixture share an order",
        _SAMPLER,
        "*((part,) if len(self._streams) > 1 else ()), epoch",
        "epoch",
        f"{_TEST}equal_parts_of_a_mixture_have_orders_of_their_own",
    ),
    Mutant(
        "epochs are those of the whole mixture",
        _SAMPLER,
        "divmod(index, self.samples[part])",
        "divmod(position, self.samples[part])",
        f"{_TEST}each_part_of_a_mixture_has_its_own_epochs",
    ),
    Mutant(
        "all places have the same samples",
        _SAMPLER,
        "first + (micro * dp + dp_rank) * micro_batch",
        "first + micro * dp * micro_batch",
        f"{_LAYOUTS}[2-3]",
    ),
    Mutant(
        "all micro-batches have the same samples",
        _SAMPLER,
        "first + (micro * dp + dp_rank) * micro_batch",
        "first + dp_rank * micro_batch",
        f"{_LAYOUTS}[2-3]",
    ),
    Mutant(
        "every step has the first samples",
        _SAMPLER,
        "first + (micro * dp + dp_rank) * micro_batch",
        "(micro * dp + dp_rank) * micro_batch",
        f"{_TEST}a_growing_batch_and_a_changing_layout_draw_what_a_fixed_one_does",
    ),
    Mutant(
        "targets are inputs in the sample",
        _SAMPLER,
        "stream.read(at, self._sequence + 1)",
        "stream.read(at, self._sequence + 1)[[*range(self._sequence), -2]]",
        f"{_TEST}a_sample_is_a_window_and_its_target",
    ),
    Mutant(
        "a separator belongs to what it begins",
        _SAMPLER,
        "ended = tokens[:, :-2] == separator",
        "ended = tokens[:, 1:-1] == separator",
        _DOCUMENTS,
    ),
    Mutant(
        "documents of a sample aren't counted on",
        _SAMPLER,
        "np.cumsum(ended, axis=1, out=ids[:, 1:])",
        "ids[:, 1:] = ended",
        _DOCUMENTS,
    ),
    Mutant(
        "a mixture's weights are swapped",
        _MIXTURE,
        "_Node(left, right, (small, small + large))",
        "_Node(left, right, (large, small + large))",
        f"{_TEST}a_mixtures_counts_are_its_weights_at_every_position[weights2-0.5]",
    ),
    Mutant(
        "a mixture's weights are left out",
        _STORE,
        "weights = [part.weight for part in self.parts]",
        "weights = [1.0 for _ in self.parts]",
        "tests/trainer/data/test_batch_loader.py::test_a_mixture_is_dealt_out_by_its_weights",
    ),
    Mutant(
        "a stream continues with the same run",
        _STREAMS,
        "run = (run + 1) % len(self._starts)",
        "run = run % len(self._starts)",
        _RUNS,
    ),
    Mutant(
        "a stream begins at its run's beginning",
        _STREAMS,
        "int(self._starts[run]) + at - int(self._first[run])",
        "int(self._starts[run])",
        _RUNS,
    ),
    Mutant(
        "held-out documents are trained on",
        _STREAMS,
        "[:, first::2] for first in (0, 1)]",
        "[:, first::2] for first in (0, 0)]",
        f"{_FED}validation_is_on_held_out_documents_and_always_the_same",
    ),
    # What a rank is fed.
    Mutant(
        "every rank is fed as the first",
        _FEED,
        "self._rank.index, self._rank.size\n        )",
        "0, self._rank.size\n        )",
        f"{_PLACES}[2-0-0]",
    ),
    Mutant(
        "places don't share out a step",
        _FEED,
        "self._rank.index, self._rank.size\n        )",
        "self._rank.index, 1\n        )",
        f"{_PLACES}[2-0-0]",
    ),
    Mutant(
        "samples that were taken before are fed again",
        _FEED,
        "consumed_samples(train, step) + self._sample_offset",
        "consumed_samples(train, step)",
        f"{_PLACES}[1-0-5]",
    ),
    Mutant(
        "a resumed feed begins at the first step",
        _FEED,
        "range(step, self._config.train.steps)",
        "range(self._config.train.steps)",
        f"{_PLACES}[1-2-0]",
    ),
    Mutant(
        "documents are never told",
        _FEED,
        "masked = self._config.data.document_mask",
        "masked = False",
        f"{_FED}documents_are_told_where_they_are_masked[True]",
    ),
    Mutant(
        "documents of two samples are one",
        _SAMPLER,
        "first_BS = np.ones(",
        "first_BS = np.zeros(",
        f"{_FED}where_documents_lie_is_known_on_the_host",
    ),
    Mutant(
        "what is read within the step is read ahead",
        _FEED,
        "        if not ahead:\n",
        "        if False:\n",
        f"{_FED}batches_read_within_the_step_are_those_that_are_read_ahead",
    ),
    Mutant(
        "validation is on what is trained on",
        _FEED,
        "self._arrays(self._validation, 0, micro)",
        "self._arrays(self._sampler, 0, micro)",
        f"{_FED}validation_is_on_held_out_documents_and_always_the_same",
    ),
]
