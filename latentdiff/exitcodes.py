"""With which exit code does a training run end, when it does not end well?

69 to 75 are those of sysexits.h, so that a scheduler can tell what is worth another try.
"""

from __future__ import annotations

USERS_MISTAKE = 2  # a wrong option, config or file: change it
STALLED = 69  # EX_UNAVAILABLE: a rank came to no step any more; start again
DIVERGED = 70  # EX_SOFTWARE: too many steps in a row could not be taken; change the config
SAVE_FAILED = 74  # EX_IOERR: the last checkpoint could not be written; make room, start again
PREEMPTED = 75  # EX_TEMPFAIL: asked to stop; a valid checkpoint is there; start again
INTERRUPTED = 130  # what shells call Ctrl-C


class RunEnded(Exception):
    """A run that ends before its time.

    Attributes:
        code: the process's exit code.
    """

    def __init__(self, code: int, message: str) -> None:
        super().__init__(message)
        self.code = code
