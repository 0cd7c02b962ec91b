# SPDX-License-Identifier: Apache-2.0
"""A serial console in memory, to be driven by a program: what `expect` is for terminals."""

from __future__ import annotations

import contextlib
import re
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from kvmpy.chardev.backend import Input

Pattern = str | bytes | re.Pattern[str] | re.Pattern[bytes]

LIMIT = 4 << 20  # bytes of transcript; a guest can send for ever
TAIL = 800       # bytes of it in an error message

# Who waits looks at most this often (seconds) and spends at most a tenth of its time on looking: a guest
# sends byte by byte, and a regular expression starts again from the last position each time.
PAUSE, LONGEST_PAUSE = 0.001, 0.1


@dataclass(frozen=True, slots=True)
class Found:
    """What `expect` found: the text `before` the match, the matching `text`, and the `groups`."""

    before: str
    text: str
    groups: tuple[str | None, ...] = ()


class Console(Input):
    """Keeps what the guest sends, waits for patterns in it, and types to the guest.

    Reading moves forward: each `expect`, `read_until` and `read` begins where the last one ended. Any thread
    may use it. limit: bytes kept; older ones are forgotten. Text is UTF-8, with U+FFFD for what is not.
    """

    def __init__(self, limit: int = LIMIT) -> None:
        super().__init__()
        if limit <= 0:
            raise ValueError(f"a console keeps at least one byte, not {limit}")
        self._limit = limit
        self._data = bytearray()
        self._start = 0     # how many bytes were forgotten before _data
        self._position = 0  # where the next read begins, counted from the first byte ever
        self._closed = False
        self._changed = threading.Condition()
        self._listeners: set[Callable[[], object]] = set()  # each is called once

    # -- the guest's side

    def write(self, data: bytes) -> None:
        """Bytes from the guest."""
        with self._changed:
            self._data += data
            # Forget in large steps: each one moves what stays.
            if len(self._data) > self._limit + self._limit // 4:
                self._start += len(self._data) - self._limit
                del self._data[: -self._limit]
                self._position = max(self._position, self._start)
            self._wake()

    def close(self) -> None:
        """No more output will come: who waits gets EOFError; what was kept stays readable."""
        with self._changed:
            self._closed = True
            self._wake()

    def _wake(self) -> None:
        self._changed.notify_all()
        listeners, self._listeners = self._listeners, set()
        for listener in listeners:
            listener()

    # -- typing

    def send(self, text: str | bytes) -> None:
        """Type `text` to the guest."""
        self.deliver(text.encode() if isinstance(text, str) else bytes(text))

    def send_line(self, text: str | bytes = "") -> None:
        """Type `text` and Enter (a carriage return, as a terminal sends it)."""
        self.send(text)
        self.send(b"\r")

    # -- reading

    def expect(self, pattern: Pattern, timeout: float | None = 30.0) -> Found:
        """Wait until `pattern` appears, and read past it.

        pattern: str or bytes as they are, or a compiled regular expression. timeout: seconds, None for ever.
        Raises TimeoutError and, when the console is closed, EOFError; both show the end of the output.
        """
        search = _searcher(pattern)
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._changed:
                found, pause = self._step(search, pattern)
                if found is not None:
                    return found
                rest = None if end is None else end - time.monotonic()
                if rest is not None and rest <= 0:
                    raise self._timed_out(pattern, timeout)
                self._changed.wait(rest)
            time.sleep(pause)

    async def aexpect(self, pattern: Pattern, timeout: float | None = 30.0) -> Found:
        """`expect` for asyncio: other tasks run while it waits."""
        import asyncio  # 4 MiB, for those who use it

        search = _searcher(pattern)
        loop = asyncio.get_running_loop()
        news = asyncio.Event()

        def listener() -> None:
            with contextlib.suppress(RuntimeError):  # the loop was closed, and nobody waits any more
                loop.call_soon_threadsafe(news.set)

        try:
            async with asyncio.timeout(timeout):
                while True:
                    news.clear()
                    with self._changed:
                        found, pause = self._step(search, pattern)
                        if found is not None:
                            return found
                        self._listeners.add(listener)
                    await news.wait()
                    await asyncio.sleep(pause)
        except TimeoutError:
            with self._changed:
                raise self._timed_out(pattern, timeout) from None
        finally:
            with self._changed:
                self._listeners.discard(listener)

    def read_until(self, end: str | bytes, timeout: float | None = 30.0) -> str:
        """Everything up to and with `end`. Arguments and errors as `expect`."""
        found = self.expect(end, timeout)
        return found.before + found.text

    async def aread_until(self, end: str | bytes, timeout: float | None = 30.0) -> str:
        """`read_until` for asyncio."""
        found = await self.aexpect(end, timeout)
        return found.before + found.text

    def read(self) -> str:
        """What came since the last read; does not wait."""
        with self._changed:
            data = self._data[self._position - self._start :]
            self._position += len(data)
        return _text(data)

    @property
    def raw(self) -> bytes:
        """Everything that is kept, as bytes; reading it does not move on."""
        with self._changed:
            return bytes(self._data)

    @property
    def transcript(self) -> str:
        """Everything that is kept, as text."""
        return _text(self.raw)

    @property
    def lines(self) -> list[str]:
        """The transcript in lines, without their ends; the last one may be incomplete."""
        return [line.rstrip("\r") for line in self.transcript.split("\n")]

    @property
    def closed(self) -> bool:
        """True after `close()`."""
        return self._closed

    # -- inside; the lock is held

    def _step(self, search: _Searcher, pattern: Pattern) -> tuple[Found | None, float]:
        """Look once: what was found, or None and how long to let the output grow before looking again."""
        began = time.monotonic()
        found = search(self._data, self._position - self._start, self._start)
        if found is None:
            if self._closed:
                raise EOFError(f"the console was closed before {_show(pattern)} appeared; {self._tail()}")
            return None, min(max(PAUSE, 10 * (time.monotonic() - began)), LONGEST_PAUSE)
        first, last, groups = found
        before = self._data[self._position - self._start : first]
        text = self._data[first:last]
        self._position = self._start + last
        return Found(_text(before), _text(text), groups), 0.0

    def _timed_out(self, pattern: Pattern, timeout: float | None) -> TimeoutError:
        return TimeoutError(f"{_show(pattern)} did not appear within {timeout} s; {self._tail()}")

    def _tail(self) -> str:
        if not self._data:
            return "there was no output at all"
        return f"the output ends with:\n{_text(self._data[-TAIL:])}"

    def __repr__(self) -> str:
        return f"<Console {len(self._data)} bytes{' closed' if self._closed else ''}>"


# (data, from where, what was forgotten before data) -> (start, end, groups) in data
_Searcher = Callable[[bytearray, int, int], tuple[int, int, tuple[str | None, ...]] | None]


def _searcher(pattern: Pattern) -> _Searcher:
    if isinstance(pattern, re.Pattern):
        return _expression(pattern)
    literal = pattern.encode() if isinstance(pattern, str) else bytes(pattern)
    seen = 0  # up to here, counted from the first byte ever, no match begins

    def search(data: bytearray, begin: int, forgotten: int) -> tuple[int, int, tuple[str | None, ...]] | None:
        nonlocal seen
        at = data.find(literal, max(begin, seen - forgotten))
        if at >= 0:
            return at, at + len(literal), ()
        seen = forgotten + max(begin, len(data) - len(literal) + 1)
        return None

    return search


def _expression(pattern: re.Pattern[str] | re.Pattern[bytes]) -> _Searcher:
    if isinstance(pattern.pattern, str):
        # Output is bytes and a character may be half there, so the search is in bytes too.
        compiled = re.compile(pattern.pattern.encode(), pattern.flags & ~re.UNICODE)
    else:
        compiled = re.compile(pattern.pattern, pattern.flags)

    def search(data: bytearray, begin: int, forgotten: int) -> tuple[int, int, tuple[str | None, ...]] | None:
        match = compiled.search(data, begin)
        if match is None:
            return None
        return match.start(), match.end(), tuple(None if g is None else _text(g) for g in match.groups())

    return search


def _text(data: bytes | bytearray) -> str:
    return data.decode("utf-8", "replace")


def _show(pattern: Pattern) -> str:
    return repr(pattern.pattern if isinstance(pattern, re.Pattern) else pattern)
