"""Which Ray this needs."""

_LEAST = (2, 60)
"""Serve migrates replicas off draining nodes since 2.60, and compacts since then."""


def too_old() -> str:
    """Say that this Ray is too old for either engine; empty when it is not."""
    import ray

    if tuple(int(part) for part in ray.__version__.split(".")[:2] if part.isdigit()) < _LEAST:
        return f"it needs Ray 2.60 or newer, this is {ray.__version__}"
    return ""
