"""What a supervisor is started with: a job from the command line, or another one's whole state.

Both travel as JSON in a memfd, whose number is in argv: the URI may hold a password, and argument
lists are public on a machine.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from weightstream.cachefs.fuse.mounts import MountSpec, known_fields
from weightstream.cachefs.fuse.supervisor.children import python
from weightstream.cachefs.fuse.supervisor.server_process import Limits

SUPERVISOR = "weightstream.cachefs.fuse.supervisor"


@dataclass(frozen=True, slots=True)
class Job:
    """What the command line asks a supervisor to do."""

    spec: MountSpec
    run: str
    source: str  # the URI without secrets, as records, logs and /proc/mounts show it
    log: str = ""
    report: int = -1  # the pipe on which whoever waits for the mount hears of it
    program: tuple[str, ...] = ()  # another server, for tests
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True, slots=True)
class Handover:
    """What a supervisor that executes its successor leaves to it; the numbers are descriptors."""

    lock: int
    listener: int
    device: int
    init: Mapping[str, Any]
    restarts: int
    mounted_at_s: float
    client: int = -1  # who asked for the upgrade
    server_pid: int = 0
    server_channel: int = -1
    received: str = ""  # of the server, latin-1
    unsent: str = ""


def command(job: Job, handover: Handover | None = None, program: str = "") -> tuple[list[str], int]:
    """Return the command of a supervisor and the descriptor that it must inherit."""
    descriptor = os.memfd_create("weightstream-job", os.MFD_CLOEXEC)
    with os.fdopen(descriptor, "w", closefd=False) as file:
        json.dump({"job": asdict(job), "handover": handover and asdict(handover)}, file)
    os.lseek(descriptor, 0, os.SEEK_SET)
    # The directory is there for whoever reads `ps`.
    line = python(SUPERVISOR, "--job-fd", str(descriptor), job.spec.directory)
    return [program or line[0], *line[1:]], descriptor


def read(descriptor: int) -> tuple[Job, Handover | None]:
    """Return what `command` wrote, and close the descriptor."""
    with os.fdopen(descriptor) as file:
        document = json.load(file)
    job, handover = document["job"], document["handover"]
    job["spec"] = MountSpec.from_json(job["spec"])
    job["limits"] = Limits(**known_fields(Limits, job["limits"]))
    job["program"] = tuple(job["program"])
    known = Job(**known_fields(Job, job))
    return known, None if handover is None else Handover(**known_fields(Handover, handover))
