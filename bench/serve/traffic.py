"""Requests at a steady rate, short ones and streams, while something moves; every answer is judged.

Open loop: a slow answer does not hold the next request back. A stream counts as cut when its last
line is missing, whatever its status was.
"""

import asyncio
import statistics
import threading
import time
from dataclasses import dataclass

import aiohttp

LAST_LINE = "end\n"
_TIMEOUT_S = 60.0


@dataclass(frozen=True, slots=True)
class Answer:
    """One request's end."""

    stream: bool
    at_s: float
    """Monotonic time at which it was asked."""
    took_s: float
    failure: str
    """Empty, or what went wrong."""


@dataclass(frozen=True, slots=True)
class Summary:
    """What came of all requests."""

    requests: int
    streams: int
    failures: tuple[str, ...]
    p50_s: float
    p99_s: float


class Traffic:
    """Ask until the block ends; then every answer is in."""

    def __init__(self, url: str, short_per_s: float = 50.0, streams_per_s: float = 3.0) -> None:
        self.answers: list[Answer] = []
        self._url = url
        self._rates = ((False, short_per_s), (True, streams_per_s))
        self._ended = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)

    def __enter__(self) -> "Traffic":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        self._thread.join(_TIMEOUT_S + 10)

    def summary(self) -> Summary:
        """Return what came of it."""
        short = sorted(a.took_s for a in self.answers if not a.stream) or [0.0]
        return Summary(
            len(self.answers),
            sum(answer.stream for answer in self.answers),
            tuple(answer.failure for answer in self.answers if answer.failure),
            statistics.median(short),
            short[int(0.99 * (len(short) - 1))],
        )

    async def _main(self) -> None:
        limit = aiohttp.ClientTimeout(total=_TIMEOUT_S)
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(timeout=limit, connector=connector) as session:
            await asyncio.gather(*(self._kind(session, *rate) for rate in self._rates))

    async def _kind(self, session: aiohttp.ClientSession, stream: bool, per_s: float) -> None:
        asked = []
        next_s = time.monotonic()
        while per_s and not self._ended.is_set():
            asked.append(asyncio.create_task(self._ask(session, stream)))
            next_s += 1 / per_s
            await asyncio.sleep(max(0.0, next_s - time.monotonic()))
        await asyncio.gather(*asked)

    async def _ask(self, session: aiohttp.ClientSession, stream: bool) -> None:
        began_s, failure = time.monotonic(), ""
        try:
            async with session.get(self._url, params={"stream": int(stream)}) as response:
                text = await response.text()
                if response.status != 200:
                    failure = f"{response.status} {text[:100]}"
                elif not text.endswith(LAST_LINE):
                    failure = f"cut after {len(text)} characters"
        except (aiohttp.ClientError, TimeoutError) as error:
            failure = f"{type(error).__name__}: {error}"
        took_s = time.monotonic() - began_s
        self.answers.append(Answer(stream, began_s, took_s, failure))
