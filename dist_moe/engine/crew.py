"""Orders from rank 0 to all ranks: each is one small header, then, for a step, its words."""

from __future__ import annotations

import logging
import time
from enum import IntEnum

import numpy as np
import numpy.typing as npt

from dist_moe.engine.worker import RowSink, StepResult, Worker
from dist_moe.model.step import Step
from dist_moe.parallel.exchange import HEADER_WORDS, Exchange

Floats = npt.NDArray[np.float32]
logger = logging.getLogger(__name__)


class Order(IntEnum):
    """What a header asks the followers to do; header[1] is its argument."""

    STEP = 1  # run the step whose words follow; argument: how many words
    FETCH = 2  # gather the whole logits of a row of the last step; argument: the row
    REPORT = 3  # gather the ranks' ledgers
    STOP = 4  # return from follow()


class Crew:
    """All ranks of a job, from one rank's side: rank 0 gives orders, the others follow them.

    Attributes:
        busy: On rank 0, an order is being carried out, or was when an error left it: no other may be given.
    """

    def __init__(self, worker: Worker, exchange: Exchange, step_tokens: int) -> None:
        """Prepare the messages.

        Args:
            worker: This rank's part in a step.
            exchange: The collectives.
            step_tokens: Tokens of the largest step, for the size of its words.
        """
        self._worker = worker
        self._exchange = exchange
        self._header = np.zeros(HEADER_WORDS, dtype=np.int64)
        self._words = np.empty(8 * step_tokens + 64, dtype=np.int64)
        self._step_s = 0.0
        self._collective_s = 0.0
        self.busy = False

    # ---- rank 0 ----

    def run(self, step: Step, sink: RowSink | None = None) -> StepResult:
        """Run a step on all ranks; see Worker.run."""
        words = step.pack()
        self._post(Order.STEP, len(words))
        self._exchange.broadcast(words)
        result = self._run(step, sink)
        assert result is not None
        self.busy = False
        return result

    def fetch_row(self, row: int) -> Floats:
        """The whole logits of a row of the last step."""
        self._post(Order.FETCH, row)
        logits_NV = self._worker.fetch_row(row)
        assert logits_NV is not None
        self.busy = False
        logits_V: Floats = logits_NV[0]
        return logits_V

    def report(self) -> npt.NDArray[np.float64]:
        """Per rank: seconds in steps, seconds in collectives inside them, bytes sent."""
        self._post(Order.REPORT)
        ranks_R3 = self._report()
        assert ranks_R3 is not None
        self.busy = False
        return ranks_R3

    def stop(self) -> None:
        """Let the followers return."""
        self._post(Order.STOP)

    # ---- the other ranks ----

    def follow(self) -> None:
        """Do what rank 0 orders until it stops."""
        while True:
            self._exchange.wait_step(self._header)
            order, argument = int(self._header[0]), int(self._header[1])
            if order == Order.STEP:
                self._run(Step.unpack(self._receive(argument)), None)
            elif order == Order.FETCH:
                self._worker.fetch_row(argument)
            elif order == Order.REPORT:
                self._report()
            else:
                return

    # ---- all ranks ----

    def _post(self, order: Order, argument: int = 0) -> None:
        assert not self.busy
        self.busy = True
        self._header[:2] = (order, argument)
        self._exchange.post_step(self._header)

    def _receive(self, count: int) -> npt.NDArray[np.int64]:
        if count > len(self._words):  # many released sequences at once
            self._words = np.empty(count, dtype=np.int64)
        words = self._words[:count]
        self._exchange.broadcast(words)
        return words

    def _run(self, step: Step, sink: RowSink | None) -> StepResult | None:
        started_s, collective_s = time.perf_counter(), self._exchange.ledger.seconds
        result = self._worker.run(step, sink)
        elapsed_s = time.perf_counter() - started_s
        collective_s = self._exchange.ledger.seconds - collective_s
        self._step_s += elapsed_s
        self._collective_s += collective_s
        if logger.isEnabledFor(logging.DEBUG):
            what = (step.tokens, len(step.slices), elapsed_s * 1e3, collective_s * 1e3)
            logger.debug("step of %d tokens, %d sequences: %.2f ms, of which %.2f ms in exchanges", *what)
        return result

    def _report(self) -> npt.NDArray[np.float64] | None:
        own = np.array([self._step_s, self._collective_s, self._exchange.ledger.sent_bytes], dtype=np.float64)
        return self._exchange.gather_equal(own)
