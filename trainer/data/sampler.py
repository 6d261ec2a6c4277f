"""Which sample is trained on when: a function of the seed and the step alone, never of the layout."""

from __future__ import annotations

import hashlib

import numpy as np

_ROUNDS = 4


class Sampler:
    """Cuts a token stream into samples of `sequence` tokens and orders them anew in each epoch.

    The order is a permutation that is computed, not stored: a Feistel network over the smallest even number of
    bits that holds all samples, walked until it lands inside. So any sample of any step is found in constant
    time and memory, and a resumed run needs to know nothing but its step.

    Args:
        tokens: [N] token ids.
        sequence: tokens per sample that have a loss; a sample is one longer.
        global_batch: samples per step.
        seed: of the order.

    Raises:
        ValueError: where the tokens don't make up one sample.
    """

    def __init__(self, tokens: np.ndarray, sequence: int, global_batch: int, seed: int) -> None:
        self._tokens, self._sequence, self._global_batch, self._seed = tokens, sequence, global_batch, seed
        self.samples = (len(tokens) - 1) // sequence
        """Samples per epoch; each is drawn once in it."""
        if self.samples < 1:
            raise ValueError(f"{len(tokens)} tokens make no sample of {sequence} and its target")
        self._half = max(1, -(-(self.samples - 1).bit_length() // 2))

    def batch(self, step: int, micro: int, micro_batch: int, dp_rank: int, dp: int) -> np.ndarray:
        """Token ids [micro_batch, sequence + 1] of one forward pass.

        The samples of a step are dealt out by accumulation step, then data-parallel rank, so the set of a step
        is the same under every layout.

        Args:
            step: index of the step, from 0.
            micro: index of the accumulation step.
        """
        first = step * self._global_batch + (micro * dp + dp_rank) * micro_batch
        return np.stack([self._sample(first + i) for i in range(micro_batch)]).astype(np.int64)

    def _sample(self, position: int) -> np.ndarray:
        epoch, index = divmod(position, self.samples)
        at = self.permuted(index, epoch) * self._sequence
        return self._tokens[at : at + self._sequence + 1]

    def permuted(self, index: int, epoch: int) -> int:
        """Place of the sample that comes `index`-th in `epoch`."""
        mask = (1 << self._half) - 1
        while True:
            left, right = index >> self._half, index & mask
            for turn in range(_ROUNDS):
                left, right = right, left ^ (self._mix(right, turn, epoch) & mask)
            index = left << self._half | right
            if index < self.samples:
                return index

    def _mix(self, value: int, turn: int, epoch: int) -> int:
        key = b"%d/%d/%d/%d" % (self._seed, epoch, turn, value)
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")
