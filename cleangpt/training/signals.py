"""Signals that ask a run to stop: it finishes its step, saves, and exits with 143, or 130 after Ctrl-C.

before the loop   (data, start)       stops at once, since there is nothing to save
in the loop       (step, boundary)    sets a flag that the loop reads after each step; a second Ctrl-C ends it at once
"""

import signal
import threading
import time
from types import FrameType

from ..errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)  # SLURM, Kubernetes and torchrun announce preemption; Ctrl-C
ECHO_S = 1.0  # the terminal sends Ctrl-C to all processes, and torchrun passes it on to them as well


class _StopAtOnce(BaseException):
    """Raised by a signal wherever the program is; no `except Exception` on the way catches it."""


class StopSignals:
    """A context that catches the signals. Only the main thread can; in others it does nothing."""

    def __init__(self) -> None:
        self.received = False
        self.patient = False  # whether a signal only sets `received`, rather than ending the context with `Stopped`
        self.exit_code = 143
        self.interrupted = 0.0  # when Ctrl-C came, `time.monotonic`
        self.previous: dict = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, kind: type | None, exception: BaseException | None, traceback: object) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if isinstance(exception, _StopAtOnce):
            raise Stopped(self.exit_code, str(exception)) from None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        now, self.received = time.monotonic(), True
        if number == signal.SIGINT:
            if self.interrupted and now > self.interrupted + ECHO_S:
                raise KeyboardInterrupt
            self.interrupted = self.interrupted or now
            self.exit_code = 130
        if not self.patient:
            raise _StopAtOnce(f"by {signal.Signals(number).name} before the first step")
