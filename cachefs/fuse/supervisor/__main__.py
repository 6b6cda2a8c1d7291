"""Main of the process behind a mount that does not die; what it does is in `supervision.py`.

`python -m weightstream.cachefs.fuse.supervisor --job-fd N DIRECTORY`, with the job in the
descriptor. The directory is there for whoever reads `ps`.
"""

import argparse
import os
import signal
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from weightstream.cachefs.fuse.mounts import RunDirectory
from weightstream.cachefs.fuse.supervisor.handover import Job, read
from weightstream.cachefs.fuse.supervisor.loop import Loop
from weightstream.cachefs.fuse.supervisor.reporting import Reporter
from weightstream.cachefs.fuse.supervisor.supervision import Supervisor
from weightstream.cachefs.fuse.supervisor.upgrade import resumed
from weightstream.errors import MountError


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a mount to its end; return the exit code."""
    parser = argparse.ArgumentParser(prog="weightstream-supervisor")
    parser.add_argument("--job-fd", type=int, required=True)
    parser.add_argument("--check", action="store_true", help="only see whether it would run")
    parser.add_argument("directory")
    options = parser.parse_args(arguments)
    job, handover = read(options.job_fd)
    if options.check:
        return 0
    if job.log and handover is None:
        _become_daemon(job)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # ignored, children could not be waited for
    loop = Loop()
    if handover is not None:
        resumed(job, handover, loop)
    elif not _begin(job, loop):
        return MountError.exit_code
    return loop.run()


def _become_daemon(job: Job) -> None:
    """Keep no file system busy, and nothing open that the shell had: a pipe, somebody's lock."""
    os.chdir("/")
    for name in os.listdir("/proc/self/fd"):
        if int(name) > 2 and int(name) != job.report:
            with suppress(OSError):  # the descriptor of the listing itself
                os.close(int(name))


def _begin(job: Job, loop: Loop) -> bool:
    lock = RunDirectory(Path(job.run)).lock(job.spec.directory)
    if lock is None:
        error = f"{job.spec.directory} is being mounted, or is mounted already"
        Reporter(loop, job.report, lambda: None).failed(error, MountError.exit_code)
        return False
    Supervisor(job, loop, lock).begin()
    return True


if __name__ == "__main__":
    raise SystemExit(main())
