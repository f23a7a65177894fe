"""One thread that owns the model, and the jobs that take turns on it.

A job is a generator: it yields between two forwards, an event for whoever asked or None. The thread runs the next step
of the most urgent job, in turn among equals; so a click never waits for a measurement longer than one step.
"""

import threading
from collections import deque
from collections.abc import Callable, Generator
from concurrent.futures import Future
from enum import IntEnum
from typing import Any, TypeVar

from loguru import logger

from ..errors import LoraLiteError

Event = dict[str, Any]
Steps = Generator[Event | None, None, None]
Result = TypeVar("Result")

MOST_JOBS = 64
"""That may be under way together, and as many calls beside them; beyond it, `submit` refuses."""


class BusyError(LoraLiteError, RuntimeError):
    """More jobs are waiting than the thread will get to in good time."""


class Priority(IntEnum):
    """The most urgent first."""

    CALL, WRITE, FIT, DAMAGE, MAP = range(5)


class Job:
    """The steps of one request, and where its events go; None is the last."""

    def __init__(self, priority: Priority, steps: Steps, deliver: Callable[[Event | None], None]) -> None:
        self.priority, self.steps, self.deliver = priority, steps, deliver
        self.cancelled = threading.Event()

    def cancel(self) -> None:
        """Let it end before its next step: nobody reads its events any more."""
        self.cancelled.set()

    def run_step(self) -> bool:
        """Runs one step. Returns if there may be another."""
        if self.cancelled.is_set():
            self.close()
            return False
        try:
            event = next(self.steps)
        except StopIteration:
            self.deliver(None)
            return False
        except Exception as error:
            self.deliver({"kind": "error", "text": sentence(error)})
            self.deliver(None)
            return False
        if event is not None:
            self.deliver(event)
        return True

    def close(self) -> None:
        """Take off what it has put on the model; on the thread that owns it, which goes on whatever happens."""
        try:
            self.steps.close()
        except Exception as error:
            logger.opt(exception=error).error("a job failed as it was closed")


class Worker:
    """The thread. Everything that touches the model goes through `submit` or `call`."""

    def __init__(self) -> None:
        self._queues: dict[Priority, deque[Job]] = {priority: deque() for priority in Priority}
        self._changed = threading.Condition()
        self._stopping = False
        self._thread = threading.Thread(target=self._run, name="lora-lite play", daemon=True)

    def start(self) -> None:
        """Start the one thread that runs every step."""
        self._thread.start()

    def stop(self, timeout: float | None = None) -> bool:
        """End after the running step; jobs under way are closed. Returns if it has ended within so many seconds."""
        with self._changed:
            self._stopping = True
            self._changed.notify()
        self._thread.join(timeout)
        return not self._thread.is_alive()

    def count(self, *, calls: bool = False) -> int:
        """How many jobs are under way, or how many calls; those that nobody waits for don't count."""
        with self._changed:
            queues = [queue for priority, queue in self._queues.items() if (priority == Priority.CALL) == calls]
            return sum(not job.cancelled.is_set() for queue in queues for job in queue)

    def submit(self, job: Job) -> None:
        """Put a job in line.

        Raises:
            BusyError: where MOST_JOBS are under way.
        """
        with self._changed:
            if self.count(calls=job.priority == Priority.CALL) >= MOST_JOBS:
                raise BusyError(f"{MOST_JOBS} requests are under way on this machine\n  wait a moment and try again")
            self._queues[job.priority].append(job)
            self._changed.notify()

    def call(self, function: Callable[[], Result]) -> "Future[Result]":
        """The function's result, of one step that comes before the others."""
        future: Future[Result] = Future()

        def steps() -> Steps:
            if not future.set_running_or_notify_cancel():  # whoever asked has gone
                return
            try:
                future.set_result(function())
            except Exception as error:
                future.set_exception(error)
            yield None

        self.submit(Job(Priority.CALL, steps(), lambda event: None))
        return future

    def _run(self) -> None:
        while (job := self._next_job()) is not None:
            again = job.run_step()
            with self._changed:
                queue = self._queues[job.priority]
                queue.remove(job)  # it stayed in line, so that `count` had it
                if again:
                    queue.append(job)
        for queue in self._queues.values():
            for job in queue:
                job.close()

    def _next_job(self) -> Job | None:
        """One to be closed, or else the first of the most urgent; None at the end."""
        with self._changed:
            while not (self._stopping or any(self._queues.values())):
                self._changed.wait()
            if self._stopping:
                return None
            jobs = [job for queue in self._queues.values() for job in queue]
            return next((job for job in jobs if job.cancelled.is_set()), jobs[0])


def sentence(error: Exception) -> str:
    """An error for the page: the library's own words, or where to look for the others."""
    if isinstance(error, LoraLiteError):
        return str(error)
    logger.opt(exception=error).error("a request failed")
    return f"the server made a mistake: {type(error).__name__}\n  its terminal shows where"
