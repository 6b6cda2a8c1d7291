"""Runs nginx as a static S3 endpoint that is never the bottleneck, and reads what it sent.

Two workers with sendfile from a warm page cache; ranges, ETag and If-Match are nginx's own,
listings come from files written beforehand (`listing.py`). It does not check signatures. Every
answer leaves a line in the access log: bytes on the wire and the time of the first request are
taken from there.
"""

import os
import shutil
import socket
import subprocess
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from weightstream.bench.certificates import Certificates
from weightstream.bench.errors import BenchError
from weightstream.bench.listing import Entry, listing_xml, listings, query_pattern, scan
from weightstream.demo.processes import start, stop

_READY_S = 10.0
_WORKERS = 2
_LISTINGS = "/.listings/"  # what the log names when a query was answered
_NOTHING = "/.listings/none"  # the answer for every prefix without objects
_DATA_SUFFIXES = (".safetensors", ".tensors")

_CONFIG = """
{user}worker_processes {workers};
worker_rlimit_nofile 8192;
pid {folder}/nginx.pid;
error_log {folder}/error.log warn;
events {{ worker_connections 4096; }}
http {{
  default_type application/octet-stream;
  log_format sample '$msec $request_time $status $body_bytes_sent $bytes_sent $request_method $uri';
  access_log {folder}/access.log sample;
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  sendfile on; tcp_nopush on; tcp_nodelay on; etag on; server_tokens off;
  keepalive_timeout 600; keepalive_requests 10000000;
  open_file_cache max=1000 inactive=600s;
  ssl_session_cache shared:tls:4m;
  map "$arg_delimiter:$arg_prefix" $listing {{
    default none;
{answers}
  }}
  server {{
    listen {address}:{port} backlog=1024 reuseport;
    listen {address}:{tls_port} ssl backlog=1024 reuseport;
    ssl_certificate {certificate}; ssl_certificate_key {key};
    root {root};
    location ~ ^/{bucket}/?$ {{
      default_type application/xml;
      if ($args ~ "(^|&)location") {{ rewrite ^ /.listings/location last; }}
      rewrite ^ /.listings/$listing last;
    }}
    location /.listings/ {{ internal; root {folder}; default_type application/xml; }}
    location / {{ try_files $uri =404; }}
    error_page 404 /.listings/missing;
  }}
}}
"""

_MISSING = (
    '<?xml version="1.0" encoding="UTF-8"?>\n<Error><Code>NoSuchKey</Code>'
    "<Message>The specified key does not exist.</Message></Error>\n"
)
_LOCATION = (
    '<?xml version="1.0" encoding="UTF-8"?>\n<LocationConstraint '
    'xmlns="http://s3.amazonaws.com/doc/2006-03-01/">us-east-1</LocationConstraint>\n'
)


@dataclass(frozen=True, slots=True)
class Traffic:
    """What the server sent for one sample."""

    wire_bytes: int
    body_bytes: int
    requests: int
    first_request_at_s: float
    lists: int = 0  # requests for a listing
    most_lists: int = 0  # for one and the same of them
    data_bytes: int = 0  # of objects: body_bytes without listings and errors


@dataclass(frozen=True, slots=True)
class Server:
    """A running nginx."""

    address: str
    port: int
    tls_port: int
    bucket: str
    ca_bundle: Path
    log: Path
    version: str

    def endpoint(self, tls: bool) -> str:
        """Return what AWS_ENDPOINT_URL shall be."""
        return (
            f"https://{self.address}:{self.tls_port}"
            if tls
            else f"http://{self.address}:{self.port}"
        )

    def mark(self) -> int:
        """Return the present end of the log, for `traffic`."""
        return self.log.stat().st_size if self.log.exists() else 0

    def traffic(self, mark: int) -> Traffic:
        """Return what was sent since `mark`, once the log has been quiet for 50 ms."""
        size = -1
        while size != (size := self.mark()):
            time.sleep(0.05)
        with self.log.open() as file:
            file.seek(mark)
            return parse_log(file.read().splitlines())


def parse_log(lines: Sequence[str]) -> Traffic:
    """Sum up access log lines; the first request for model data starts the clock of the link."""
    wire = body = data = 0
    first = 0.0
    lists: Counter[str] = Counter()
    for line in lines:
        ended, took, status, body_sent, sent, method, uri = line.split(" ", 6)
        wire += int(sent)
        body += int(body_sent) if method == "GET" else 0
        data += int(body_sent) if method == "GET" and not uri.startswith(_LISTINGS) else 0
        if method == "GET" and uri.endswith(_DATA_SUFFIXES):
            began = float(ended) - float(took)
            first = min(first or began, began)
        if uri.startswith(_LISTINGS) and status == "200":
            lists[uri] += 1
    most = max((count for uri, count in lists.items() if uri != _NOTHING), default=0)
    return Traffic(wire, body, len(lines), first, lists.total(), most, data)


@contextmanager
def nginx(
    root: Path,
    bucket: str,
    folder: Path,
    certificates: Certificates,
    address: str = "127.0.0.1",
    prefix: Sequence[str] = (),
    *,
    list_keys: bool = True,
) -> Iterator[Server]:
    """Serve the folder `root/bucket`; `prefix` starts it elsewhere (`ip netns exec NAME`).

    `list_keys=False` is for buckets of very many objects: keys are no prefixes then.
    """
    program = shutil.which("nginx") or shutil.which("nginx", path="/usr/sbin")
    if program is None:
        raise BenchError("nginx is missing: apt-get install nginx-light")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    port, tls_port = _free_ports(2)
    answers = _write_listings(folder / ".listings", bucket, scan(root / bucket), list_keys)
    config = folder / "nginx.conf"
    config.write_text(
        _CONFIG.format(
            user="user root;\n" if os.geteuid() == 0 else "",
            workers=_WORKERS,
            folder=folder,
            answers=answers,
            address=address,
            port=port,
            tls_port=tls_port,
            certificate=certificates.certificate,
            key=certificates.key,
            root=root,
            bucket=bucket,
        )
    )
    command = [*prefix, program, "-p", str(folder), "-c", str(config), "-g", "daemon off;"]
    process = start(command, stderr=(folder / "stderr.log"))
    try:
        _wait_for(folder / "nginx.pid", process, folder / "stderr.log")
        version = subprocess.run([program, "-v"], capture_output=True, text=True, check=True).stderr
        yield Server(
            address,
            port,
            tls_port,
            bucket,
            certificates.authority,
            folder / "access.log",
            version.strip().removeprefix("nginx version: "),
        )
    finally:
        stop(process)


def _write_listings(folder: Path, bucket: str, entries: tuple[Entry, ...], keys: bool) -> str:
    """Write one file per answer; return the lines of nginx's map from query to file."""
    folder.mkdir()
    (folder / "missing").write_text(_MISSING)
    (folder / "location").write_text(_LOCATION)
    (folder / "none").write_text(listing_xml(bucket, (), "", ""))
    lines = []
    for number, answer in enumerate(listings(bucket, entries, keys=keys)):
        (folder / f"{number}.xml").write_text(answer.body)
        pattern = f"^{query_pattern(answer.delimiter)}:{query_pattern(answer.prefix)}$"
        lines.append(f'    "~{pattern}" {number}.xml;')
    return "\n".join(lines)


def _free_ports(count: int) -> list[int]:
    sockets = [socket.socket() for _ in range(count)]
    with suppress(OSError):
        for one in sockets:
            one.bind(("127.0.0.1", 0))
    ports = [one.getsockname()[1] for one in sockets]
    for one in sockets:
        one.close()
    return ports


def _wait_for(pid_file: Path, process: "subprocess.Popen[bytes]", errors: Path) -> None:
    deadline = time.monotonic() + _READY_S
    while not (pid_file.exists() and pid_file.read_text().strip()):
        if process.poll() is not None or time.monotonic() > deadline:
            raise BenchError(f"nginx did not start: {errors.read_text().strip()[-300:]}")
        time.sleep(0.02)
