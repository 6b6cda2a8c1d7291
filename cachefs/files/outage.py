"""Whether the origin is silent, and when to ask it again. Guarded by the tree's lock.

    answering ──silence──> silent (warned once) ──any answer──> answering

While it is silent, folders that were listed before are shown as they were, at once; one listing
at a time asks whether it is back. Otherwise each `ls` of an unreachable bucket would wait for a
connection timeout.
"""

from math import inf

from weightstream.errors import CredentialsError, WeightstreamError

FIRST_RETRY_S = 2.0
LONGEST_RETRY_S = 30.0


def is_silence(error: BaseException) -> bool:
    """Tell whether an error says nothing about the folder, only that nobody answered for it.

    Credentials that are missing or expired are this side's trouble: a mount that outlives its
    token must not lose its files.
    """
    return isinstance(error, WeightstreamError) and (
        error.transient or isinstance(error, CredentialsError)
    )


class Outage:
    """The state of one origin."""

    def __init__(self) -> None:
        self.is_on = False
        self.retry_at_s = -inf
        self._wait_s = FIRST_RETRY_S

    def failed(self, now_s: float) -> bool:
        """Note that nobody answered; return whether this is the first time."""
        first, self.is_on = not self.is_on, True
        if first:
            self._wait_s = FIRST_RETRY_S
        if now_s >= self.retry_at_s:  # several that fail at once are one failure
            self.retry_at_s = now_s + self._wait_s
            self._wait_s = min(self._wait_s * 2, LONGEST_RETRY_S)
        return first

    def answered(self) -> bool:
        """Note an answer, whatever it says; return whether it ends an outage."""
        ended, self.is_on = self.is_on, False
        self.retry_at_s = -inf
        return ended
