# SPDX-License-Identifier: Apache-2.0
"""Work in another network namespace: in a thread of its own, because a namespace belongs to a thread (setns(2))."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from kvmpy.errors import NetworkError

T = TypeVar("T")

CLONE_NEWNET = 0x40000000  # <linux/sched.h>
NAMED = Path("/run/netns")  # where `ip netns add NAME` puts them
HERE = "/proc/thread-self/ns/net"
PATIENCE = 30.0  # seconds for others to finish what they do; anybody may hold the lock


def open_namespace(name: str) -> int:
    """A descriptor of the namespace of this name or path (such as /proc/PID/ns/net). Raises NetworkError.

    While it is open the namespace stays, also when its name is removed.
    """
    path = Path(name) if "/" in name else NAMED / name
    try:
        return os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise NetworkError(
            f"no network namespace {path}: {error.strerror}; make one: ip netns add {path.name}"
        ) from error


def inside(namespace: int | None, call: Callable[[], T]) -> T:
    """`call()` in the namespace of this descriptor; None: here. Raises NetworkError, and what the call raises."""
    if namespace is None:
        return call()
    result: list[T] = []
    failure: list[BaseException] = []

    def work() -> None:
        try:
            libc = ctypes.CDLL(None, use_errno=True)
            if libc.setns(namespace, CLONE_NEWNET):
                raise NetworkError(f"the network namespace cannot be entered: {os.strerror(ctypes.get_errno())}")
            result.append(call())
        except BaseException as error:
            failure.append(error)

    thread = threading.Thread(target=work, name="kvmpy-netns")
    thread.start()
    thread.join()
    if failure:
        raise failure[0]
    return result[0]


@contextlib.contextmanager
def alone() -> Iterator[None]:
    """One kvmpy at a time in the calling thread's namespace, so that none removes what another builds upon."""
    fd = os.open(HERE, os.O_RDONLY | os.O_CLOEXEC)
    try:
        end = time.monotonic() + PATIENCE
        while True:
            try:
                fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if time.monotonic() > end:
                    break
                time.sleep(0.01)
        yield
    finally:
        os.close(fd)
