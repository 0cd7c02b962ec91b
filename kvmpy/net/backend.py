# SPDX-License-Identifier: Apache-2.0
"""What a network card's other end is: a descriptor that moves one Ethernet frame per read(2) and write(2)."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from types import TracebackType
from typing import Protocol, Self

# <linux/if_tun.h>
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN, TUN_F_UFO = 0x01, 0x02, 0x04, 0x08, 0x10
OFFLOADS = TUN_F_CSUM | TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN

HEADER_SIZE = 12  # struct virtio_net_hdr with num_buffers (virtio 1.2, 5.1.6)
MAX_FRAME = 65562  # bytes: 65535 of IP, headers of Ethernet and VLAN, and room
SOCKET_BUFFER = 4 << 20  # bytes that wait between two ends, if the host allows as many


class NetBackend(Protocol):
    """The outside end of a network device.

    fd: non-blocking; one frame per read and write; -1 when closed. Who uses it (a card, a switch, a capture) does so by
    a duplicate, so that a network that is closed first only takes the cable out. vnet_header: frames carry struct
    virtio_net_hdr of 12 bytes, so checksums and segmentation can be left to the other end. offloads: the TUN_F_* bits
    that it can take.
    """

    fd: int
    vnet_header: bool
    offloads: int

    def set_offloads(self, offloads: int) -> None:
        """Frames that it gives may need these TUN_F_* from now on; called at every reset and start."""
        ...

    def close(self) -> None:
        """Release what is open; again is no error."""
        ...


class QueueBackend(NetBackend, Protocol):
    """One of several queue pairs to the same place, such as the queues of one tap interface."""

    def set_active(self, active: bool) -> None:
        """Does the driver use this pair? If not, nothing may come from it."""
        ...


class QueuesBackend(NetBackend, Protocol):
    """A back end of several queue pairs, which is itself the first of them: the others are not active at first."""

    queues: Sequence[QueueBackend]


class Closing:
    """A back end, or something with back ends, as a context manager."""

    def close(self) -> None:
        """Release what is open; again is no error."""
        raise NotImplementedError

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class PacketSocket(Closing):
    """A socket that keeps message boundaries: AF_UNIX SOCK_DGRAM or SOCK_SEQPACKET; no offloads.

    sock: belongs to the back end from now on.
    """

    vnet_header = False
    offloads = 0

    def __init__(self, sock: socket.socket) -> None:
        if sock.type not in (socket.SOCK_DGRAM, socket.SOCK_SEQPACKET):
            raise ValueError("a packet socket keeps message boundaries: SOCK_DGRAM or SOCK_SEQPACKET")
        sock.setblocking(False)
        self._sock = sock
        self.fd = sock.fileno()

    @classmethod
    def pair(cls) -> tuple[PacketSocket, socket.socket]:
        """A back end and the socket at its other end: what one sends, the other receives."""
        ours, theirs = wire()
        theirs.setblocking(True)
        return cls(ours), theirs

    def set_offloads(self, offloads: int) -> None:
        """Nothing: frames are complete."""

    def close(self) -> None:
        """Close the socket."""
        self.fd = -1
        self._sock.close()


def wire() -> tuple[socket.socket, socket.socket]:
    """Two connected sockets that keep message boundaries, with room for a few large frames. Raises OSError."""
    ends = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in ends:
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, SOCKET_BUFFER)  # the host may give less
        end.setblocking(False)
    return ends
