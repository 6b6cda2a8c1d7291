"""Servers for the origin's tests: nginx, and scripts on raw sockets."""

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.cachefs.origin.servers import Handler, RawServer
from tests.kit.s3 import free_port

from weightstream.settings import Settings


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    return Settings(store=tmp_path / "store", connect_timeout_s=2.0, stall_timeout_s=1.0)


@pytest.fixture
def raw_server() -> Iterator[Callable[[Handler], RawServer]]:
    started: list[RawServer] = []

    def start(handler: Handler) -> RawServer:
        started.append(RawServer(handler))
        return started[-1]

    yield start
    for server in started:
        server.close()


@dataclass(frozen=True)
class WebServer:
    url: str
    folder: Path


NGINX = """
{user} worker_processes 1; daemon off; pid {folder}/nginx.pid; error_log {folder}/error.log;
events {{ worker_connections 128; }}
http {{
  access_log off;
  client_body_temp_path {folder}/t1; proxy_temp_path {folder}/t2; fastcgi_temp_path {folder}/t3;
  uwsgi_temp_path {folder}/t4; scgi_temp_path {folder}/t5;
  server {{
    listen 127.0.0.1:{port};
    root {folder}/www;
    location /listed/ {{ autoindex on; }}
    location /private/ {{ auth_basic "x"; auth_basic_user_file {folder}/users; }}
    location /moved/ {{ return 302 http://127.0.0.1:{port}/plain/; }}
    location = /elsewhere {{ return 307 http://localhost:{port}/private/model.safetensors; }}
    location = /round {{ return 302 /round; }}
  }}
}}
"""


@pytest.fixture(scope="module")
def web_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[WebServer]:
    nginx = shutil.which("nginx") or "/usr/sbin/nginx"
    if not Path(nginx).exists():
        pytest.skip("nginx is not installed")
    folder = tmp_path_factory.mktemp("web")
    (folder / "www").mkdir()
    (folder / "users").write_text("user:{PLAIN}pass\n")
    port = free_port()
    user = "user root;" if os.geteuid() == 0 else ""  # its default user may not enter our folder
    config = folder / "nginx.conf"
    config.write_text(NGINX.format(folder=folder, port=port, user=user))
    with running([nginx, "-p", str(folder), "-c", str(config)], port):
        yield WebServer(f"http://127.0.0.1:{port}", folder / "www")


class running:
    """A child process that listens on a port."""

    def __init__(self, command: list[str], port: int) -> None:
        self._command, self._port = command, port

    def __enter__(self) -> None:
        self._process = subprocess.Popen(
            self._command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        for _ in range(200):
            try:
                socket.create_connection(("127.0.0.1", self._port), 1).close()
            except OSError:
                time.sleep(0.05)
            else:
                return
        self._process.kill()
        raise RuntimeError(f"{self._command[0]} does not listen")

    def __exit__(self, *_: object) -> None:
        self._process.terminate()
        self._process.wait(10)
