"""Connecting a command to the Ray cluster that it speaks of."""

import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated

import typer

from weightstream.errors import ClusterError

Address = Annotated[
    str,
    typer.Option(metavar="ADDRESS", help="The Ray cluster; `auto` finds the one of this machine."),
]


_PROBE_S = 5.0


@contextmanager
def connected(address: str) -> Iterator[None]:
    """Be a driver of the cluster within the block; raises `ClusterError` when there is none."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # else Ray warns of it
    _probe(address)
    import ray

    try:
        ray.init(address=address, log_to_driver=False, logging_level=logging.ERROR)
    except (ConnectionError, RuntimeError, ValueError) as error:
        cause = str(error).strip().partition("\n")[0]
        raise ClusterError(f"no Ray cluster at {address}: {cause}") from error
    try:
        yield
    finally:
        ray.shutdown()


def _probe(address: str) -> None:
    """Raise `ClusterError` where nobody listens: Ray itself would try for over a minute."""
    host, _, port = address.rpartition(":")
    if "/" in host or not host or not port.isdecimal():
        return  # `auto`, `local`, `ray://...`
    try:
        socket.create_connection((host.strip("[]"), int(port)), _PROBE_S).close()
    except (OSError, OverflowError) as error:
        raise ClusterError(f"no Ray cluster at {address}: {error}") from error
