"""Signals that ask a run to stop: it finishes its step, saves, and exits with 143.

before the loop   (data build, start)    stops at once, there is nothing to save
in the loop       (step, boundary)       is noted; the loop looks after each step
"""

import signal
import threading

from .errors import Stopped

SIGNALS = (signal.SIGTERM, signal.SIGUSR1)  # preemption, as SLURM, Kubernetes and torchrun tell it


class Interruption:
    """Catches the signals while it is entered, from the main thread; elsewhere it catches none.

    Attributes:
        requested: whether one has come.
        patient: whether it is only noted, rather than raised as `Stopped` at once.
    """

    def __init__(self):
        self.requested, self.patient, self.previous = False, False, {}

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            self.previous = {number: signal.signal(number, self._receive) for number in SIGNALS}
        return self

    def __exit__(self, *exception) -> None:
        for number, handler in self.previous.items():
            signal.signal(number, handler)

    def _receive(self, number: int, frame) -> None:
        self.requested = True
        if not self.patient:
            raise Stopped(143, f"stopped by {signal.Signals(number).name} before the first step")
