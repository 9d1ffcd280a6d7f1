"""What a person sees while an evaluation goes on, and how it ends when a signal came."""

import time

from mocosfl_jax.run.progress import SECONDS_BETWEEN_LINES
from mocosfl_jax.run.stopping import StopRequest


class Progress:
    """Called before each piece of the work: a line now and then, or the end."""

    def __init__(self, stop: StopRequest):
        self._stop = stop
        self._last_line = time.monotonic()
        self.begin("", 0)

    def begin(self, what: str, pieces: int) -> None:
        """Something starts that takes so many pieces."""
        self._what, self._pieces, self._begun = what, pieces, 0

    def __call__(self) -> None:
        """Raises: StopRequested."""
        self._stop.check()
        self._begun += 1
        now = time.monotonic()
        if now - self._last_line > SECONDS_BETWEEN_LINES:
            self._last_line = now
            print(f"{self._what} {self._begun} of {self._pieces}", flush=True)
