"""The next step's data read while this step is computed."""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from types import TracebackType
from typing import Generic, TypeVar, cast

K = TypeVar("K")
T = TypeVar("T")


class Prefetch(Generic[K, T]):
    """Calls `read` for keys in order, in a thread, at most `ahead` results before they are asked for.

    Exactly what a plain loop over the keys would give, in its order; an error that `read` raises comes up where its
    result would. Use it as a context: at its end the thread ends too.

    Args:
        read: gives the result of one key; called by one thread only.
        keys: what to read, in order.
        ahead: results that may wait.
    """

    def __init__(self, read: Callable[[K], T], keys: Iterable[K], ahead: int = 1) -> None:
        self._read, self._keys = read, keys
        self._results: queue.Queue[tuple[T | None, BaseException | None]] = queue.Queue()
        self._free = threading.Semaphore(ahead)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="data", daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            for key in self._keys:
                self._free.acquire()
                if self._stopped.is_set():
                    break
                self._results.put((self._read(key), None))
            self._results.put((None, StopIteration()))
        except BaseException as error:  # raised again where the result is asked for
            self._results.put((None, error))

    def __iter__(self) -> Iterator[T]:
        """The results, in the order of the keys."""
        while True:
            result, error = self._results.get()
            if error is not None:
                self._results.put((None, error))  # for whoever asks once more
                if isinstance(error, StopIteration):
                    return
                raise error
            self._free.release()
            yield cast("T", result)

    def close(self) -> None:
        """End the thread; a result that is being read is finished and dropped."""
        self._stopped.set()
        self._free.release()
        self._thread.join()

    def __enter__(self) -> Prefetch[K, T]:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
