"""The thread that owns the model: who is next, and how a job ends."""

import threading
import time
from typing import Any

import pytest

import lora_lite as ll
from lora_lite.play.jobs import MOST_JOBS, BusyError, Job, Priority, Steps, Worker


@pytest.fixture
def worker() -> Any:
    worker = Worker()
    worker.start()
    yield worker
    worker.stop()


class Gate:
    """A job that keeps the thread in its first step until it is opened, so that others can be put in line."""

    def __init__(self, worker: Worker) -> None:
        self.open, self.begun = threading.Event(), threading.Event()
        worker.submit(Job(Priority.WRITE, self.steps(), lambda event: None))
        assert self.begun.wait(10)

    def steps(self) -> Steps:
        self.begun.set()
        self.open.wait(10)
        yield None


def counting(log: list[str], name: str, n: int) -> Steps:
    for i in range(n):
        log.append(f"{name}{i}")
        yield {"i": i}


def submit(worker: Worker, priority: Priority, steps: Steps) -> tuple[Job, list[Any], threading.Event]:
    events: list[Any] = []
    ended = threading.Event()

    def deliver(event: Any) -> None:
        events.append(event)
        if event is None:
            ended.set()

    job = Job(priority, steps, deliver)
    worker.submit(job)
    return job, events, ended


def test_the_most_urgent_first_and_equals_in_turn(worker: Worker) -> None:
    log: list[str] = []
    gate = Gate(worker)
    jobs = [
        submit(worker, priority, counting(log, name, 2))
        for priority, name in (
            (Priority.MAP, "m"),
            (Priority.DAMAGE, "d"),
            (Priority.WRITE, "v"),
            (Priority.FIT, "f"),
            (Priority.WRITE, "w"),
        )
    ]
    gate.open.set()
    assert all(ended.wait(10) for _, _, ended in jobs)
    assert log == ["v0", "w0", "v1", "w1", "f0", "f1", "d0", "d1", "m0", "m1"]
    assert jobs[0][1] == [{"i": 0}, {"i": 1}, None]
    assert worker.count() == 0


def test_a_click_comes_in_between(worker: Worker) -> None:
    log: list[str] = []
    started = threading.Event()

    def slow() -> Steps:
        for i in range(3):
            log.append(f"d{i}")
            started.set()
            time.sleep(0.05)
            yield None

    _, _, ended = submit(worker, Priority.DAMAGE, slow())
    started.wait(10)
    submit(worker, Priority.WRITE, counting(log, "w", 2))[2].wait(10)
    assert ended.wait(10)
    assert log == ["d0", "w0", "w1", "d1", "d2"]


def test_a_job_that_nobody_reads_is_closed_on_the_thread(worker: Worker) -> None:
    closed: list[str] = []
    gone, started = threading.Event(), threading.Event()

    def endless() -> Steps:
        try:
            while True:
                started.set()
                yield {"kind": "tick"}
        finally:
            closed.append(threading.current_thread().name)
            gone.set()

    job, events, _ = submit(worker, Priority.WRITE, endless())
    assert started.wait(10)
    job.cancel()
    assert gone.wait(10)
    assert closed == ["lora-lite play"]
    assert None not in events


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_is_a_sentence_and_the_thread_goes_on(worker: Worker, log: list[str]) -> None:
    def failing(error: Exception) -> Steps:
        yield {"i": 0}
        raise error

    _, events, ended = submit(worker, Priority.WRITE, failing(ll.ConfigError("c=9: wanted less\n  take 8")))
    assert ended.wait(10)
    assert events == [{"i": 0}, {"kind": "error", "text": "c=9: wanted less\n  take 8"}, None]
    _, events, ended = submit(worker, Priority.WRITE, failing(KeyError("secret")))
    assert ended.wait(10)
    assert events[1] == {"kind": "error", "text": "the server made a mistake: KeyError\n  its terminal shows where"}
    assert any("a request failed" in line for line in log)
    assert worker.call(lambda: 3).result(10) == 3
    with pytest.raises(ZeroDivisionError):
        worker.call(lambda: 1 / 0).result(10)


def test_too_many_jobs_are_refused(worker: Worker) -> None:
    gate = Gate(worker)
    for _ in range(MOST_JOBS - 1):
        submit(worker, Priority.MAP, counting([], "m", 1))
    with pytest.raises(BusyError, match="64 requests are under way on this machine\n  wait a moment"):
        submit(worker, Priority.WRITE, counting([], "w", 1))
    gate.open.set()


def test_what_nobody_waits_for_takes_no_place(worker: Worker) -> None:
    def writing() -> Steps:
        while not done.is_set():
            time.sleep(0.001)
            yield None

    def measuring() -> Steps:
        closed.append(1)
        yield None

    done, closed = threading.Event(), []
    submit(worker, Priority.WRITE, writing())
    for _ in range(2 * MOST_JOBS):  # a page gives up each measure for the next
        job, _, _ = submit(worker, Priority.DAMAGE, measuring())
        job.cancel()
    assert worker.call(lambda: 5).result(10) == 5
    done.set()
    assert worker.call(lambda: worker.count()).result(10) <= 1
    assert closed == []


def test_calls_have_places_of_their_own_before_the_others(worker: Worker) -> None:
    gate, log = Gate(worker), []
    for _ in range(MOST_JOBS - 1):
        submit(worker, Priority.WRITE, counting(log, "w", 1))
    calls = [worker.call(lambda: len(log)) for _ in range(MOST_JOBS)]
    with pytest.raises(BusyError, match="64 requests are under way"):
        worker.call(lambda: 1)
    gate.open.set()
    assert {call.result(10) for call in calls} == {0}


def test_a_job_that_fails_as_it_is_closed_is_told_of(worker: Worker, log: list[str]) -> None:
    def failing() -> Steps:
        try:
            while True:
                yield {"i": 0}
                time.sleep(0.001)
        finally:
            raise KeyError("detach")

    for _ in range(2):
        job, events, _ = submit(worker, Priority.MAP, failing())
        while not events:
            time.sleep(0.001)
        job.cancel()
        assert worker.call(lambda: 3).result(10) == 3
    submit(worker, Priority.MAP, failing())
    worker.stop()
    assert len([line for line in log if "a job failed as it was closed" in line]) >= 2


def test_a_call_that_is_given_up_never_runs(worker: Worker) -> None:
    gate, ran = Gate(worker), []
    future = worker.call(lambda: ran.append(1))
    assert future.cancel()
    gate.open.set()
    assert worker.call(lambda: 2).result(10) == 2
    assert ran == []


def test_stopping_closes_what_is_under_way() -> None:
    worker, closed = Worker(), []

    def endless() -> Steps:
        try:
            while True:
                yield None
        finally:
            closed.append(1)

    worker.start()
    started = submit(worker, Priority.MAP, endless())
    time.sleep(0.05)
    worker.stop()
    assert closed == [1]
    assert None not in started[1]
