"""The order of samples: a function of seed and step, the same under every layout."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from trainer.data.sampler import Sampler

pytestmark = [pytest.mark.unit, pytest.mark.timeout(60)]


def _sampler(samples: int = 100, sequence: int = 4, global_batch: int = 24, seed: int = 1) -> Sampler:
    """Every token is its own place in the stream, so a sample tells where it was cut out."""
    return Sampler(np.arange(samples * sequence + 1, dtype=np.uint32), sequence, global_batch, seed)


def _step(sampler: Sampler, step: int, dp: int, micro_batch: int, global_batch: int = 24) -> np.ndarray:
    """All samples of a step under a layout, in the order of their position."""
    passes = range(global_batch // (dp * micro_batch))
    return np.concatenate(
        [sampler.batch(step, micro, micro_batch, rank, dp) for micro in passes for rank in range(dp)]
    )


def test_a_sample_is_a_window_and_its_target() -> None:
    batch = _sampler(sequence=5).batch(0, 0, 3, 0, 1)
    assert batch.shape == (3, 6) and batch.dtype == np.int64
    assert (np.diff(batch, axis=1) == 1).all() and (batch[:, 0] % 5 == 0).all()


@pytest.mark.parametrize(
    ("dp", "micro_batch"),
    [(d, m) for d, m in itertools.product((1, 2, 3, 4, 6, 8, 12, 24), repeat=2) if 24 % (d * m) == 0],
)
def test_every_layout_has_the_same_samples_in_a_step(dp: int, micro_batch: int) -> None:
    sampler = _sampler()
    for step in (0, 3, 4, 5, 1000):
        assert np.array_equal(_step(sampler, step, dp, micro_batch), _step(sampler, step, 1, 24))


@pytest.mark.parametrize("samples", [1, 2, 3, 4, 5, 15, 16, 17, 63, 64, 65, 1000, 4097])
def test_each_sample_comes_once_in_each_epoch(samples: int) -> None:
    sampler = _sampler(samples)
    assert sampler.samples == samples
    for epoch in (0, 1, 7):
        assert sorted(sampler.permuted(i, epoch) for i in range(samples)) == list(range(samples))


def test_an_epoch_goes_on_inside_a_step() -> None:
    """100 samples are no whole number of steps of 24; the 25 steps of 6 epochs still hold each 6 times."""
    starts = np.concatenate([_step(_sampler(), step, 2, 3)[:, 0] // 4 for step in range(25)])
    assert len(starts) == 600 and (np.bincount(starts) == 6).all()
    for epoch in range(6):
        assert len(set(starts[epoch * 100 : (epoch + 1) * 100])) == 100


def test_the_order_depends_on_the_seed_and_the_epoch() -> None:
    orders = [
        tuple(_sampler(seed=seed).permuted(i, epoch) for i in range(100))
        for seed in (1, 2)
        for epoch in (0, 1)
    ]
    assert len(set(orders)) == 4
    for one, other in itertools.combinations(orders, 2):
        assert sum(a == b for a, b in zip(one, other, strict=True)) < 12, "about one in a hundred by chance"


def test_the_order_is_not_the_streams() -> None:
    order = [_sampler(1000).permuted(i, 0) for i in range(1000)]
    assert sum(b - a == 1 for a, b in itertools.pairwise(order)) < 12
    # Spread evenly: every tenth of an epoch draws from every tenth of the data.
    counts = np.histogram2d(np.arange(1000), order, bins=10)[0]
    assert counts.min() >= 2 and counts.max() <= 22


def test_the_order_is_fixed_for_ever() -> None:
    """A resumed run must draw what the interrupted one would have: these numbers may never change."""
    assert [_sampler(seed=1234).permuted(i, 0) for i in range(8)] == [9, 11, 35, 65, 19, 6, 97, 15]


def test_the_tail_that_makes_no_sample_is_left_out() -> None:
    tokens = np.arange(4 * 10 + 3, dtype=np.uint16)
    assert Sampler(tokens, 4, 1, 0).samples == 10
    assert Sampler(tokens[:5], 4, 1, 0).samples == 1


def test_a_stream_without_a_sample_is_refused() -> None:
    with pytest.raises(ValueError, match="4 tokens make no sample of 4"):
        Sampler(np.arange(4), 4, 1, 0)
