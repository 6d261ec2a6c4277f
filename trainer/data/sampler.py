"""Which sample is trained on when: a function of the seed and the samples consumed so far, never of the layout."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from trainer.data.mixture import Mixture
from trainer.data.streams import TokenStream

_FEISTEL_ROUNDS = 4


class TokenSample(NamedTuple):
    """One sample, and where in its stream it begins."""

    tokens: np.ndarray
    """[sequence + 1] ids; the last is a target only."""
    part: int
    """Of the mixture."""
    epoch: int
    """Of that part."""
    offset: int
    """Token of the part's stream at which it begins."""


class TokenSampler:
    """Cuts token streams into samples and orders them anew in each epoch, without state.

    A stream of N tokens is a ring, cut in each epoch at another offset into ceil((N - 1) / sequence) windows of
    `sequence` tokens, each read with the token behind it. So every token is seen in every epoch, the tail too: no
    window is partial, and fewer than `sequence` tokens, right behind the offset, are seen twice in the epoch. One window
    may cross from the last token to the first; the last is a separator.

    The order of the windows is a permutation that is computed, not stored: a Feistel network over the smallest even
    number of bits that holds all windows, walked until it lands inside. Of a mixture, `Mixture` deals the samples out,
    and each part has its own epochs. So the sample at any position is found in constant time and memory: a resumed run
    needs to know nothing but how many samples it has consumed, at whatever batch and layout.

    One reader per node (MegaScale section 3.4): the token file is mapped into memory, so all ranks of a node share the
    one copy in its page cache, and what one rank reads is there for the others; there is no loader process to feed.
    `Prefetch` reads the next step's samples while this one is computed.

    Args:
        streams: token streams of at least `sequence` + 1 tokens.
        sequence: tokens per sample that have a loss.
        seed: of the order.
        weights: of the streams; None: alike.

    Raises:
        ValueError: where a stream doesn't make up one sample.
    """

    def __init__(
        self,
        streams: Sequence[TokenStream | np.ndarray],
        sequence: int,
        seed: int,
        weights: Sequence[float] | None = None,
    ) -> None:
        self._streams = [one if isinstance(one, TokenStream) else TokenStream(one) for one in streams]
        self._sequence, self._seed = sequence, seed
        self._mixture = Mixture(weights if weights is not None else [1.0] * len(streams))
        for stream in self._streams:
            if len(stream) <= sequence:
                raise ValueError(f"{len(stream)} tokens make no sample of {sequence} and its target")
        self.samples = [-(-(len(stream) - 1) // sequence) for stream in self._streams]
        """Samples of an epoch, by part; each is drawn once in it."""

    def batch(self, first: int, micro: int, micro_batch: int, dp_rank: int, dp: int) -> np.ndarray:
        """Token ids [micro_batch, sequence + 1] int64 of one forward pass.

        The samples of a step are dealt out by accumulation step, then data-parallel position_in_epoch, so the set of a step
        is the same under every layout.

        Args:
            first: samples consumed before the step.
            micro: index of the accumulation step.
        """
        at = first + (micro * dp + dp_rank) * micro_batch
        return np.stack([self.sample(at + i).tokens for i in range(micro_batch)]).astype(np.int64)

    def sample(self, position: int) -> TokenSample:
        """The sample that comes after `position` others since the run's beginning."""
        part, index = self._mixture.choose(position)
        epoch, position_in_epoch = divmod(index, self.samples[part])
        stream = self._streams[part]
        start = self.offset(epoch, part) + self.permute(position_in_epoch, epoch, part) * self._sequence
        at = start % len(stream)
        return TokenSample(stream.read(at, self._sequence + 1), part, epoch, at)

    def counts(self, position: int) -> list[int]:
        """Samples of each part among the first `position`; divided by `samples`, its epochs."""
        return self._mixture.counts(position)

    def offset(self, epoch: int, part: int = 0) -> int:
        """Token at which the first window of an epoch begins, below `sequence`."""
        return self._hash("offset", part, epoch) % self._sequence

    def permute(self, index: int, epoch: int, part: int = 0) -> int:
        """Window that comes `index`-th in `epoch`, by its position in the stream."""
        samples = self.samples[part]
        half = max(1, -(-(samples - 1).bit_length() // 2))
        mask = (1 << half) - 1
        while True:
            left, right = index >> half, index & mask
            for turn in range(_FEISTEL_ROUNDS):
                left, right = right, left ^ (self._mix(right, turn, epoch, part) & mask)
            index = left << half | right
            if index < samples:
                return index

    def _mix(self, value: int, turn: int, epoch: int, part: int) -> int:
        # Without the part where there is one alone, as it was before there were mixtures.
        return self._hash(*((part,) if len(self._streams) > 1 else ()), epoch, turn, value)

    def _hash(self, *words: int | str) -> int:
        key = "/".join(map(str, (self._seed, *words))).encode()
        return int.from_bytes(hashlib.blake2b(key, digest_size=8).digest(), "little")


def document_ids(tokens: np.ndarray, separator: int | None) -> np.ndarray | None:
    """Document of each input, [B, sequence] int32, from 0 in each sample; a separator still belongs to what it ends.

    Args:
        tokens: [B, sequence + 1] ids.
        separator: None where nothing separates.

    Returns:
        None where no sample holds more than one document, so that no mask is needed.
    """
    if separator is None:
        return None
    ended = tokens[:, :-2] == separator
    if not ended.any():
        return None
    ids = np.zeros((len(tokens), tokens.shape[1] - 1), dtype=np.int32)
    np.cumsum(ended, axis=1, out=ids[:, 1:])
    return ids


def cu_seqlens(documents_BS: np.ndarray) -> np.ndarray:
    """Where documents begin, with the samples one after the other, and behind the last: [documents + 1] int32, from 0."""
    first_BS = np.ones(documents_BS.shape, dtype=bool)
    np.not_equal(documents_BS[:, 1:], documents_BS[:, :-1], out=first_BS[:, 1:])
    return np.append(np.flatnonzero(first_BS), documents_BS.size).astype(np.int32)
