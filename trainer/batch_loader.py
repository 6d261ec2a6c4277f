"""Batches for the loop: samples of prepared tokens, sharded over data-parallel ranks and prefetched one step ahead."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch

from configs.schema import RunConfig
from trainer.data.prefetch import Prefetch
from trainer.data.prepare import prepare
from trainer.data.sampler import TokenSampler, cu_seqlens, document_ids
from trainer.data.store import TokenStore, fingerprint
from trainer.engines.base import Batch, DataParallelRank
from trainer.model.seams import PackedDocuments
from trainer.optim.schedule import consumed_samples, global_batch_size

_Arrays = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]
"""Of a micro-batch: tokens, documents, and their bounds."""


class BatchLoader:
    """Loads the micro-batches that one rank trains and evaluates on."""

    def __init__(self, config: RunConfig, store: TokenStore) -> None:
        self._config, self._store = config, store
        self._sampler = store.train_sampler(config.data, config.train.seed)
        self._validation = store.validation_sampler(config.data)
        self._rank, self._device, self._sample_offset = DataParallelRank(0, 1), torch.device("cpu"), 0
        self._prefetched: Iterator[list[_Arrays]] = iter(())

    @classmethod
    def prepare(cls, config: RunConfig, cache: Path) -> BatchLoader:
        """Prepare the tokens, or find them prepared.

        Raises:
            UserError: for data that is missing, malformed or too short.
        """
        return cls(config, prepare(config.data, config.model.vocab, cache))

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What a checkpoint remembers of the data."""
        return fingerprint(self._store, self._config.data)

    @property
    def facts(self) -> dict[str, Any]:
        """For the run's record."""
        return {
            "corpus_tokens": self._store.count,
            "corpus_documents": self._store.documents,
            "held_out_documents": self._store.held,
            "samples_per_epoch": self._sampler.samples,
        }

    @property
    def notes(self) -> list[str]:
        """What preparing the tokens changed or left out."""
        return list(self._store.notes)

    @contextmanager
    def started(
        self, step: int, sample_offset: int, rank: DataParallelRank, device: torch.device, ahead: bool = True
    ) -> Iterator[None]:
        """Read batches from the step with index `step` on.

        Args:
            sample_offset: samples consumed beyond what the configuration takes up to a step.
            rank: this one's coordinate on the data-parallel axis.
            ahead: read a step's batches while the step before it is computed.
        """
        self._rank, self._device, self._sample_offset = rank, device, sample_offset
        steps = range(step, self._config.train.steps)
        if not ahead:
            self._prefetched = map(self._read, steps)
            yield
            return
        with Prefetch(self._read, steps) as coming:
            self._prefetched = iter(coming)
            yield

    def batches(self) -> list[Batch]:
        """The next step's micro-batches of this data-parallel rank, on the device."""
        return [self._batch(*arrays) for arrays in next(self._prefetched)]

    def validation(self) -> tuple[list[Batch], int]:
        """This rank's micro-batches of held-out documents, and how many samples all ranks have; always the same ones."""
        assert self._validation is not None, (
            "data.validation holds documents out where train.evaluate_every is set"
        )
        unit = self._config.train.micro_batch * self._rank.size
        micro_batches = -(-self._config.train.evaluate_samples // unit)
        pp = self._config.parallel.size("pp")
        # Pipelines take micro-batches in multiples of their stages.
        micro_batches = -(-micro_batches // pp) * pp
        arrays = [self._arrays(self._validation, 0, micro) for micro in range(micro_batches)]
        return [self._batch(*one) for one in arrays], micro_batches * unit

    def _read(self, step: int) -> list[_Arrays]:
        train = self._config.train
        first = consumed_samples(train, step) + self._sample_offset
        micro_batches = global_batch_size(train, step) // (train.micro_batch * self._rank.size)
        return [self._arrays(self._sampler, first, micro) for micro in range(micro_batches)]

    def _arrays(self, sampler: TokenSampler, first: int, micro: int) -> _Arrays:
        tokens = sampler.batch(
            first, micro, self._config.train.micro_batch, self._rank.index, self._rank.size
        )
        masked = self._config.data.document_mask
        ids = document_ids(tokens, self._store.separator) if masked else None
        return tokens, ids, None if ids is None else cu_seqlens(ids)

    def _batch(self, tokens: np.ndarray, documents: np.ndarray | None, ends: np.ndarray | None) -> Batch:
        if documents is None or ends is None:
            return Batch(self._to_device(tokens), None)
        packed = PackedDocuments(self._to_device(ends), int(np.diff(ends).max()))
        return Batch(self._to_device(tokens), self._to_device(documents), packed)

    def _to_device(self, array: np.ndarray) -> torch.Tensor:
        tensor = torch.from_numpy(array)
        if self._device.type != "cpu":
            tensor = tensor.pin_memory()
        return tensor.to(self._device, non_blocking=True)
