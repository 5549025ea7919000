"""The inference thread, on which all predictions of a process run, one after another."""

from __future__ import annotations

import logging
import os
import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

T = TypeVar("T")

logger = logging.getLogger("darwin.batching")


class InferenceThread:
    """One thread that runs what it is given, in order. It never keeps the process from ending."""

    def __init__(self) -> None:
        self._jobs: deque[Callable[[], None]] = deque()
        # Its count is that of the jobs. Who writes to it has let go of the interpreter's lock when the thread wakes;
        # out of a queue, the thread would wake only to wait for that, which is two more changes of the thread.
        self._signal = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_SEMAPHORE)
        threading.Thread(target=self._work, name="inference", daemon=True).start()

    def run(self, job: Callable[[], None]) -> None:
        """Have `job` run, which raises nothing."""
        self._jobs.append(job)
        os.eventfd_write(self._signal, 1)

    def submit(self, job: Callable[[], T]) -> Future[T]:
        future: Future[T] = Future()

        def run() -> None:
            try:
                future.set_result(job())
            except BaseException as error:  # whatever it is, the one waiting must hear of it
                future.set_exception(error)

        self.run(run)
        return future

    def _work(self) -> None:
        while True:
            os.eventfd_read(self._signal)
            try:
                self._jobs.popleft()()
            except BaseException:  # nobody else would answer any more
                logger.exception("a job on the inference thread failed")
