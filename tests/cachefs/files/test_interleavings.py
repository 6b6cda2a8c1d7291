"""R4: reads, cancels, arrivals, failures and losses of memory in any order; nobody is forgotten.

Hypothesis decides what happens next; the source waits at every step until it is told to go on or
to fail. Whatever the order, each read is answered exactly once, with the right bytes or as it was
cancelled, and nothing is left under way.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, precondition, rule, run_state_machine_as_test
from tests.cachefs.fetch.sources import Request
from tests.cachefs.files.test_content import CHUNK, PATIENCE_S, Answer, Scene, made_file, until

from weightstream.cachefs.blob import Extent
from weightstream.cachefs.files.reads import Ticket
from weightstream.errors import LoadCancelled, UnavailableError

FILES = dict(made_file(f"m/i-{i:05}-of-00002.bin", 5 * CHUNK + 77, seed=i) for i in (1, 2))


class Gate:
    """Holds every step of every request until it is let go, or told to fail."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: list[tuple[threading.Event, list[bool]]] = []
        self._open = False

    def __call__(self, request: Request, sent: int) -> None:
        step, fails = threading.Event(), [False]
        with self._lock:
            if self._open:
                return
            self._waiting.append((step, fails))
        if not step.wait(PATIENCE_S):
            raise UnavailableError("the gate was forgotten")
        if fails[0]:
            raise UnavailableError("told to fail")

    def let_go(self, which: int, *, fails: bool = False) -> None:
        with self._lock:
            if not self._waiting:
                return
            step, verdict = self._waiting.pop(which % len(self._waiting))
        verdict[0] = fails
        step.set()

    def open(self) -> None:
        with self._lock:
            self._open, waiting = True, self._waiting
            self._waiting = []
        for step, _ in waiting:
            step.set()


@contextmanager
def scene(gate: Gate) -> Iterator[Scene]:
    with TemporaryDirectory() as folder:
        made = Scene(Path(folder), FILES, gate, hedge="off", deadline_s=60.0, memory_budget=4 << 20)
        try:
            yield made
        finally:
            made.close()


class Interleavings(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.gate = Gate()
        self._context = scene(self.gate)
        self.scene = self._context.__enter__()
        self.reads: list[tuple[Ticket, Answer, bytes]] = []
        self.cancelled: set[int] = set()

    @rule(which=st.integers(0, 1), start=st.integers(0, 5 * CHUNK), count=st.integers(1, 2 * CHUNK))
    def read(self, which: int, start: int, count: int) -> None:
        file = list(FILES)[which]
        answer = Answer()
        ticket = self.scene.content.read(file, Extent(start, start + count), answer)
        self.reads.append((ticket, answer, FILES[file][start : start + count]))

    @precondition(lambda self: self.reads)
    @rule(which=st.integers(0, 50))
    def cancel(self, which: int) -> None:
        index = which % len(self.reads)
        self.cancelled.add(index)
        self.scene.content.cancel(self.reads[index][0])

    @rule(which=st.integers(0, 50))
    def arrive(self, which: int) -> None:
        self.gate.let_go(which)

    @rule(which=st.integers(0, 50))
    def fail(self, which: int) -> None:
        self.gate.let_go(which, fails=True)

    @rule()
    def lose_memory(self) -> None:
        self.scene.content.memory.drop_all()

    def teardown(self) -> None:
        try:
            self.gate.open()
            for index, (_, answer, expected) in enumerate(self.reads):
                answer.wait()
                assert answer.count == 1
                if answer.error is None:
                    assert answer.data == expected
                else:
                    assert isinstance(answer.error, LoadCancelled)
                    assert index in self.cancelled
            gauges = self.scene.content.gauges
            assert until(lambda: not (gauges()["parked_reads"] or gauges()["demands"]))
            assert until(lambda: not gauges()["fills"])
        finally:
            self._context.__exit__(None, None, None)


def test_r4_any_order_of_events_answers_every_read_once() -> None:
    budget = hypothesis_settings(max_examples=20, stateful_step_count=25, deadline=None)
    run_state_machine_as_test(Interleavings, settings=budget)
