"""Batches for the loop: prepared tokens, dealt out by sample, read ahead of the step that trains on them."""

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
from trainer.data.sampler import TokenSampler, bounds, documents
from trainer.data.store import TokenStore, fingerprint
from trainer.engines.base import Batch, DataParallelRank
from trainer.model.seams import PackedDocuments
from trainer.optim.schedule import consumed_samples, global_batch_size

_Arrays = tuple[np.ndarray, np.ndarray | None, np.ndarray | None]
"""Of a micro-batch: tokens, documents, and their bounds."""


class BatchFeed:
    """What one rank trains and evaluates on."""

    def __init__(self, config: RunConfig, store: TokenStore) -> None:
        self._config, self._store = config, store
        self._sampler = store.sampler(config.data, config.train.seed)
        self._held = store.evaluation(config.data)
        self._place, self._device, self._beyond = DataParallelRank(0, 1), torch.device("cpu"), 0
        self._coming: Iterator[list[_Arrays]] = iter(())

    @classmethod
    def prepare(cls, config: RunConfig, cache: Path) -> BatchFeed:
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
        self, step: int, beyond: int, place: DataParallelRank, device: torch.device, ahead: bool = True
    ) -> Iterator[None]:
        """Read batches from the step with index `step` on.

        Args:
            beyond: samples consumed beyond what the configuration takes up to a step.
            place: this rank's on the data-parallel axis.
            ahead: read a step's batches while the step before it is computed.
        """
        self._place, self._device, self._beyond = place, device, beyond
        steps = range(step, self._config.train.steps)
        if not ahead:
            self._coming = map(self._read, steps)
            yield
            return
        with Prefetch(self._read, steps) as coming:
            self._coming = iter(coming)
            yield

    def batches(self) -> list[Batch]:
        """The next step's micro-batches of this place, on the device."""
        return [self._batch(*arrays) for arrays in next(self._coming)]

    def validation(self) -> tuple[list[Batch], int]:
        """This place's micro-batches of held-out documents, and how many samples all places have; always the same ones."""
        assert self._held is not None, "data.validation holds documents out where train.evaluate_every is set"
        unit = self._config.train.micro_batch * self._place.size
        passes = -(-self._config.train.evaluate_samples // unit)
        pp = self._config.parallel.size("pp")
        passes = -(-passes // pp) * pp  # pipelines take micro-batches in multiples of their stages
        arrays = [self._arrays(self._held, 0, micro) for micro in range(passes)]
        return [self._batch(*one) for one in arrays], passes * unit

    def _read(self, step: int) -> list[_Arrays]:
        train = self._config.train
        first = consumed_samples(train, step) + self._beyond
        passes = global_batch_size(train, step) // (train.micro_batch * self._place.size)
        return [self._arrays(self._sampler, first, micro) for micro in range(passes)]

    def _arrays(self, sampler: TokenSampler, first: int, micro: int) -> _Arrays:
        tokens = sampler.batch(
            first, micro, self._config.train.micro_batch, self._place.index, self._place.size
        )
        masked = self._config.data.document_mask
        of = documents(tokens, self._store.separator) if masked else None
        return tokens, of, None if of is None else bounds(of)

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
