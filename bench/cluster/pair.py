"""One pair of nodes over the loopback device: the exchange, plain and with TLS, and libtorrent.

`python -m weightstream.bench.cluster.pair [--repeat N]` prints MB/s and CPU seconds a GB of both
ends together. One end has 1 GiB in memory, the other gets it into memory: the exchange into its
reader's, libtorrent into a file under /dev/shm. Both check it: by BLAKE3, by SHA-256 of pieces. The
bench hashes the exchange's once more, which is not counted.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import Any

import libtorrent as lt

from weightstream.bench.certificates import make_certificates
from weightstream.bench.cluster.node import Job
from weightstream.bench.cluster.run import environment, place
from weightstream.bench.errors import BenchError
from weightstream.bench.servers import nginx

_SIZE_BYTES = 1 << 30
_FIRST_PORT = 17470
_TICKS = os.sysconf("SC_CLK_TCK")


class End:
    """A process that says `ready`, is told `go`, and answers with a line."""

    def __init__(self, module: str, arguments: Sequence[str], env: dict[str, str]) -> None:
        command = [sys.executable, "-m", f"weightstream.bench.cluster.{module}", *arguments]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=env, text=True
        )
        if self._line() != "ready":
            raise BenchError(f"{module} did not start")

    def go(self) -> str:
        """Have it begin; return what it says when it is done."""
        self.tell("go")
        return self._line()

    def tell(self, word: str) -> None:
        """Send a line."""
        assert self.process.stdin is not None
        self.process.stdin.write(word + "\n")
        self.process.stdin.flush()

    def cpu_s(self) -> float:
        """Return the CPU seconds that it has taken so far."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(") ")[2].split()
        return (int(fields[11]) + int(fields[12])) / _TICKS

    def close(self) -> None:
        """End it."""
        self.process.kill()
        self.process.wait(10)

    def _line(self) -> str:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            raise BenchError("an end died")
        return line.strip()


def exchange(work: Path, env: dict[str, str], encryption: str) -> tuple[float, float]:
    """Return MB/s and CPU seconds a GB of one exchange that loads from another."""
    ports = _FIRST_PORT, _FIRST_PORT + 1
    with tempfile.TemporaryDirectory(dir=work) as folder, ExitStack() as stack:
        ends = []
        for port in ports:
            settings: dict[str, Any] = {
                "store": f"{folder}/{port}",
                "peer_listen": f"127.0.0.1:{port}",
                "peers": ",".join(f"127.0.0.1:{other}" for other in ports),
                "peer_encryption": encryption,
                "cluster_secret_file": str(work / "secret"),
                "store_min_free_bytes": 0,
                "memory_budget": 3 << 30,
            }
            job = Job("s3://models/model.safetensors", settings)
            ends.append(End("node", [json.dumps(asdict(job))], env))
            stack.callback(ends[-1].close)
        holder, loader = ends
        holder.go()
        before_s = holder.cpu_s()
        loaded = json.loads(loader.go())  # counts its own CPU, up to its last byte: then it hashes
        if loaded["error"]:
            raise BenchError(loaded["error"])
        return _measured(loaded["seconds"], holder.cpu_s() - before_s + loaded["cpu_s"])


def torrent(work: Path, file: Path, described: Path) -> tuple[float, float]:
    """Return MB/s and CPU seconds a GB of one libtorrent session that loads from another."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder, ExitStack() as stack:
        ports = str(_FIRST_PORT + 2), str(_FIRST_PORT + 3)
        env = dict(os.environ)
        seed = End("torrent", ["seed", str(described), str(file.parent), ports[0]], env)
        stack.callback(seed.close)
        leech = End("torrent", ["leech", str(described), folder, ports[1], ports[0]], env)
        stack.callback(leech.close)
        before_s = seed.cpu_s() + leech.cpu_s()
        seconds = float(leech.go())
        return _measured(seconds, seed.cpu_s() + leech.cpu_s() - before_s)


def _measured(seconds: float, cpu_s: float) -> tuple[float, float]:
    return _SIZE_BYTES / 1e6 / seconds, cpu_s / (_SIZE_BYTES / 1e9)


def _describe(file: Path, into: Path) -> None:
    files = lt.file_storage()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        lt.add_files(files, str(file))
        made = lt.create_torrent(files, 4 << 20, lt.create_torrent.v2_only)
    lt.set_piece_hashes(made, str(file.parent))
    into.write_bytes(lt.bencode(made.generate()))


def main() -> None:
    """Run each in turn, and print medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeat", type=int, default=3)
    repeat = parser.parse_args().repeat
    found: dict[str, list[tuple[float, float]]] = {}
    with place(_SIZE_BYTES, "/dev/shm") as where:
        (where.work / "secret").write_text(os.urandom(32).hex())
        (where.work / "secret").chmod(0o600)
        file, described = where.root / "models" / "model.safetensors", where.work / "torrent"
        _describe(file, described)
        certificates = make_certificates(where.work / "tls", ("127.0.0.1",))
        with nginx(where.root, "models", where.work / "nginx", certificates) as server:
            env = environment(server)
            for _ in range(repeat):
                for name, measured in (
                    ("exchange, plain", exchange(where.work, env, "off")),
                    ("exchange, TLS", exchange(where.work, env, "on")),
                    ("libtorrent", torrent(where.work, file, described)),
                ):
                    found.setdefault(name, []).append(measured)
                    print(f"{name}: {measured[0]:.0f} MB/s, {measured[1]:.2f} CPU s/GB", flush=True)
    for name, runs in found.items():
        rate, cpu = (statistics.median(run[i] for run in runs) for i in (0, 1))
        print(f"{name}, median: {rate:.0f} MB/s, {cpu:.2f} CPU s/GB")


if __name__ == "__main__":
    main()
