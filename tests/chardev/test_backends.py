# SPDX-License-Identifier: Apache-2.0
"""File, Null, Tee, Mux, Pty and Socket, on real files, terminals and sockets."""

import os
import select
import socket
import termios
import threading
from pathlib import Path

import pytest

from kvmpy.chardev import Console, File, Mux, Null, Pty, Socket, Tee
from kvmpy.chardev.backend import MAX_PENDING, Input
from kvmpy.chardev.escape import Escape
from kvmpy.chardev.pump import MAX_QUEUED
from kvmpy.errors import StateError


class Received:
    """A receiver that can be waited for."""

    def __init__(self):
        self.data = bytearray()
        self.changed = threading.Condition()

    def __call__(self, data):
        assert isinstance(data, bytes)
        with self.changed:
            self.data += data
            self.changed.notify_all()

    def wait(self, expected):
        with self.changed:
            assert self.changed.wait_for(lambda: len(self.data) >= len(expected), 20), bytes(self.data)
        assert self.data == expected


def held():
    """How many descriptors and threads this process has."""
    return sum(1 for _ in Path("/proc/self/fd").iterdir()), threading.active_count()


def read(fd, size):
    """Exactly `size` bytes of a descriptor."""
    data = b""
    while len(data) < size:
        assert select.select([fd], [], [], 20)[0], f"only {data!r} came"
        data += os.read(fd, size - len(data))
    return data


# -- input


def test_input_before_a_receiver_is_kept_up_to_a_bound():
    line = Input()
    line.deliver(b"x" * (MAX_PENDING - 1))
    line.deliver(b"yz")
    got = Received()
    line.attach(got)
    line.deliver(b"!")
    assert got.data == b"x" * (MAX_PENDING - 1) + b"y" + b"!"


def test_a_new_receiver_replaces_the_old_one():
    line, first, second = Input(), Received(), Received()
    line.attach(first)
    line.deliver(b"1")
    line.attach(second)
    line.deliver(b"2")
    assert (first.data, second.data) == (b"1", b"2")


# -- the simple ones


def test_null():
    null = Null()
    null.attach(print)
    null.write(b"lost")
    null.close()


def test_file_starts_empty_or_appends(tmp_path):
    path = tmp_path / "log"
    path.write_bytes(b"old ")
    first = File(path, append=True)
    first.write(b"new")
    assert path.read_bytes() == b"old new"
    first.close()
    first.close()
    first.write(b"ignored")
    second = File(path)
    second.write(b"fresh")
    second.close()
    assert path.read_bytes() == b"fresh"


def test_file_write_errors_come_out():
    full = File("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        full.write(b"x")
    full.close()


def test_tee_sends_to_all_and_hears_all(tmp_path):
    one, two = Console(), Console()
    tee = Tee(one, two, Null())
    got = Received()
    tee.attach(got)
    tee.write(b"out")
    one.send("a")
    two.send("b")
    assert (one.raw, two.raw, got.data) == (b"out", b"out", b"ab")
    tee.close()
    assert one.closed
    assert two.closed


def test_tee_closes_all_even_when_one_fails():
    class Broken(Null):
        def close(self):
            raise OSError("stuck")

    console = Console()
    with pytest.raises(ExceptionGroup) as caught:
        Tee(Broken(), console).close()
    assert str(caught.value.exceptions[0]) == "stuck"
    assert console.closed


# -- escapes


def test_escape_commands_are_taken_out_in_order():
    events = []
    escape = Escape({"x": lambda: events.append("QUIT")})
    for piece in (b"ab\x01", b"xcd\x01\x01e", b"\x01Xf", b"\x01q", b"g\x01"):
        escape.filter(piece, events.append)
    assert events == [b"ab", "QUIT", b"cd\x01e", "QUIT", b"f", b"g"]


def test_mux_gives_the_keyboard_to_one_port_at_a_time():
    console = Console()
    mux = Mux(console)
    serial, monitor = mux.port("serial"), mux.port("monitor")
    to_serial, to_monitor = Received(), Received()
    serial.attach(to_serial)
    monitor.attach(to_monitor)
    console.send(b"ls\x01cinfo\x01c\x01\x01")
    serial.write(b"$ ")
    monitor.write(b"(m) ")
    assert (to_serial.data, to_monitor.data) == (b"ls\x01", b"info")
    assert console.transcript == "\r\n[monitor]\r\n\r\n[serial]\r\n$ (m) "
    assert mux.current == "serial"
    mux.close()
    assert console.closed


def test_mux_with_one_port_has_nothing_to_switch():
    console = Console()
    mux = Mux(console)
    console.send("lost")
    assert mux.current == ""
    port, got = mux.port("only"), Received()
    port.attach(got)
    console.send("\x01cx")
    assert (got.data, console.raw) == (b"x", b"")


# -- pty


@pytest.fixture
def pty():
    pty = Pty()
    yield pty
    pty.close()


def test_pty_carries_all_bytes_both_ways(pty):
    every = bytes(range(256))
    got = Received()
    pty.attach(got)
    terminal = os.open(pty.path, os.O_RDWR | os.O_NOCTTY)
    try:
        pty.write(every)
        assert read(terminal, 256) == every
        os.write(terminal, every)
        got.wait(every)
        assert not termios.tcgetattr(terminal)[3] & termios.ECHO
    finally:
        os.close(terminal)


def test_pty_can_be_left_and_opened_again(pty):
    got = Received()
    pty.attach(got)
    for word in (b"one", b"two"):
        terminal = os.open(pty.path, os.O_RDWR | os.O_NOCTTY)
        os.write(terminal, word)
        pty.write(word)
        assert read(terminal, 3) == word
        got.wait(b"one" if word == b"one" else b"onetwo")
        os.close(terminal)


def test_pty_without_a_reader_never_blocks_and_counts_what_it_drops(pty):
    for _ in range(20):
        pty.write(b"x" * 100_000)
    assert 2_000_000 - MAX_QUEUED - 100_000 < pty.dropped < 2_000_000 - MAX_QUEUED + 1
    terminal = os.open(pty.path, os.O_RDWR | os.O_NOCTTY)
    assert read(terminal, MAX_QUEUED) == b"x" * MAX_QUEUED
    os.close(terminal)


def test_pty_close_gives_everything_back():
    before = held()
    pty = Pty()
    pty.close()
    pty.close()
    pty.write(b"ignored")
    assert held() == before


# -- socket


@pytest.fixture
def path(tmp_path):
    return tmp_path / "serial.sock"


@pytest.fixture
def server(path):
    server = Socket.listen(path)
    yield server
    server.close()


def client_of(path):
    client = socket.socket(socket.AF_UNIX)
    client.settimeout(20)
    client.connect(os.fspath(path))
    return client


def test_socket_server_carries_bytes_both_ways(server, path):
    got = Received()
    server.attach(got)
    with client_of(path) as client:
        server.wait_connected(20)
        assert server.connected
        server.write(b"hello")
        assert read(client.fileno(), 5) == b"hello"
        client.sendall(bytes(range(256)))
        got.wait(bytes(range(256)))


def test_socket_server_takes_the_next_client_when_one_leaves(server, path):
    got = Received()
    server.attach(got)
    first = client_of(path)
    second = client_of(path)  # waits in the queue
    first.sendall(b"1")
    got.wait(b"1")
    first.close()
    second.sendall(b"2")
    got.wait(b"12")
    server.write(b"to the second")
    assert read(second.fileno(), 13) == b"to the second"
    second.close()


def test_socket_survives_a_receiver_that_raises(server, path, monkeypatch):
    reports = []
    monkeypatch.setattr(threading, "excepthook", reports.append)

    def broken(data):
        raise RuntimeError("broken device")

    server.attach(broken)
    with client_of(path) as client:
        client.sendall(b"x")
        assert client.recv(1) == b""  # hung up
    got = Received()
    server.attach(got)
    with client_of(path) as client:
        client.sendall(b"again")
        got.wait(b"again")
    assert [str(report.exc_value) for report in reports] == ["broken device"]


def test_socket_output_without_a_client_is_lost(server):
    server.write(b"nobody")
    with pytest.raises(TimeoutError, match="within 0 s"):
        server.wait_connected(0)


def test_socket_client_that_does_not_read_blocks_nobody(server, path):
    with client_of(path) as client:
        server.wait_connected(20)
        for _ in range(30):
            server.write(b"x" * 100_000)
        assert read(client.fileno(), MAX_QUEUED) == b"x" * MAX_QUEUED


def test_socket_client_side(path):
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.fspath(path))
        listener.listen(1)
        listener.settimeout(20)
        backend, got = Socket.connect(path), Received()
        peer, _ = listener.accept()
        peer.settimeout(20)
        backend.attach(got)
        backend.write(b"up")
        assert read(peer.fileno(), 2) == b"up"
        peer.sendall(b"down")
        got.wait(b"down")
        backend.write(b"last words")
        backend.close()
        assert read(peer.fileno(), 10) == b"last words"
        assert peer.recv(1) == b""
        peer.close()
    with pytest.raises(ConnectionRefusedError):
        Socket.connect(path)


def test_socket_close_wakes_waiters_and_removes_the_path(path):
    before = held()
    server = Socket.listen(path)
    with client_of(path) as client:
        server.wait_connected(20)
        server.close()
        server.close()
        assert client.recv(1) == b""
    assert not path.exists()
    with pytest.raises(StateError, match="closed"):
        server.wait_connected()
    assert held() == before


def test_socket_path_in_use_is_an_error(server, path):
    with pytest.raises(OSError, match="in use"):
        Socket.listen(path)
    assert path.exists()
