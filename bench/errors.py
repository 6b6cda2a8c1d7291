"""The one error of the benchmark's own."""

from weightstream.errors import UsageError


class BenchError(UsageError):
    """The benchmark cannot run here, or not so; the message says what is missing."""
