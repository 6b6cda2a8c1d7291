"""A server process that does as it is told, to try a supervisor with: standard library only.

It speaks the control protocol of docs/design/0004-filesystem.md and as much of FUSE as it takes to
read two files: `data`, whose bytes are `content()`, and `stuck`, whose reads are never answered.
How it misbehaves is in the mount's settings:

    failed, exit_code   say `failed` instead of `prepared`
    crash               exit before `prepared`
    crash_restarted     the same, but only in servers that replace another
    silent              never say `prepared`
    mute                serve, but never say `beat`
    deaf                ignore `stop` and SIGTERM
    delay_s             answer each read this much later
"""

import argparse
import errno
import json
import os
import select
import signal
import socket
import struct
import sys
import threading
import time
from typing import Any

SIZE = 1 << 20
FILES = {2: b"data", 3: b"stuck"}
HEADER = struct.Struct("<IIQQIIIHH")
RESEND = struct.pack("<IiQ", 16, 7, 0)
RESENT = 1 << 63
DIRECT_IO = 1  # every read reaches the server


def content() -> bytes:
    """Return the bytes of the file `data`."""
    return bytes(range(256)) * (SIZE // 256)


class Server:
    """One run of the fake."""

    def __init__(self, control: socket.socket, device: int) -> None:
        self.control = control
        self.device = device
        self.lines = control.makefile("rb")
        self.spec: dict[str, Any] = json.loads(self.lines.readline())
        self.settings = self.spec["settings"]
        self.data = content()
        self.init: dict[str, Any] = {}
        self.supervised = True

    def say(self, **message: Any) -> None:
        if self.supervised:
            self.control.sendall(json.dumps(message).encode() + b"\n")

    def prepare(self) -> None:
        restarted = self.spec["restart"]
        if self.settings.get("failed") and not restarted:
            self.say(
                event="failed",
                error=self.settings["failed"],
                exit_code=self.settings.get("exit_code", 3),
            )
            raise SystemExit(1)
        if self.settings.get("crash") or (self.settings.get("crash_restarted") and restarted):
            print("fake server: crashing as told", file=sys.stderr)
            os._exit(42)
        if self.settings.get("silent"):
            time.sleep(600)
        self.say(event="prepared")
        command = json.loads(self.lines.readline() or b"{}")
        if command.get("command") != "serve":
            raise SystemExit(0)
        if command["resume"] is not None:
            assert command["resume"]["minor"] >= 31
            self.init = command["resume"]
            os.write(self.device, RESEND)
            self.say(event="ready", init=self.init)

    def run(self) -> None:
        threading.Thread(target=self.beat, daemon=True).start()
        poll = select.poll()
        poll.register(self.device, select.POLLIN)
        poll.register(self.control, select.POLLIN)
        while True:
            for descriptor, _ in poll.poll():
                if descriptor == self.device:
                    self.answer_kernel()
                elif not self.answer_supervisor():
                    poll.unregister(self.control)

    def beat(self) -> None:
        while not self.settings.get("mute"):
            time.sleep(0.2)
            self.say(event="beat")

    def answer_supervisor(self) -> bool:
        line = self.lines.readline()
        if not line:
            self.supervised = False
            return False
        message = json.loads(line)
        command = message.get("command")
        if command == "stop":
            if not self.settings.get("deaf"):
                raise SystemExit(0)
        elif command == "status":
            self.say(id=message["id"], gauges={"reads": 0})
        elif command == "refresh":
            self.say(id=message["id"], folders=1, path=message.get("path"))
        elif command == "die":
            os._exit(13)
        else:
            self.say(id=message["id"], error=f"what is {command}?", exit_code=2)
        return True

    def answer_kernel(self) -> None:
        try:
            request = os.read(self.device, (1 << 20) + 4096)
        except OSError as error:
            if error.errno == errno.ENODEV:
                self.say(event="unmounted")
                raise SystemExit(0) from None
            if error.errno in (errno.EINTR, errno.EAGAIN, errno.ENOENT):
                return
            raise
        _, opcode, unique, node, *_ = HEADER.unpack_from(request)
        body = request[HEADER.size :]
        if opcode == 15:
            self.read(unique, node, body)
        elif opcode not in (2, 36, 42):  # forget, interrupt, batch_forget are not answered
            self.reply(unique, *self.result(opcode, node, body))

    def read(self, unique: int, node: int, body: bytes) -> None:
        if node == 3:
            return
        _, offset, size = struct.unpack_from("<QQI", body)
        delay_s = self.settings.get("delay_s", 0)
        part = self.data[offset : offset + size]
        if not delay_s:
            self.reply(unique, 0, part)
            return
        timer = threading.Timer(delay_s, self.reply, (unique, 0, part))
        timer.daemon = True
        timer.start()

    def result(self, opcode: int, node: int, body: bytes) -> tuple[int, bytes]:
        if opcode == 26:
            return 0, self.negotiate(body)
        if opcode == 1:
            name = body.rstrip(b"\0")
            found = [number for number, file in FILES.items() if file == name]
            if not found:
                return -errno.ENOENT, b""
            return 0, struct.pack("<QQQQII", found[0], 0, 0, 0, 0, 0) + attributes(found[0])
        if opcode == 3:
            return 0, struct.pack("<QII", 0, 0, 0) + attributes(node)
        if opcode == 14:
            return 0, struct.pack("<QIi", 0, DIRECT_IO, 0)
        if opcode in (18, 25, 29, 34):  # release, flush, releasedir, access
            return 0, b""
        if opcode == 27:
            return 0, struct.pack("<QIi", 0, 0, 0)
        if opcode == 28:
            return 0, b""
        if opcode == 17:
            return 0, struct.pack("<QQQQQIIII24x", 0, 0, 0, 0, 0, 512, 255, 0, 0)
        return -errno.ENOSYS, b""

    def negotiate(self, body: bytes) -> bytes:
        major, minor, readahead, flags = struct.unpack_from("<IIII", body)
        wanted = (1 << 0) | (1 << 22) | (1 << 30)  # ASYNC_READ, MAX_PAGES, INIT_EXT
        has_resend = 0x80
        self.init = {"minor": min(minor, 45), "flags": flags & wanted}
        # The kernel sees the answer when this has returned, microseconds from now.
        threading.Timer(0.01, lambda: self.say(event="ready", init=self.init)).start()
        return struct.pack(
            "<IIIIHHIIHHI28x",
            major, min(minor, 45), readahead, flags & wanted, 16, 12, 1 << 20, 1, 32, 0, has_resend,
        )  # fmt: skip

    def reply(self, unique: int, error: int, body: bytes) -> None:
        header = struct.pack("<IiQ", 16 + len(body), error, unique)
        try:
            os.write(self.device, header + body)
        except OSError as failure:
            if failure.errno not in (errno.ENOENT, errno.ENODEV):  # interrupted, unmounted
                raise


def attributes(node: int) -> bytes:
    mode = 0o40555 if node == 1 else 0o100444
    size = 0 if node == 1 else SIZE
    return struct.pack(
        "<QQQQQQIIIIIIIIII",
        node, size, size // 512, 0, 0, 0, 0, 0, 0, mode, 1, 0, 0, 0, 4096, 0,
    )  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--control-fd", type=int, required=True)
    parser.add_argument("--fuse-fd", type=int, required=True)
    options = parser.parse_args()
    server = Server(socket.socket(fileno=options.control_fd), options.fuse_fd)
    if server.settings.get("deaf"):
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
    server.prepare()
    server.run()


if __name__ == "__main__":
    main()
