# SPDX-License-Identifier: Apache-2.0
"""Standard input and output: on pipes in this process, on a terminal of its own in a child."""

import os
import select
import signal
import subprocess
import sys
import termios
import threading
from pathlib import Path

import pytest

from kvmpy.chardev import Stdio

# The child makes its standard input its controlling terminal, connects a line that echoes in upper case, and
# waits as a program does that runs a machine.
CHILD = """
import fcntl, os, sys, termios, threading
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from kvmpy.chardev import Stdio
line = Stdio()
line.attach(lambda data: line.write(b"<" + data.upper() + b">"))
def ready():
    line.write(b"ready raw=%d" % line.raw)
END
"""

WAIT_THEN_CLOSE = """
try:
    ready()
    threading.Event().wait()
except KeyboardInterrupt:
    line.close()
    print("interrupted", flush=True)
"""

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture
def terminal():
    """Both ends of a fresh terminal."""
    master, slave = os.openpty()
    yield master, slave
    os.close(slave)
    os.close(master)


def start(slave, end, *before):
    return subprocess.Popen(
        [*before, sys.executable, "-c", CHILD.replace("END", end)],
        stdin=slave, stdout=slave, stderr=slave, start_new_session=True, cwd=ROOT,
    )  # fmt: skip


def read_until(fd, end):
    data = b""
    while not data.endswith(end):
        assert select.select([fd], [], [], 60)[0], f"only {data!r} came"
        data += os.read(fd, 4096)
    return data


def pipes():
    return (*os.pipe(), *os.pipe())


def test_a_terminal_is_raw_and_restored_when_the_line_closes(terminal):
    master, slave = terminal
    before = termios.tcgetattr(slave)
    child = start(slave, WAIT_THEN_CLOSE)
    try:
        read_until(master, b"ready raw=1")
        assert termios.tcgetattr(slave) != before
        os.write(master, b"a\x03\x01\x01")  # Ctrl-C and Ctrl-A Ctrl-A go to the guest
        echo = b""
        while echo.replace(b"><", b"") != b"<A\x03\x01>":
            echo += read_until(master, b">")
        os.write(master, b"\x01h")
        assert b"Ctrl-A X  quit" in read_until(master, b"to the guest\r\r\n")
        os.write(master, b"\x01x")
        assert read_until(master, b"interrupted\r\n")
        assert child.wait(60) == 0
        assert termios.tcgetattr(slave) == before
    finally:
        child.kill()
        child.wait()


def test_ctrl_a_x_quits_where_ctrl_c_is_ignored(terminal):
    master, slave = terminal
    child = start(slave, WAIT_THEN_CLOSE, "sh", "-c", "trap '' INT; exec \"$@\"", "sh")
    try:
        read_until(master, b"ready raw=1")
        for _ in range(6):  # one that comes before the child waits ends no wait
            os.write(master, b"\x01x")
            if select.select([master], [], [], 10)[0]:
                break
        assert read_until(master, b"interrupted\r\n")
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.wait()


@pytest.mark.parametrize(
    ("end", "status"), [("ready(); raise RuntimeError('bug')", 1), ("ready(); sys.exit(3)", 3)]
)
def test_a_terminal_is_restored_when_the_program_ends(terminal, end, status):
    master, slave = terminal
    before = termios.tcgetattr(slave)
    child = start(slave, end)
    read_until(master, b"ready raw=1" if status == 3 else b"RuntimeError: bug\r\n")
    assert child.wait(60) == status
    assert termios.tcgetattr(slave) == before


def test_a_terminal_that_went_away_is_no_error_at_exit(terminal):
    master, slave = terminal
    child = start(slave, "ready(); os.close(0); print('bye', flush=True)")
    read_until(master, b"bye\r\n")
    assert child.wait(60) == 0
    assert select.select([master], [], [], 0)[0] == []  # no complaint either


def test_a_terminal_of_another_session_is_left_alone(terminal):
    _, slave = terminal
    before = termios.tcgetattr(slave)
    line = Stdio(slave, slave)
    assert not line.raw
    assert termios.tcgetattr(slave) == before
    line.close()


def test_pipes_carry_everything_and_know_no_escapes():
    their_in, our_out, our_in, their_out = pipes()
    line = Stdio(their_in, their_out)
    assert not line.raw
    got, came = bytearray(), threading.Event()

    def receive(data):
        got.extend(data)
        if len(got) == 256:
            came.set()

    os.write(our_out, b"\x00\x01x")
    line.attach(receive)
    os.write(our_out, bytes(range(3, 256)))
    assert came.wait(60)
    assert got == b"\x00\x01x" + bytes(range(3, 256))
    line.write(b"\x00\xffout")
    assert os.read(our_in, 100) == b"\x00\xffout"
    line.close()
    line.close()
    for fd in (their_in, our_out, our_in, their_out):
        os.close(fd)  # still open: they are not the line's


def test_reading_begins_with_attach():
    reader, writer = os.pipe()
    os.write(writer, b"mine")
    line = Stdio(reader, 1)
    assert os.read(reader, 10) == b"mine"
    line.close()
    line.attach(print)  # too late, and no thread is started
    assert line._thread is None
    os.close(reader)
    os.close(writer)


def test_end_of_input_ends_the_reader_and_nothing_else():
    their_in, our_out, our_in, their_out = pipes()
    line = Stdio(their_in, their_out)
    line.attach(lambda data: None)
    os.close(our_out)
    line._thread.join(60)
    assert not line._thread.is_alive()
    line.write(b"goes on")
    assert os.read(our_in, 100) == b"goes on"
    line.close()
    for fd in (their_in, our_in, their_out):
        os.close(fd)


def test_output_that_nobody_reads_any_more_is_an_error():
    reader, writer = os.pipe()
    os.close(reader)
    line = Stdio(0, writer)
    with pytest.raises(BrokenPipeError):
        line.write(b"x")
    line.close()
    os.close(writer)


def test_a_non_blocking_output_is_waited_for():
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    line = Stdio(0, writer)
    data = bytes(range(256)) * 1024
    thread = threading.Thread(target=line.write, args=(data,))
    thread.start()
    got = b""
    while len(got) < len(data):
        got += os.read(reader, 65536)
    thread.join()
    assert got == data
    line.close()
    os.close(reader)
    os.close(writer)


def test_ctrl_c_interrupts_a_program_whose_input_is_no_terminal():
    code = CHILD.replace("fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n", "").replace("END", WAIT_THEN_CLOSE)
    child = subprocess.Popen(
        [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    try:
        assert child.stdin is not None
        assert child.stdout is not None
        assert child.stdout.read(11) == b"ready raw=0"
        child.send_signal(signal.SIGINT)
        assert child.stdout.read() == b"interrupted\n"
        assert child.wait(60) == 0
    finally:
        child.kill()
        child.wait()
        child.stdin.close()
        child.stdout.close()
