"""A server in a process of its own, over whatever tree and content a test names.

    python -m tests.cachefs.fuse.child --fuse-fd N --control-fd M

The first line says what to serve; then each line names a method of the scene, or of the server.
"""

import argparse
import ctypes
import importlib
import json
import logging
import os
import signal
import socket
import sys
import threading
from dataclasses import fields
from pathlib import Path
from typing import Any

from weightstream.cachefs.fuse.kernel.server import KernelServer, Options

_PR_SET_PDEATHSIG = 1


class Child:
    """One run."""

    def __init__(self, fuse_fd: int, control: socket.socket) -> None:
        self._lines = control.makefile("rw")
        self._lock = threading.Lock()
        first = json.loads(self._lines.readline())
        module, _, name = first["scene"].partition(":")
        self.scene = getattr(importlib.import_module(module), name)(**first["arguments"])
        options = dict(first["options"])
        for field in fields(Options):
            if field.name in ("store", "journal") and options.get(field.name) is not None:
                options[field.name] = Path(options[field.name])
        self.server = KernelServer(fuse_fd, self.scene.tree, self.scene.content, Options(**options))
        self.scene.tree.on_change = self.server.changed
        self._resume = first["resume"]

    def run(self) -> None:
        self.server.start(self._resume)
        for line in self._lines:
            message = json.loads(line)
            thread = threading.Thread(
                target=self._call, args=(message,), name="weightstream-call", daemon=True
            )
            thread.start()

    def _call(self, message: dict[str, Any]) -> None:
        owner, _, name = message["call"].rpartition(".")
        target = self.server if owner == "server" else self.scene
        method = getattr(self, "_" + name) if owner == "child" else getattr(target, name)
        try:
            answer = {"value": method(*message["arguments"])}
        except Exception as error:
            answer = {"error": repr(error)}
        with self._lock:
            self._lines.write(json.dumps({"id": message["id"], **answer}) + "\n")
            self._lines.flush()

    def _await_ready(self) -> dict[str, Any]:
        assert self.server.ready.wait(30), "no INIT"
        return self.server.init()

    def _await_end(self) -> bool:
        return self.server.ended.wait(30)

    def _counts(self) -> dict[str, float]:
        from weightstream import metrics

        (family,) = metrics.FUSE_REQUESTS.collect()
        return {
            sample.labels["op"]: sample.value
            for sample in family.samples
            if sample.name.endswith("_total") and sample.value
        }

    def _errors(self) -> dict[str, float]:
        from weightstream import metrics

        (family,) = metrics.FUSE_ERRORS.collect()
        return {
            sample.labels["errno"]: sample.value
            for sample in family.samples
            if sample.name.endswith("_total")
        }

    def _nodes(self) -> int:
        return len(self.server._nodes)

    def _threads(self) -> list[str]:
        return [thread.name for thread in threading.enumerate()]

    def _peak_rss(self) -> int:
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) << 10


def main() -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parser = argparse.ArgumentParser()
    parser.add_argument("--fuse-fd", type=int, required=True)
    parser.add_argument("--control-fd", type=int, required=True)
    given = parser.parse_args()
    logging.basicConfig(level=logging.DEBUG, stream=sys.stderr)
    try:
        Child(given.fuse_fd, socket.socket(fileno=given.control_fd)).run()
    finally:
        os._exit(0)


if __name__ == "__main__":
    main()
