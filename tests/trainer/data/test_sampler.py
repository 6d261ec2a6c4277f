"""The order of samples: a function of seed and position, the same under every layout, with every token in every epoch."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trainer.data.sampler import TokenSampler, document_ids
from trainer.data.streams import TokenStream

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


def _sampler(samples: int = 100, sequence: int = 4, seed: int = 1) -> TokenSampler:
    """Every token is its own place in the stream, so a sample tells where it was cut out."""
    return TokenSampler([np.arange(samples * sequence + 1, dtype=np.uint32)], sequence, seed)


def _step(sampler: TokenSampler, first: int, samples: int, dp: int, micro_batch: int) -> np.ndarray:
    """All samples of a step under a layout, in the order of their position."""
    passes = range(samples // (dp * micro_batch))
    return np.concatenate(
        [sampler.batch(first, micro, micro_batch, rank, dp) for micro in passes for rank in range(dp)]
    )


# ---- layouts ----


def test_a_sample_is_a_window_and_its_target() -> None:
    batch = _sampler(sequence=5).batch(0, 0, 3, 0, 1)
    assert batch.shape == (3, 6) and batch.dtype == np.int64
    assert (np.diff(batch, axis=1) % 501 == 1).all()


@pytest.mark.parametrize(
    ("dp", "micro_batch"),
    [(d, m) for d, m in itertools.product((1, 2, 3, 4, 6, 8, 12, 24), repeat=2) if 24 % (d * m) == 0],
)
def test_every_layout_has_the_same_samples_in_a_step(dp: int, micro_batch: int) -> None:
    sampler = _sampler()
    for first in (0, 72, 96, 7, 24_000):
        assert np.array_equal(_step(sampler, first, 24, dp, micro_batch), _step(sampler, first, 24, 1, 24))


def test_a_growing_batch_and_a_changing_layout_draw_what_a_fixed_one_does() -> None:
    """The position counts samples, not steps: a ramp from 4 to 24, at another dp in each step."""
    sampler, first, drawn = _sampler(), 0, []
    for samples, dp in ((4, 2), (4, 4), (8, 1), (12, 3), (24, 8), (24, 2), (24, 24)):
        drawn.append(_step(sampler, first, samples, dp, 1))
        first += samples
    wanted = np.stack([sampler.sample(i).tokens for i in range(100)])
    assert first == 100 and np.array_equal(np.concatenate(drawn), wanted)


# ---- epochs ----


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1000, 4097])
def test_each_window_comes_once_in_each_epoch(samples: int) -> None:
    sampler = _sampler(samples)
    assert sampler.samples == [samples]
    for epoch in (0, 1, 7):
        assert sorted(sampler.permute(i, epoch) for i in range(samples)) == list(range(samples))


def test_epochs_follow_each_other() -> None:
    sampler = _sampler()
    found = [sampler.sample(i) for i in range(600)]
    assert [sample.epoch for sample in found] == [i // 100 for i in range(600)]
    for epoch in range(6):
        assert len({sample.offset for sample in found[epoch * 100 : (epoch + 1) * 100]}) == 100


@pytest.mark.parametrize("tokens", [9, 10, 15, 16, 17, 63, 64, 65, 100])
@pytest.mark.parametrize("sequence", [2, 7, 8])
def test_every_token_is_seen_in_every_epoch(tokens: int, sequence: int) -> None:
    """The tail too; fewer than a sample's tokens come twice."""
    sampler = TokenSampler([np.arange(tokens)], sequence, 3)
    (samples,) = sampler.samples
    for epoch in range(6):
        seen = np.concatenate([sampler.sample(epoch * samples + i).tokens for i in range(samples)])
        assert set(seen.tolist()) == set(range(tokens))
        inputs = np.concatenate([sampler.sample(epoch * samples + i).tokens[:-1] for i in range(samples)])
        counts = np.bincount(inputs, minlength=tokens)
        assert counts.max() <= 2 and (counts == 2).sum() < sequence and (counts == 0).sum() <= 1


def test_windows_are_cut_at_other_places_in_each_epoch() -> None:
    sampler = _sampler(sequence=64)
    offsets = [sampler.offset(epoch) for epoch in range(400)]
    assert min(offsets) == 0 and max(offsets) == 63 and len(set(offsets)) == 64
    assert sampler.sample(0).offset % 64 != sampler.sample(100).offset % 64


def test_a_window_may_go_on_at_the_beginning() -> None:
    sampler = TokenSampler([np.arange(10)], 4, 0)
    found = [sampler.sample(i) for i in range(60)]
    crossing = [sample.tokens.tolist() for sample in found if sample.offset > 5]
    assert crossing and all(
        tokens == [i % 10 for i in range(tokens[0], tokens[0] + 5)] for tokens in crossing
    )


def test_the_order_depends_on_the_seed_and_the_epoch() -> None:
    orders = [
        tuple(_sampler(seed=seed).permute(i, epoch) for i in range(100))
        for seed in (1, 2)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4
    for one, other in itertools.combinations(orders, 2):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 12, "about one in a hundred by chance"


def test_the_order_is_not_the_streams() -> None:
    order = [_sampler(1000).permute(i, 0) for i in range(1000)]
    assert sum(b - a == 1 for a, b in itertools.pairwise(order)) < 12
    # Spread evenly: every tenth of an epoch draws from every tenth of the data.
    counts = np.histogram2d(np.arange(1000), order, bins=10)[0]
    assert counts.min() >= 2 and counts.max() <= 22


def test_a_stream_without_a_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="4 tokens make no sample of 4"):
        TokenSampler([np.arange(4)], 4, 0)
    assert TokenSampler([np.arange(5)], 4, 0).samples == [1]


# ---- golden: a resumed run must draw what the interrupted one would have, so these numbers may never change ----


def test_the_order_is_fixed_for_ever() -> None:
    assert [_sampler(seed=1234).permute(i, 0) for i in range(8)] == [9, 11, 35, 65, 19, 6, 97, 15]


def test_the_samples_are_fixed_for_ever() -> None:
    sampler = _sampler(seed=1234)
    assert [sampler.sample(i).offset for i in (0, 1, 2, 99, 100, 101, 12_345)] == [
        37,
        45,
        141,
        21,
        287,
        183,
        168,
    ]
    mixed = TokenSampler([np.arange(401), np.arange(57), np.arange(90)], 4, 1234, [0.5, 0.2, 0.3])
    assert [tuple(mixed.sample(i)[1:]) for i in (0, 1, 2, 3, 4, 5, 777)] == [
        (0, 0, 385),
        (2, 0, 51),
        (0, 0, 309),
        (1, 0, 30),
        (0, 0, 361),
        (2, 0, 47),
        (1, 11, 25),
    ]


# ---- mixtures ----


def _mixed(*weights: float, seed: int = 1) -> TokenSampler:
    streams = [np.arange(i * 10_000, i * 10_000 + 41 + 16 * i) for i in range(len(weights))]
    return TokenSampler(streams, 4, seed, weights)


@pytest.mark.parametrize(
    ("weights", "most"),
    [
        ((1.0,), 0.0), ((1.0, 1.0), 0.5), ((0.7, 0.3), 0.5), ((0.999, 0.001), 0.5), ((0.5, 0.3, 0.2), 1.0),
        ((1e-6, 1.0, 3.0), 1.0), ((1, 2, 3, 4, 5, 6, 7), 2.0), ((0.9, 0.05, 0.03, 0.015, 0.004, 0.001), 2.0),
    ],
)  # fmt: skip
def test_a_mixtures_counts_are_its_weights_at_every_position(weights: tuple[float, ...], most: float) -> None:
    sampler, counts = _mixed(*weights), np.zeros(len(weights))
    exact = np.array(weights) / sum(weights)
    for position in range(3000):
        assert sampler.counts(position) == counts.tolist()
        assert (np.abs(counts - position * exact) <= most).all()
        counts[sampler.sample(position).part] += 1


def test_a_mixtures_counts_are_exact_after_a_trillion_samples() -> None:
    counts = _mixed(0.1, 0.2, 0.7).counts(10**12)
    total = sum((0.1, 0.2, 0.7))
    assert sum(counts) == 10**12
    for count, weight in zip(counts, (0.1, 0.2, 0.7), strict=True):
        assert abs(count - 10**12 * weight / total) < 1 + 10**12 * 1e-15


def test_each_part_of_a_mixture_has_its_own_epochs() -> None:
    sampler = _mixed(0.7, 0.2, 0.1)
    assert sampler.samples == [10, 14, 18]
    drawn: list[list[tuple[int, int]]] = [[], [], []]
    for position in range(1000):
        sample = sampler.sample(position)
        assert (sample.tokens // 10_000 == sample.part).all()
        drawn[sample.part].append((sample.epoch, sample.offset))
    for part, samples in enumerate(drawn):
        size = sampler.samples[part]
        assert [epoch for epoch, _ in samples] == [i // size for i in range(len(samples))]
        for i in range(len(samples) // size):
            assert len(set(samples[i * size : (i + 1) * size])) == size


def test_equal_parts_of_a_mixture_have_orders_of_their_own() -> None:
    sampler = TokenSampler([np.arange(401)] * 2, 4, 1, [1, 1])
    orders = [[sampler.permute(i, 0, part) for i in range(100)] for part in (0, 1)]
    assert sum(a == b for a, b in zip(*orders, strict=True)) < 12


# ---- documents ----


def test_the_document_of_a_token_counts_the_separators_before_it() -> None:
    tokens = np.array([[5, 0, 6, 7, 0, 0, 8, 9], [1, 2, 3, 4, 5, 6, 7, 8]])
    found = document_ids(tokens, 0)
    assert found is not None and found.dtype == np.int32
    assert found.tolist() == [[0, 0, 1, 1, 1, 2, 3], [0] * 7]


@pytest.mark.parametrize("row", [[1, 2, 3, 4, 5], [1, 2, 3, 0, 5], [1, 2, 3, 4, 0]])
def test_one_document_a_sample_needs_no_mask(row: list[int]) -> None:
    """A separator that is the last input or only a target has no input behind it."""
    assert document_ids(np.array([row, [9, 9, 9, 9, 9]]), 0) is None
    assert document_ids(np.array([[1, 0, 3, 4, 5]]), None) is None
    assert document_ids(np.array([[1, 0, 3, 4, 5]]), 0) is not None


# ---- streams ----


def test_a_stream_of_runs_reads_as_their_copy() -> None:
    tokens = np.arange(100, dtype=np.uint16)
    stream = TokenStream(tokens, np.array([3, 20, 50]), np.array([10, 21, 90]))
    whole = np.concatenate([tokens[3:10], tokens[20:21], tokens[50:90]])
    assert len(stream) == 48
    for at, count in itertools.product(range(0, 97), (1, 2, 7, 8, 9, 48, 100)):
        assert np.array_equal(stream.read(at, count), np.resize(np.roll(whole, -at), count))
