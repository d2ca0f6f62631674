"""Signals that ask a run to stop: it finishes its step, saves, and exits with 143.

before the loop   (data, start)       stops at once, since there is nothing to save
in the loop       (step, boundary)    sets a flag that the loop reads after each step
"""

import signal
import threading
from types import FrameType, TracebackType

from ..errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # how SLURM, Kubernetes and torchrun announce preemption


class _StopAtOnce(BaseException):
    """Raised by a signal wherever the program is; no `except Exception` on the way catches it."""


class StopSignals:
    """A context that catches the signals. Only the main thread can; in others it does nothing."""

    def __init__(self) -> None:
        self.received = False
        self.patient = False  # whether a signal only sets `received`, rather than ending the context with `Stopped`
        self.previous: dict = {}

    def __enter__(self) -> "StopSignals":
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(
        self, kind: type[BaseException] | None, exception: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if isinstance(exception, _StopAtOnce):
            raise Stopped(143, str(exception)) from None

    def _receive(self, number: int, frame: FrameType | None) -> None:
        self.received = True
        if not self.patient:
            raise _StopAtOnce(f"by {signal.Signals(number).name} before the first step")
