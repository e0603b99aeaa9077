"""Orders from rank 0 to all ranks: each is one small header, then, for a step, its words."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from dist_moe.engine.calibration.calibration import Sums
from dist_moe.engine.steps.kv_transfer import RowsSink, RowsSource
from dist_moe.engine.steps.worker import RowSink, StepResult, Worker
from dist_moe.engine.watch.accounts import Accounts
from dist_moe.engine.watch.books import Books
from dist_moe.engine.watch.timeline import Timeline
from dist_moe.model.step import Step
from dist_moe.parallel.exchange import HEADER_WORDS, Exchange
from dist_moe.parallel.progress import Phase
from dist_moe.parallel.world import AgreedError

Floats = npt.NDArray[np.float32]
Figures = npt.NDArray[np.float64]
Measurer = Callable[[int], Figures]  # from a MEASURE order's argument to this rank's figures
logger = logging.getLogger(__name__)


class Order(IntEnum):
    """What a header asks the followers to do; header[1] and header[2] are its arguments."""

    STEP = 1  # run the step whose words follow; argument: how many words
    FETCH = 2  # gather the whole logits of a row of the last step; argument: the row
    REPORT = 3  # bring the ranks' notes to rank 0
    STOP = 4  # return from follow()
    COMPARE = 5  # compare the hashes of what all ranks hold alike
    SCRUB = 6  # finish the first pass over the mapped weights, then compare
    MEASURE = 7  # what bench asks of all ranks at once; argument: what and how much
    SAVE = 8  # show rank 0 K and V of a sequence; arguments: its name, how many positions
    RESTORE = 9  # take K and V of a new sequence from rank 0; arguments likewise
    MARK = 11  # mark the parts of steps from now on, or no longer; argument: which
    CALIBRATE = 12  # add up what matrices read from now on, or bring it to rank 0; argument: which
    ROUND = 13  # round a group of matrices, and no other any more; argument: which, or -1
    SAY = 10  # return the text that follows from follow(); argument: its bytes in UTF-8


# Where an order begins, for the watchdog; a scrub takes as long as the weights are large.
_PHASES = {Order.STEP: Phase.EMBEDDING, Order.FETCH: Phase.LOGITS, Order.SCRUB: Phase.SCRUBBING}


class Crew:
    """All ranks of a job, from one rank's side: rank 0 gives orders, the others follow them.

    Attributes:
        books: What the ranks noted of their times and bytes.
        busy: An order is being carried out, or was when an error left it: no other may be given.
    """

    def __init__(
        self,
        worker: Worker,
        exchange: Exchange,
        step_tokens: int,
        measurer: Measurer | None = None,
        partitions: Callable[[int], bool] = lambda tokens: False,
    ) -> None:
        """Prepare the messages.

        Args:
            worker: This rank's part in a step.
            exchange: The collectives.
            step_tokens: Tokens of the largest step, for the size of its words.
            measurer: Does this rank's part of a measurement.
            partitions: On rank 0, whether a step of so many tokens is partitioned by them.
        """
        self._worker = worker
        self._measurer = measurer
        self._partitions = partitions
        self._exchange = exchange
        self._progress = exchange.world.progress
        self._header = np.zeros(HEADER_WORDS, dtype=np.int64)
        self._words = np.empty(8 * step_tokens + 64, dtype=np.int64)
        self.books = Books(exchange, worker.stopwatch, worker.work_L2, worker.node_speeds)
        self.busy = False

    # ---- rank 0 ----

    def run(self, step: Step, sink: RowSink | None = None) -> StepResult:
        """Run a step on all ranks; see Worker.run."""
        if self._partitions(step.tokens):
            step = replace(step, partitioned=True)
        words = step.pack()
        with self._working(Order.STEP):
            self._post(Order.STEP, len(words))
            self._exchange.broadcast(words)
            result = self._run(step, sink)
        assert result is not None
        return result

    def fetch_row(self, row: int) -> Floats:
        """The whole logits of a row of the last step."""
        with self._working(Order.FETCH):
            self._post(Order.FETCH, row)
            logits_NV = self._worker.fetch_row(row)
        assert logits_NV is not None
        logits_V: Floats = logits_NV[0]
        return logits_V

    def report(self) -> Accounts:
        """All ranks' times and bytes up to now."""
        with self._working(Order.REPORT):
            self._post(Order.REPORT)
            self.books.settle()
        return self.books.accounts

    def mark_steps(self, on: bool) -> None:
        """Let all ranks mark the parts of each step, or no longer, for `books.timeline`."""
        with self._working(Order.MARK):
            self._post(Order.MARK, int(on))
            self.books.mark_steps(on)

    def measure(self, argument: int) -> Figures:
        """Let all ranks measure something at once.

        Returns:
            Per rank what the measurer found, float64 [W, n].
        """
        with self._working(Order.MEASURE):
            self._post(Order.MEASURE, argument)
            ranks_Wn = self._measure(argument)
        assert ranks_Wn is not None
        return ranks_Wn

    def begin_calibration(self) -> None:
        """Let all ranks add up what the matrices of each step read; see Calibrator."""
        with self._working(Order.CALIBRATE):
            self._post(Order.CALIBRATE, 1)
            self._worker.calibrator.begin()

    def end_calibration(self) -> Sums:
        """What all ranks have added up since `begin_calibration`."""
        with self._working(Order.CALIBRATE):
            self._post(Order.CALIBRATE, 0)
            sums = self._worker.calibrator.end()
        assert sums is not None
        return sums

    def round_weights(self, group: int) -> None:
        """Let all ranks round a group of matrices, and no other any more; see Rounder."""
        with self._working(Order.ROUND):
            self._post(Order.ROUND, group)
            self._worker.rounder.round(group)

    def save(self, sequence: int, positions: int, sink: RowsSink) -> None:
        """Fetch K and V of a sequence from all ranks; see KvTransfer.gather."""
        with self._working(Order.SAVE):
            self._post(Order.SAVE, sequence, positions)
            self._worker.kv.gather(sequence, positions, sink)

    def restore(self, sequence: int, positions: int, source: RowsSource) -> None:
        """Give all ranks K and V of a new sequence; see KvTransfer.scatter."""
        with self._working(Order.RESTORE):
            self._post(Order.RESTORE, sequence, positions)
            self._worker.kv.scatter(sequence, positions, source)

    def compare(self) -> None:
        """Compare the ranks; see Health.compare."""
        with self._working(Order.COMPARE):
            self._post(Order.COMPARE)
            self._worker.health.compare()

    def finish_scrub(self) -> None:
        """Check every mapped unit at least once; see Health.finish_scrub."""
        with self._working(Order.SCRUB):
            self._post(Order.SCRUB)
            self._worker.health.finish_scrub()

    def say(self, text: str) -> None:
        """Let the followers return with a text."""
        data = np.frombuffer(text.encode(), np.uint8).copy()
        with self._working(Order.SAY):
            self._post(Order.SAY, len(data))
            self._exchange.broadcast(data)

    def stop(self) -> None:
        """Let the followers return."""
        with self._working(Order.STOP):
            self._post(Order.STOP)

    # ---- the other ranks ----

    def follow(self) -> str | None:
        """Do what rank 0 orders until it says something, which is returned, or stops."""
        while True:
            self._exchange.wait_step(self._header)
            order, argument = Order(int(self._header[0])), int(self._header[1])
            if order is Order.STOP:
                return None
            with self._working(order):
                if order is Order.SAY:
                    return self._hear(argument)
                self._obey(order, argument)

    def _hear(self, length: int) -> str:
        data = np.empty(length, np.uint8)
        self._exchange.broadcast(data)
        return data.tobytes().decode()

    def _obey(self, order: Order, argument: int) -> None:
        if order is Order.STEP:
            self._run(Step.unpack(self._receive(argument)), None)
        elif order is Order.FETCH:
            self._worker.fetch_row(argument)
        elif order is Order.REPORT:
            self.books.settle()
        elif order is Order.MARK:
            self.books.mark_steps(bool(argument))
        elif order is Order.COMPARE:
            self._worker.health.compare()
        elif order is Order.SCRUB:
            self._worker.health.finish_scrub()
        elif order is Order.MEASURE:
            self._measure(argument)
        elif order is Order.ROUND:
            self._worker.rounder.round(argument)
        elif order is Order.CALIBRATE and argument:
            self._worker.calibrator.begin()
        elif order is Order.CALIBRATE:
            self._worker.calibrator.end()
        elif order is Order.SAVE:
            self._worker.kv.gather(argument, int(self._header[2]), None)
        elif order is Order.RESTORE:
            self._worker.kv.scatter(argument, int(self._header[2]), None)

    # ---- all ranks ----

    @contextmanager
    def _working(self, order: Order) -> Iterator[None]:
        """Let the watchdog count while an order is carried out; an error leaves the crew busy."""
        assert not self.busy
        self.busy = True
        self._progress.begin(_PHASES.get(order, Phase.REPORTING))
        try:
            yield
        except AgreedError:  # all ranks have left the order with it
            self.busy = False
            raise
        self._progress.end()
        self.busy = False

    def _post(self, order: Order, argument: int = 0, second: int = 0) -> None:
        self._header[:3] = (order, argument, second)
        self._exchange.post_step(self._header)

    def _receive(self, count: int) -> npt.NDArray[np.int64]:
        if count > len(self._words):  # many released sequences at once
            self._words = np.empty(count, dtype=np.int64)
        words = self._words[:count]
        self._exchange.broadcast(words)
        return words

    def _run(self, step: Step, sink: RowSink | None) -> StepResult | None:
        self.books.begin_step(step.tokens, len(step.slices))
        result = self._worker.run(step, sink)
        self.books.end_step()
        if logger.isEnabledFor(logging.DEBUG):
            what = (step.tokens, len(step.slices), *self._exchange.ledger.last_step_ms())
            logger.debug("step of %d tokens, %d sequences: %.2f ms, of which %.2f ms in exchanges", *what)
        return result

    def _measure(self, argument: int) -> Figures | None:
        assert self._measurer is not None
        return self._exchange.gather_equal(self._measurer(argument))


@contextmanager
def recorded_timeline(crew: Crew) -> Iterator[Timeline]:
    """Keep a timeline of the steps inside the block, on rank 0; it is complete after the block."""
    timeline = crew.books.timeline = Timeline()
    crew.mark_steps(True)
    try:
        yield timeline
    except AgreedError:
        raise  # the other ranks are no longer there
    except BaseException:
        if not crew.busy:
            crew.mark_steps(False)
        raise
    else:
        crew.mark_steps(False)
    finally:
        crew.books.timeline = None
