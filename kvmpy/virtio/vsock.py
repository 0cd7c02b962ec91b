# SPDX-License-Identifier: Apache-2.0
"""Socket device, virtio 1.2 section 5.10: stream sockets between programs of the guest and of the host.

The host's side is Unix sockets, without any kernel module, in the way that Firecracker made known:

    guest -> host   connect to CID 2, port P: the device connects to the Unix socket `PATH_P`
    host -> guest   connect to `PATH`, send "CONNECT P\\n", read "OK n\\n": the guest's program that listens at P
"""

from __future__ import annotations

import contextlib
import os
import re
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Any

from kvmpy.devices.base import StateReader
from kvmpy.virtio._queue import BLOCKED, IDLE, Chain
from kvmpy.virtio.device import VirtioDevice
from kvmpy.virtio.worker import IN, OUT

HOST_CID = 2
RX, TX, EVENT = 0, 1, 2
HEADER = struct.Struct("<QQIIIHHIII")  # 5.10.6: struct virtio_vsock_hdr
STREAM = 1
REQUEST, RESPONSE, RST, SHUTDOWN, RW, CREDIT_UPDATE, CREDIT_REQUEST = range(1, 8)
NO_RECEIVE, NO_SEND = 1, 2
TRANSPORT_RESET = b"\0\0\0\0"

BUFFER = 256 * 1024      # of each connection, for what the guest sends
MAX_CONNECTIONS = 256    # each costs a descriptor of the host
MAX_MESSAGES = 1024      # that wait for the guest to take them; with more, its requests wait
FIRST_PORT = 1 << 30     # of connections from the host
GREETING = re.compile(rb"CONNECT (\d{1,10})\n")
GREETING_SIZE = 32


class Connection:
    """One stream: a Unix socket, and the accounts of both directions (5.10.6.3)."""

    def __init__(self, sock: socket.socket, host_port: int, guest_port: int) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.fd = sock.fileno()
        self.host_port = host_port
        self.guest_port = guest_port
        self.out = bytearray()     # from the guest, not yet taken by the socket
        self.forwarded = 0         # bytes that the socket took (fwd_cnt)
        self.told = 0              # ... as the guest knows it
        self.sent = 0              # bytes that the guest was given
        self.peer_buffer = 0       # the guest's buf_alloc and fwd_cnt
        self.peer_forwarded = 0
        self.open = False          # both ends agreed
        self.readable = False      # the socket has something for the guest
        self.ended = False         # the socket gives no more
        self.shut = 0              # what the guest said it will not do any more

    @property
    def credit(self) -> int:
        """Bytes that the guest has room for."""
        return max(0, self.peer_buffer - (self.sent - self.peer_forwarded & 0xFFFF_FFFF))


class Vsock(VirtioDevice):
    """Stream sockets for the guest.

    cid: the guest's address, from 3 on. path: of the Unix sockets; its server is made here and removed at `close`.
    Whoever may connect to `path` reaches every port the guest listens at; guests reach every socket called `path_PORT`.
    """

    device_id = 19

    def __init__(self, cid: int, path: str | os.PathLike[str], *, name: str = "vsock", threaded: bool = True) -> None:
        if not 3 <= cid < 0xFFFF_FFFF:
            raise ValueError(f"a guest's CID is 3 to 0xfffffffe, not {cid:#x}")
        self.cid = cid
        self.path = os.fspath(path)
        self._server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            self._server.setblocking(False)
            self._server.bind(self.path)
            self._server.listen(64)
        except BaseException:
            self._server.close()
            raise
        self._connections: dict[tuple[int, int], Connection] = {}
        self._guests: dict[int, socket.socket] = {}  # fd -> a client of `path` that has not said its port yet
        self._messages: deque[bytes] = deque()
        self._next_port = FIRST_PORT
        self._reset_event = False
        self._counts = {"connections": 0, "refused": 0, "to_guest": 0, "from_guest": 0}
        super().__init__(name, [128, 128, 16], 0, struct.pack("<Q", cid), threaded=threaded)
        self.workers[0].watch(self._server.fileno(), IN, self._accept)

    # -- life

    def was_reset(self) -> None:
        """All connections end: the guest knows none of them any more."""
        for connection in list(self._connections.values()):
            self._drop(connection)
        for sock in list(self._guests.values()):
            self._forget(sock)
        self._messages.clear()

    def close(self) -> None:
        """End all connections and remove the server's socket."""
        if self._closed:
            return
        self.stop()
        self.workers[0].unwatch(self._server.fileno())
        super().close()
        self._server.close()
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path)  # noqa: PTH108

    def save_device(self) -> dict[str, Any]:
        """Nothing: connections do not survive, the guest is told so (5.10.6.7)."""
        return {"version": 1}

    def load_device(self, state: dict[str, Any]) -> None:
        """Raises ValueError."""
        StateReader(self.name, state).end()
        self._reset_event = True

    def stats(self) -> dict[str, Any]:
        """Live counters by name."""
        return {**super().stats(), **self._counts, "open": len(self._connections)}

    # -- queues

    def serve(self, index: int) -> int:
        """A batch of one queue."""
        if index == RX:
            stuck = len(self._messages) >= MAX_MESSAGES
            result = self._give()
            if stuck and len(self._messages) < MAX_MESSAGES:
                self.kick(TX)
            return result
        if index == EVENT:
            if self._reset_event and (chain := self.queues[EVENT].pop()) is not None:
                chain.write(TRANSPORT_RESET)
                self.queues[EVENT].push(chain)
                self._reset_event = False
            return IDLE
        while len(self._messages) < MAX_MESSAGES:
            taken = self.queues[TX].pop()
            if taken is None:
                return IDLE
            self._packet(taken)
            self.queues[TX].push(taken)
        return BLOCKED  # until the guest takes messages

    def _give(self) -> int:
        """Messages, then data, as long as the guest has buffers."""
        queue = self.queues[RX]
        while self._messages:
            chain = queue.pop()
            if chain is None:
                return IDLE
            self._put(chain, self._messages.popleft())
        for connection in list(self._connections.values()):
            while connection.readable and connection.open and not connection.shut & NO_RECEIVE and connection.credit:
                chain = queue.pop()
                if chain is None:
                    return IDLE
                room = min(chain.writable - HEADER.size, connection.credit, 1 << 16)
                data = self._receive(connection, room) if room > 0 else None
                if not data:
                    queue.unpop(chain)
                    if room <= 0:
                        queue.fail("a receive buffer without room for data", chain.writable)
                        return IDLE
                    break
                connection.sent = connection.sent + len(data) & 0xFFFF_FFFF
                self._counts["to_guest"] += len(data)
                self._put(chain, self._header(connection, RW, size=len(data)) + data)
        return self._give() if self._messages else IDLE

    def _put(self, chain: Chain, packet: bytes) -> None:
        queue = self.queues[RX]
        if chain.readable or chain.write(packet) < len(packet):
            queue.fail("a receive buffer that is too small or not writable", chain.writable)
        queue.push(chain)

    # -- packets

    def _header(self, connection: Connection, op: int, *, flags: int = 0, size: int = 0) -> bytes:
        connection.told = connection.forwarded
        ports = (connection.host_port, connection.guest_port)
        account = (BUFFER, connection.forwarded & 0xFFFF_FFFF)
        return HEADER.pack(HOST_CID, self.cid, *ports, size, STREAM, op, flags, *account)

    def _tell(self, connection: Connection, op: int, flags: int = 0) -> None:
        self._messages.append(self._header(connection, op, flags=flags))
        self.kick(RX)

    def _refuse(self, host_port: int, guest_port: int, kind: int = STREAM) -> None:
        self._counts["refused"] += 1
        self._messages.append(HEADER.pack(HOST_CID, self.cid, host_port, guest_port, 0, kind, RST, 0, 0, 0))
        self.kick(RX)

    def _packet(self, chain: Chain) -> None:
        """One packet of the guest."""
        header = chain.read(0, HEADER.size)
        if len(header) < HEADER.size:
            self.queues[TX].fail("a packet without a header", chain.readable)
            return
        src_cid, dst_cid, guest_port, host_port, size, kind, op, flags, buf_alloc, fwd_cnt = HEADER.unpack(header)
        if src_cid != self.cid:
            return  # not from this guest (5.10.6.4)
        connection = self._connections.get((host_port, guest_port))
        if dst_cid != HOST_CID or kind != STREAM or size > chain.readable - HEADER.size:
            if op != RST:
                self._refuse(host_port, guest_port, kind)
            return
        if connection is None:
            if op == REQUEST:
                self._connect(host_port, guest_port, buf_alloc, fwd_cnt)
            elif op != RST:
                self._refuse(host_port, guest_port)
            return
        connection.peer_buffer, connection.peer_forwarded = buf_alloc, fwd_cnt
        if op == RST:
            self._drop(connection)
        elif op == RW and connection.open and not connection.shut & NO_SEND:
            self._from_guest(connection, chain.read(HEADER.size, size), size)
        elif op == RESPONSE and not connection.open:
            connection.open = True
            self._write(connection, b"OK %d\n" % connection.host_port, count=False)
        elif op == SHUTDOWN and connection.open:
            connection.shut |= flags & (NO_RECEIVE | NO_SEND)
            self._flush(connection)
        elif op == CREDIT_REQUEST:
            self._tell(connection, CREDIT_UPDATE)
        elif op != CREDIT_UPDATE:
            self._end(connection)
            return
        self.kick(RX)  # there may be new credit
        self._listen(connection)

    def _connect(self, host_port: int, guest_port: int, buf_alloc: int, fwd_cnt: int) -> None:
        """The guest wants to reach `path_PORT`."""
        if len(self._connections) + len(self._guests) >= MAX_CONNECTIONS:
            self._refuse(host_port, guest_port)
            return
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.setblocking(False)
            sock.connect(f"{self.path}_{host_port}")
        except OSError:
            sock.close()
            self._refuse(host_port, guest_port)
            return
        connection = self._add(sock, host_port, guest_port)
        connection.open = True
        connection.peer_buffer, connection.peer_forwarded = buf_alloc, fwd_cnt
        self._tell(connection, RESPONSE)
        self._listen(connection)

    # -- sockets

    def _add(self, sock: socket.socket, host_port: int, guest_port: int) -> Connection:
        connection = Connection(sock, host_port, guest_port)
        self._connections[host_port, guest_port] = connection
        self._counts["connections"] += 1
        return connection

    def _listen(self, connection: Connection) -> None:
        """Watch for what can be used now: what waits already needs no watching."""
        if self._connections.get((connection.host_port, connection.guest_port)) is not connection:
            return
        wants = IN if connection.open and not connection.readable and not connection.ended else 0
        wants |= OUT if connection.out else 0
        if wants:
            self.workers[0].watch(connection.fd, wants, lambda: self._ready(connection))
        else:
            self.workers[0].unwatch(connection.fd)

    def _ready(self, connection: Connection) -> None:
        connection.readable = connection.open and not connection.ended
        self._flush(connection)
        self._listen(connection)
        self.serve_queue(RX)

    def _receive(self, connection: Connection, size: int) -> bytes | None:
        """Bytes for the guest; None: nothing now, or the end, of which the guest is told."""
        data: bytes | None = None
        try:
            data = connection.sock.recv(size)
        except BlockingIOError:
            connection.readable = False
        except OSError:
            self._end(connection)
            return None
        if data == b"":
            connection.readable, connection.ended = False, True
            self._tell(connection, SHUTDOWN, NO_SEND)
        self._listen(connection)
        return data

    def _from_guest(self, connection: Connection, data: bytes, size: int) -> None:
        if len(data) < size or len(connection.out) + size > BUFFER:
            self._end(connection)  # more than the credit it was given (5.10.6.3)
            return
        self._counts["from_guest"] += size
        self._write(connection, data)

    def _write(self, connection: Connection, data: bytes, *, count: bool = True) -> None:
        if not count:
            connection.forwarded -= len(data)  # our own words are not the guest's
            connection.told -= len(data)
        connection.out += data
        self._flush(connection)

    def _flush(self, connection: Connection) -> None:
        """Give the socket what it takes, and the guest credit for it."""
        try:
            while connection.out:
                done = connection.sock.send(connection.out)
                del connection.out[:done]
                connection.forwarded += done
        except BlockingIOError:
            pass
        except OSError:
            self._end(connection)
            return
        if connection.forwarded - connection.told >= BUFFER // 2:
            self._tell(connection, CREDIT_UPDATE)
        if not connection.out and connection.shut & NO_SEND:
            with contextlib.suppress(OSError):
                connection.sock.shutdown(socket.SHUT_WR)
            if connection.shut & NO_RECEIVE:
                self._end(connection)  # a reset ends it cleanly (5.10.6.5)

    def _end(self, connection: Connection) -> None:
        """Close a connection and tell the guest."""
        self._tell(connection, RST)
        self._drop(connection)

    def _drop(self, connection: Connection) -> None:
        if self._connections.pop((connection.host_port, connection.guest_port), None) is not None:
            self.workers[0].unwatch(connection.fd)
            connection.readable = False
            connection.sock.close()

    # -- clients of `path`

    def _accept(self) -> None:
        try:
            sock, _ = self._server.accept()
        except OSError:
            return
        if len(self._connections) + len(self._guests) >= MAX_CONNECTIONS:
            sock.close()
            return
        sock.setblocking(False)
        self._guests[sock.fileno()] = sock
        self.workers[0].watch(sock.fileno(), IN, self._greeter(sock))

    def _greeter(self, sock: socket.socket) -> Callable[[], None]:
        said = bytearray()

        def read() -> None:
            try:
                # Byte by byte to the end of the line: what follows belongs to the guest.
                while not said.endswith(b"\n") and len(said) < GREETING_SIZE:
                    byte = sock.recv(1)
                    if not byte:
                        break
                    said.extend(byte)
            except BlockingIOError:
                return
            except OSError:
                said.clear()
            match = GREETING.fullmatch(said)
            if match is None or int(match[1]) > 0xFFFF_FFFE:
                self._forget(sock)
                return
            self.workers[0].unwatch(sock.fileno())
            del self._guests[sock.fileno()]
            self._tell(self._add(sock, self._free_port(), int(match[1])), REQUEST)

        return read

    def _forget(self, sock: socket.socket) -> None:
        if self._guests.pop(sock.fileno(), None) is not None:
            self.workers[0].unwatch(sock.fileno())
            sock.close()

    def _free_port(self) -> int:
        used = {host_port for host_port, _ in self._connections}
        while True:
            self._next_port = self._next_port + 1 if self._next_port < 0xFFFF_FFF0 else FIRST_PORT
            if self._next_port not in used:
                return self._next_port
