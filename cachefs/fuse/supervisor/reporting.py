"""How whoever started a mount hears of it: a pipe, a terminal, systemd."""

import json
import os
import sys
from collections.abc import Callable
from typing import Any

from weightstream.cachefs.fuse.supervisor import systemd
from weightstream.cachefs.fuse.supervisor.loop import Loop


class Reporter:
    """Says once that a mount works, or why not."""

    def __init__(self, loop: Loop, pipe: int, on_deserted: Callable[[], None]) -> None:
        """`pipe` is -1 in the foreground. `on_deserted`: the reader of the pipe is gone."""
        self._loop = loop
        self._pipe = pipe
        self._done = False
        if pipe >= 0:
            os.set_inheritable(pipe, False)
            loop.watch(pipe, lambda _: on_deserted(), 0)  # POLLERR is always told

    def mounted(self, report: dict[str, Any]) -> None:
        """Say that the mount works."""
        if not self._done:
            self._say({"event": "mounted", **report})
        systemd.notify("READY=1", f"STATUS=serving {report['uri']} at {report['directory']}")

    def failed(self, error: str, exit_code: int) -> None:
        """Say why there will be no mount."""
        if self._done:
            return
        if self._pipe < 0:
            print(f"weightstream: {error}", file=sys.stderr)
        self._say({"event": "failed", "error": error, "exit_code": exit_code})
        systemd.notify(f"STATUS={error}", f"ERRNO={exit_code}")

    @property
    def is_done(self) -> bool:
        """Return whether it was said."""
        return self._done

    def _say(self, message: dict[str, Any]) -> None:
        self._done = True
        pipe, self._pipe = self._pipe, -1
        if pipe < 0:
            return
        self._loop.forget(pipe)
        try:
            os.write(pipe, json.dumps(message).encode() + b"\n")
        except BrokenPipeError:  # nobody waits any more
            pass
        finally:
            os.close(pipe)
