# SPDX-License-Identifier: Apache-2.0
"""Machines for asyncio programs: the same machine, waited for without blocking the event loop.

    async with kvmpy.aio.Machine(kernel="vmlinuz", initrd="initrd.gz") as machine:
        await machine.console.expect("login:")
        outcome = await machine.wait()

Nothing is implemented twice: what can block runs in a thread or is awaited through a callback.
"""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any

from kvmpy import machine as sync
from kvmpy.chardev import Console as SyncConsole
from kvmpy.chardev import Found
from kvmpy.vcpu import Outcome

__all__ = ["Console", "Machine"]


class Machine:
    """A `kvmpy.Machine` whose blocking calls are awaitable; `.sync` is the machine itself."""

    def __init__(self, config: sync.Config | None = None, **fields: Any) -> None:
        self.sync = sync.Machine(config, **fields)

    @property
    def console(self) -> Console:
        """The in-memory console on COM1."""
        return Console(self.sync.console)

    async def start(self) -> None:
        """Start the processors."""
        await asyncio.to_thread(self.sync.start)

    async def wait(self) -> Outcome:
        """The outcome of the run; raises as `kvmpy.Machine.wait`. Cancelling it leaves the machine running."""
        loop = asyncio.get_running_loop()
        done = asyncio.Event()

        def tell() -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(done.set)

        self.sync.add_done_callback(tell)
        await done.wait()
        return self.sync.wait()

    async def pause(self) -> None:
        """Take all processors out of the guest."""
        await asyncio.to_thread(self.sync.pause)

    async def resume(self) -> None:
        """Go on after a pause."""
        await asyncio.to_thread(self.sync.resume)

    def stop(self) -> None:
        """Ask the processors to stop; `wait()` tells when they have."""
        self.sync.stop()

    async def close(self) -> None:
        """Stop everything and free it."""
        await asyncio.to_thread(self.sync.close)

    async def __aenter__(self) -> Machine:
        await self.start()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


class Console:
    """A console whose waiting calls are awaitable; `.sync` is the console itself."""

    def __init__(self, console: SyncConsole) -> None:
        self.sync = console

    async def expect(self, pattern: str, timeout: float | None = 30.0) -> Found:
        """Wait for `pattern` in what the guest sends, as `kvmpy.chardev.Console.expect`."""
        return await self.sync.aexpect(pattern, timeout)

    def send(self, text: str | bytes) -> None:
        """Type to the guest."""
        self.sync.send(text)

    def send_line(self, text: str | bytes = "") -> None:
        """Type a line to the guest."""
        self.sync.send_line(text)

    @property
    def transcript(self) -> str:
        """All that the guest has sent, as far as it was kept."""
        return self.sync.transcript
