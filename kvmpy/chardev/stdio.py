# SPDX-License-Identifier: Apache-2.0
"""A serial line on standard input and output.

A terminal is put in raw mode: every key goes to the guest, Ctrl-C too. The escape key is Ctrl-A, as in QEMU:

    Ctrl-A X        quit          Ctrl-A Ctrl-A   send Ctrl-A
    Ctrl-A H        this list

Anything else (pipe, file, /dev/null) is left as it is: no escapes, and Ctrl-C stops the program.
"""

from __future__ import annotations

import os
import select
import signal
import termios
import threading
import weakref
from collections.abc import Callable
from typing import Any

from kvmpy.chardev.backend import Input, Receive
from kvmpy.chardev.escape import Escape

HELP = b"\r\nCtrl-A X  quit\r\nCtrl-A H  this help\r\nCtrl-A Ctrl-A  send Ctrl-A to the guest\r\n"

IFLAG, OFLAG, CFLAG, LFLAG, CC = 0, 1, 2, 3, 6  # of the list that tcgetattr gives


class Stdio(Input):
    """Output to `output`, input from `input`: file descriptors, by default standard output and input.

    on_quit(): called in the reader thread for Ctrl-A X; by default Ctrl-C happens to this process, also
    where it was started with Ctrl-C ignored. The terminal is restored by `close()`, when the object goes away,
    and when the program ends, also by an exception (not by SIGKILL, of course).
    """

    def __init__(
        self, input: int = 0, output: int = 1, on_quit: Callable[[], object] | None = None
    ) -> None:
        super().__init__()
        self._in = input
        self._out = output
        self._write_lock = threading.Lock()
        self._start_lock = threading.Lock()
        self._thread: threading.Thread | None = None
        self._wake = -1
        self._closed = False
        self._escape: Escape | None = None
        self._restore: Callable[[], object] | None = None
        if _is_our_terminal(input):
            if on_quit is None:
                _hear_interrupts()
            self._escape = Escape({"x": on_quit or interrupt_main, "h": lambda: self.write(HELP)})
            saved = termios.tcgetattr(input)
            self._restore = weakref.finalize(self, _restore, input, saved)  # runs at exit too
            termios.tcsetattr(input, termios.TCSANOW, raw(saved))

    @property
    def raw(self) -> bool:
        """True when standard input is a terminal, now in raw mode."""
        return self._escape is not None and not self._closed

    def write(self, data: bytes) -> None:
        """Bytes from the guest. Raises OSError, e.g. BrokenPipeError when nobody reads any more."""
        with self._write_lock:
            while data:
                try:
                    data = data[os.write(self._out, data) :]
                except BlockingIOError:  # somebody made the shared terminal non-blocking
                    select.select([], [self._out], [])

    def attach(self, receive: Receive) -> None:
        """Give input to `receive`; reading begins now, so a program that never attaches keeps its input."""
        super().attach(receive)
        with self._start_lock:
            if self._thread is None and not self._closed:
                self._wake = os.eventfd(0, os.EFD_CLOEXEC)
                self._thread = threading.Thread(target=self._run, name="kvmpy stdin", daemon=True)
                self._thread.start()

    def close(self) -> None:
        """Stop reading and restore the terminal; the descriptors stay open. Again is no error."""
        with self._start_lock:
            if self._closed:
                return
            self._closed = True
            thread = self._thread
            if thread is not None:
                os.eventfd_write(self._wake, 1)
        if thread is not None and thread is not threading.current_thread():
            thread.join()
            os.close(self._wake)
        if self._restore is not None:
            self._restore()

    def _run(self) -> None:
        poll = select.poll()
        poll.register(self._wake, select.POLLIN)
        poll.register(self._in, select.POLLIN)
        while True:
            if self._wake in dict(poll.poll()):
                return
            try:
                data = os.read(self._in, 1024)
            except BlockingIOError:
                continue
            except OSError:  # the terminal went away
                return
            if not data:
                return
            if self._escape is not None:
                self._escape.filter(data, self.deliver)
            else:
                self.deliver(data)


def interrupt_main() -> None:
    """What Ctrl-C does: SIGINT to the main thread, which also ends a wait there."""
    main = threading.main_thread().ident
    assert main is not None
    signal.pthread_kill(main, signal.SIGINT)


def _hear_interrupts() -> None:
    # A script may have started us with Ctrl-C ignored, which would be the end of Ctrl-A X too. In raw mode no other
    # Ctrl-C comes from the terminal. Only the main thread can change it.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.default_int_handler)


def raw(attributes: list[Any]) -> list[Any]:
    """Terminal attributes for raw input; output keeps its processing, so that other messages look right."""
    new = list(attributes)
    new[IFLAG] &= ~(
        termios.IGNBRK | termios.BRKINT | termios.PARMRK | termios.ISTRIP
        | termios.INLCR | termios.IGNCR | termios.ICRNL | termios.IXON
    )
    new[OFLAG] |= termios.OPOST
    new[CFLAG] = new[CFLAG] & ~(termios.CSIZE | termios.PARENB) | termios.CS8
    new[LFLAG] &= ~(termios.ECHO | termios.ECHONL | termios.ICANON | termios.ISIG | termios.IEXTEN)
    new[CC] = list(new[CC])
    new[CC][termios.VMIN], new[CC][termios.VTIME] = 1, 0
    return new


def _restore(fd: int, attributes: list[Any]) -> None:
    # The process may be in the background by now, and tcsetattr would stop it (SIGTTOU).
    blocked = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTOU})
    try:
        termios.tcsetattr(fd, termios.TCSANOW, attributes)
    except termios.error:
        pass  # the terminal was closed; there is nothing to restore
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, blocked)


def _is_our_terminal(fd: int) -> bool:
    try:
        # In the background tcsetattr would stop the whole process (SIGTTOU).
        return os.isatty(fd) and os.tcgetpgrp(fd) == os.getpgrp()
    except OSError:
        return False
