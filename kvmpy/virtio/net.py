# SPDX-License-Identifier: Apache-2.0
"""Network device, virtio 1.2 section 5.1: one queue pair and the control queue, over a `NetBackend`.

The packet path is C without the GIL (serve_net.c). Receiving and sending share a thread: both sides of a frame are
short system calls, and one thread keeps a guest's packets in order.
"""

from __future__ import annotations

import os
import struct

from kvmpy.virtio import net_backend as b
from kvmpy.virtio._queue import BLOCKED, GONE, IDLE, Chain, NetServer
from kvmpy.virtio.device import VirtioDevice
from kvmpy.virtio.worker import IN, OUT

# Features (5.1.3).
CSUM = 1 << 0
GUEST_CSUM = 1 << 1
CTRL_GUEST_OFFLOADS = 1 << 2
MTU = 1 << 3
MAC = 1 << 5
GUEST_TSO4 = 1 << 7
GUEST_TSO6 = 1 << 8
GUEST_ECN = 1 << 9
HOST_TSO4 = 1 << 11
HOST_TSO6 = 1 << 12
HOST_ECN = 1 << 13
MRG_RXBUF = 1 << 15
STATUS = 1 << 16
CTRL_VQ = 1 << 17
CTRL_RX = 1 << 18
CTRL_MAC_ADDR = 1 << 23

GUEST_OFFLOADS = {
    GUEST_CSUM: b.TUN_F_CSUM,
    GUEST_TSO4: b.TUN_F_TSO4,
    GUEST_TSO6: b.TUN_F_TSO6,
    GUEST_ECN: b.TUN_F_TSO_ECN,
}
# (needs one of these, too): 5.1.3.1.
NEEDS = {
    GUEST_TSO4: [GUEST_CSUM],
    GUEST_TSO6: [GUEST_CSUM],
    GUEST_ECN: [GUEST_TSO4, GUEST_TSO6],
    HOST_TSO4: [CSUM],
    HOST_TSO6: [CSUM],
    HOST_ECN: [HOST_TSO4, HOST_TSO6],
    CTRL_RX: [CTRL_VQ],
    CTRL_MAC_ADDR: [CTRL_VQ],
    CTRL_GUEST_OFFLOADS: [CTRL_VQ],
}

LINK_UP = 1
RX, TX, CONTROL = 0, 1, 2
OK, ERR = b"\0", b"\1"
MAX_MACS = 64  # of a filter table; the device does not filter, so more only costs


class Net(VirtioDevice):
    """A network card for the guest.

    backend: where frames go; is closed with the device. mac: "52:54:00:12:34:56" or 6 bytes; default a random
    locally administered one. mtu: bytes to advise the driver of, or None. The device does not filter by address:
    it is always promiscuous, as 5.1.6.5.1 permits.
    """

    device_id = 1

    def __init__(
        self,
        backend: b.NetBackend,
        *,
        name: str = "net",
        mac: str | bytes | None = None,
        mtu: int | None = None,
        threaded: bool = True,
    ) -> None:
        if mtu is not None and not 68 <= mtu <= 65535:
            raise ValueError(f"an MTU is 68 to 65535 bytes, not {mtu}")
        self.backend = backend
        self.mac = parse_mac(mac) if mac is not None else bytes([0x52, 0x54, 0x00, *os.urandom(3)])
        self._server = NetServer(backend.fd, vnet_header=backend.vnet_header)
        features = MAC | MRG_RXBUF | STATUS | CTRL_VQ | CTRL_RX | CTRL_MAC_ADDR
        features |= MTU if mtu is not None else 0
        if backend.vnet_header and backend.offloads & b.TUN_F_CSUM:
            features |= CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN | CTRL_GUEST_OFFLOADS
            features |= sum(bit for bit, tun in GUEST_OFFLOADS.items() if backend.offloads & tun)
        self._first_config = self.mac + struct.pack("<HHH", LINK_UP, 1, mtu or 0)
        self._gone = False
        super().__init__(name, [256, 256, 64], features, self._first_config, threaded=threaded)

    def check_features(self, accepted: int) -> bool:
        """Features that need others (5.1.3.1)."""
        return all(any(accepted & n for n in needed) for bit, needed in NEEDS.items() if accepted & bit)

    def activated(self) -> None:
        """Set up the back end for what the driver accepted, and listen to it."""
        self._server.negotiated(
            mergeable=self.accepted(MRG_RXBUF),
            csum=self.accepted(CSUM),
            tso4=self.accepted(HOST_TSO4),
            tso6=self.accepted(HOST_TSO6),
            ecn=self.accepted(HOST_ECN),
            ufo=False,
        )
        self._set_offloads(self.driver_features)

    def _set_offloads(self, features: int) -> None:
        if self.backend.vnet_header:
            self.backend.set_offloads(sum(tun for bit, tun in GUEST_OFFLOADS.items() if features & bit))

    def was_reset(self) -> None:
        """No offloads, the first MAC address, nothing received."""
        self._watch(0)
        if not self._gone:
            self._set_offloads(0)
        status = self._config[6:8]  # the host's, not the driver's
        self.put_config(0, self._first_config[:6] + status + self._first_config[8:], notify=False)

    def set_link(self, up: bool) -> None:
        """Plug or unplug the cable (5.1.4.1, STATUS)."""
        self.put_config(6, struct.pack("<H", LINK_UP if up else 0))

    # -- packets

    def serve(self, index: int) -> int:
        """A batch of one queue."""
        queue = self.queues[index]
        if index == CONTROL:
            while (chain := queue.pop()) is not None:
                chain.write(self._control(chain))
                queue.push(chain)
            return IDLE
        if self._gone:
            return GONE
        result = self._server.receive(queue) if index == RX else self._server.transmit(queue)
        if result == GONE:
            self._lost()
        elif index == RX:
            # Without buffers there is no point in hearing of packets; with them, the descriptor wakes us.
            self._watch(IN if result == BLOCKED else 0, keep=OUT)
        else:
            self._watch(OUT if result == BLOCKED else 0, keep=IN)
        return result

    _events = 0

    def _watch(self, events: int, keep: int = 0) -> None:
        """Listen for `events` on the back end, beside those of `keep` that we listen for already."""
        events |= self._events & keep
        if events == self._events:
            return
        self._events = events
        if events:
            self.workers[0].watch(self.backend.fd, events, self._ready)
        else:
            self.workers[0].unwatch(self.backend.fd)

    def _ready(self) -> None:
        # Which of the two it is costs a system call to find out; trying costs the same.
        events = self._events
        if events & IN:
            self.serve_queue(RX)
        if events & OUT:
            self.serve_queue(TX)

    def _lost(self) -> None:
        """The other end is gone: the cable is out."""
        self._gone = True
        self._watch(0)
        error = self._server.error
        self.warn("%s: the back end ended: %s", self.name, os.strerror(error) if error else "end of file")
        self.set_link(False)

    # -- control (5.1.6.5)

    def _control(self, chain: Chain) -> bytes:
        """The answer to one command: a class, a command, and its data."""
        if chain.readable < 2 or chain.writable < 1:
            self.queues[CONTROL].fail("a control command without class, command or room for the answer")
            return ERR
        kind, command, *_ = chain.read(0, 2)
        data = chain.read(2, 16 + 2 * (4 + 6 * MAX_MACS))
        if chain.readable - 2 > len(data):
            return ERR
        if kind == 0 and self.accepted(CTRL_RX):  # promiscuous and friends: it is always all of that
            return OK if command <= 1 and len(data) == 1 and data[0] <= 1 else ERR
        if kind == 1:
            return self._mac(command, data)
        if kind == 5 and command == 0 and self.accepted(CTRL_GUEST_OFFLOADS) and len(data) == 8:
            wanted = int.from_bytes(data, "little")
            if wanted & ~(self.driver_features & sum(GUEST_OFFLOADS)):
                return ERR
            self._set_offloads(wanted)
            return OK
        return ERR

    def _mac(self, command: int, data: bytes) -> bytes:
        if command == 0 and self.accepted(CTRL_RX):  # the filter table: two counted lists
            for _ in range(2):
                if len(data) < 4:
                    return ERR
                count = int.from_bytes(data[:4], "little")
                if count > MAX_MACS or len(data) < 4 + 6 * count:
                    return ERR
                data = data[4 + 6 * count :]
            return ERR if data else OK
        if command == 1 and self.accepted(CTRL_MAC_ADDR) and len(data) == 6:
            self.put_config(0, data, notify=False)
            return OK
        return ERR

    def stats(self) -> dict[str, int]:
        """Live counters by name."""
        return {**super().stats(), **self._server.counts}

    def close(self) -> None:
        """Stop and close the back end."""
        super().close()
        self.backend.close()


def parse_mac(mac: str | bytes) -> bytes:
    """6 bytes from text like "52:54:00:12:34:56". Raises ValueError for group addresses and what is none."""
    try:
        value = bytes(int(part, 16) for part in mac.split(":")) if isinstance(mac, str) else bytes(mac)
    except ValueError:
        value = b""
    if len(value) != 6 or value[0] & 1 or not any(value):
        raise ValueError(f"not the MAC address of a card: {mac!r}")
    return value
