"""Signals that ask a run to stop: it finishes its step, saves, and exits with 143.

before the loop   (data build, start)    stops at once, there is nothing to save
in the loop       (step, boundary)       is noted; the loop looks after each step
"""

import signal
import threading

from .errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # preemption, as SLURM, Kubernetes and torchrun tell it


class _StopAtOnce(BaseException):
    """What a signal raises wherever the program is; no `except Exception` on the way takes it for its own."""


class Interruption:
    """Catches the signals while it is entered, from the main thread; elsewhere it catches none.

    Attributes:
        requested: whether one has come.
        patient: whether it is only noted, rather than ending what is entered with `Stopped` at once.
    """

    def __init__(self):
        self.requested, self.patient, self.previous = False, False, {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, kind, exception, traceback) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)
        if isinstance(exception, _StopAtOnce):
            raise Stopped(143, str(exception)) from None

    def _receive(self, number: int, frame) -> None:
        self.requested = True
        if not self.patient:
            raise _StopAtOnce(f"stopped by {signal.Signals(number).name} before the first step")
