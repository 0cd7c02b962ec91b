# SPDX-License-Identifier: Apache-2.0
"""Network device, virtio 1.2 section 5.1: queue pairs and the control queue, over a `NetBackend` for each pair.

The packet path is C without the GIL (serve_net.c). Receiving and sending of a pair share a thread: both sides of a
frame are short system calls, and one thread keeps a guest's packets in order.
"""

from __future__ import annotations

import os
import struct
from collections import Counter
from collections.abc import Sequence
from typing import Any

from kvmpy.devices.base import StateReader
from kvmpy.errors import StateError
from kvmpy.net import backend as b
from kvmpy.virtio._queue import BLOCKED, GONE, IDLE, Chain, Limiter, NetServer
from kvmpy.virtio.device import VirtioDevice
from kvmpy.virtio.limits import NONE, RateLimit
from kvmpy.virtio.worker import IN, OUT, Worker

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
MQ = 1 << 22
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
    MQ: [CTRL_VQ],
    CTRL_GUEST_OFFLOADS: [CTRL_VQ],
}

LINK_UP = 1
MAX_PAIRS = 16
OK, ERR = b"\0", b"\1"
MAX_MACS = 64  # of a filter table; the device does not filter, so more only costs


class Pair:
    """A receive and a transmit queue, the back end they lead to, and what their worker listens for."""

    def __init__(self, number: int, backend: b.NetBackend, receive: Limiter, transmit: Limiter) -> None:
        self.rx, self.tx = 2 * number, 2 * number + 1
        self.backend = backend
        self.fd = os.dup(backend.fd)  # whoever closes the network before the card must not leave it with another's file
        self.server = NetServer(self.fd, vnet_header=backend.vnet_header, receive=receive, transmit=transmit)
        self.gone = False
        self.events = 0
        self.worker: Worker | None = None
        self.active = number == 0  # the driver uses it; without MQ there is but one (5.1.6.5.5)

    def close(self) -> None:
        """Close our descriptor; again is no error."""
        if self.fd >= 0:
            os.close(self.fd)
            self.fd = -1


class Net(VirtioDevice):
    """A network card for the guest.

    backend: where frames go; is closed with the device. Several of them, or one with several `queues` such as a `Tap`,
    make as many queue pairs, each with a thread; which of them are used is the driver's choice. mac:
    "52:54:00:12:34:56" or 6 bytes; default a random locally administered one. mtu: bytes to advise the driver of, or
    None. receive_limit, transmit_limit: of frames to and from the guest. The device does not filter by address: it is
    always promiscuous, as 5.1.6.5.1 permits.
    """

    device_id = 1

    def __init__(
        self,
        backend: b.NetBackend | b.QueuesBackend | Sequence[b.QueueBackend],
        *,
        name: str = "net",
        mac: str | bytes | None = None,
        mtu: int | None = None,
        receive_limit: RateLimit = NONE,
        transmit_limit: RateLimit = NONE,
        threaded: bool = True,
    ) -> None:
        if mtu is not None and not 68 <= mtu <= 65535:
            raise ValueError(f"an MTU is 68 to 65535 bytes, not {mtu}")
        self._networks: Sequence[b.NetBackend] = backend if isinstance(backend, Sequence) else (backend,)
        self._queue_backends: Sequence[b.QueueBackend] = (
            backend if isinstance(backend, Sequence) else getattr(backend, "queues", ())
        )
        backends = self._queue_backends or self._networks
        if not 1 <= len(backends) <= MAX_PAIRS:
            raise ValueError(f"a network card has 1 to {MAX_PAIRS} queue pairs, not {len(backends)}")
        if len({(one.vnet_header, one.offloads) for one in backends}) > 1:
            raise ValueError("the queues of a network card must lead to back ends with the same offloads")
        if any(one.fd < 0 for one in backends):
            raise StateError(f"{name}: its network is closed")
        self.mac = parse_mac(mac) if mac is not None else bytes([0x52, 0x54, 0x00, *os.urandom(3)])
        self._limiters = Limiter(), Limiter()
        self.receive_limit, self.transmit_limit = receive_limit, transmit_limit
        self._pairs = [Pair(number, one, *self._limiters) for number, one in enumerate(backends)]
        self._used_pairs = 1
        self._offloads: int | None = None  # GUEST_* that the driver chose after the start
        self.backend = first = self._networks[0]
        features = MAC | MRG_RXBUF | STATUS | CTRL_VQ | CTRL_RX | CTRL_MAC_ADDR
        features |= MTU if mtu is not None else 0
        features |= MQ if len(backends) > 1 else 0
        if first.vnet_header and first.offloads & b.TUN_F_CSUM:
            features |= CSUM | HOST_TSO4 | HOST_TSO6 | HOST_ECN | CTRL_GUEST_OFFLOADS
            features |= sum(bit for bit, tun in GUEST_OFFLOADS.items() if first.offloads & tun)
        self._first_config = self.mac + struct.pack("<HHH", LINK_UP, len(backends), mtu or 0)
        groups = [[pair.rx, pair.tx] for pair in self._pairs]
        groups[0].append(2 * len(groups))
        sizes = [256] * 2 * len(groups) + [64]
        super().__init__(name, sizes, features, self._first_config, groups=groups, threaded=threaded)
        for pair, worker in zip(self._pairs, self.workers, strict=True):
            pair.worker = worker

    @property
    def receive_limit(self) -> RateLimit:
        """How fast frames may come to the guest; can be changed at any time. What is too fast is lost or waits
        outside, as the back end has it.
        """
        return self._receive_limit

    @receive_limit.setter
    def receive_limit(self, limit: RateLimit) -> None:
        self._receive_limit = limit
        limit.apply(self._limiters[0])

    @property
    def transmit_limit(self) -> RateLimit:
        """How fast the guest may send; can be changed at any time. What is too fast waits in its queue."""
        return self._transmit_limit

    @transmit_limit.setter
    def transmit_limit(self, limit: RateLimit) -> None:
        self._transmit_limit = limit
        limit.apply(self._limiters[1])

    def check_features(self, accepted: int) -> bool:
        """Features that need others (5.1.3.1)."""
        return all(any(accepted & n for n in needed) for bit, needed in NEEDS.items() if accepted & bit)

    def activated(self) -> None:
        """Set up the back ends for what the driver accepted, and listen to them."""
        for pair in self._pairs:
            pair.server.negotiated(
                mergeable=self.accepted(MRG_RXBUF),
                csum=self.accepted(CSUM),
                tso4=self.accepted(HOST_TSO4),
                tso6=self.accepted(HOST_TSO6),
                ecn=self.accepted(HOST_ECN),
                ufo=False,
            )
        self._set_offloads(self.driver_features if self._offloads is None else self._offloads)
        self._use_pairs(self._used_pairs)

    def _set_offloads(self, features: int) -> None:
        """The driver takes what these GUEST_* bits say."""
        for pair in self._pairs:
            if pair.backend.vnet_header and not pair.gone:
                pair.backend.set_offloads(sum(tun for bit, tun in GUEST_OFFLOADS.items() if features & bit))

    def _use_pairs(self, count: int) -> None:
        """The driver uses the first `count` pairs."""
        self._used_pairs = count
        for number, pair in enumerate(self._pairs):
            if number < len(self._queue_backends) and not pair.gone:
                self._queue_backends[number].set_active(number < count)
            pair.active = number < count
            if pair.active:
                self.kick(pair.rx)

    def was_reset(self) -> None:
        """No offloads, one pair, the first MAC address, nothing received."""
        for pair in self._pairs:
            self._watch(pair, 0)
        self._offloads = None
        self._set_offloads(0)
        self._use_pairs(1)
        status = self._config[6:8]  # the host's, not the driver's
        self.put_config(0, self._first_config[:6] + status + self._first_config[8:], notify=False)

    def set_link(self, up: bool) -> None:
        """Plug or unplug the cable (5.1.4.1, STATUS)."""
        self.put_config(6, struct.pack("<H", LINK_UP if up else 0))

    # -- packets

    @property
    def _control_queue(self) -> int:
        """Behind all pairs that there are, or without MQ behind the first (5.1.2)."""
        return 2 * len(self._pairs) if self.accepted(MQ) else 2

    def serve(self, index: int) -> int:
        """A batch of one queue."""
        queue = self.queues[index]
        if index == self._control_queue:
            while (chain := queue.pop()) is not None:
                chain.write(self._control(chain))
                queue.push(chain)
            return IDLE
        pair = self._pairs[index // 2]
        if pair.gone:
            return GONE
        if index == pair.rx and not pair.active:
            self._watch(pair, 0, keep=OUT)
            return BLOCKED
        result = pair.server.receive(queue) if index == pair.rx else pair.server.transmit(queue)
        if result == GONE:
            self._lost(pair)
        elif index == pair.rx:
            # Without buffers there is no point in hearing of packets; with them, the descriptor wakes us.
            self._watch(pair, IN if result == BLOCKED else 0, keep=OUT)
        else:
            self._watch(pair, OUT if result == BLOCKED else 0, keep=IN)
        return result

    def _watch(self, pair: Pair, events: int, keep: int = 0) -> None:
        """Listen for `events` on the back end, beside those of `keep` that we listen for already."""
        events |= pair.events & keep
        if events == pair.events or pair.worker is None:
            return
        pair.events = events
        if events:
            pair.worker.watch(pair.fd, events, lambda: self._ready(pair))
        else:
            pair.worker.unwatch(pair.fd)

    def _ready(self, pair: Pair) -> None:
        # Which of the two it is costs a system call to find out; trying costs the same.
        events = pair.events
        if events & IN:
            self.serve_queue(pair.rx)
        if events & OUT:
            self.serve_queue(pair.tx)

    def _lost(self, pair: Pair) -> None:
        """The other end is gone: the cable is out."""
        pair.gone = True
        self._watch(pair, 0)
        error = pair.server.error
        self.warn("%s: the back end ended: %s", self.name, os.strerror(error) if error else "end of file")
        self.set_link(False)

    # -- control (5.1.6.5)

    def _control(self, chain: Chain) -> bytes:
        """The answer to one command: a class, a command, and its data."""
        if chain.readable < 2 or chain.writable < 1:
            self.queues[self._control_queue].fail("a control command without class, command or room for the answer")
            return ERR
        kind, command, *_ = chain.read(0, 2)
        data = chain.read(2, 16 + 2 * (4 + 6 * MAX_MACS))
        if chain.readable - 2 > len(data):
            return ERR
        if kind == 0 and self.accepted(CTRL_RX):  # promiscuous and friends: it is always all of that
            return OK if command <= 1 and len(data) == 1 and data[0] <= 1 else ERR
        if kind == 1:
            return self._mac(command, data)
        if kind == 4 and command == 0 and self.accepted(MQ) and len(data) == 2:
            count = int.from_bytes(data, "little")
            if not 1 <= count <= len(self._pairs):
                return ERR
            self._use_pairs(count)
            return OK
        if kind == 5 and command == 0 and self.accepted(CTRL_GUEST_OFFLOADS) and len(data) == 8:
            wanted = int.from_bytes(data, "little")
            if wanted & ~(self.driver_features & sum(GUEST_OFFLOADS)):
                return ERR
            self._offloads = wanted
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

    # -- state

    def save_device(self) -> dict[str, Any]:
        """What the driver set by commands."""
        return {
            "version": 1, "mac": bytes(self._config[:6]), "pairs": self._used_pairs, "offloads": self._offloads
        }  # fmt: skip

    def load_device(self, state: dict[str, Any]) -> None:
        """Raises ValueError."""
        reader = StateReader(self.name, state)
        mac = reader.data("mac", 6, 6)
        pairs = reader.integer("pairs", 1, len(self._pairs))
        offloads = reader.optional_integer("offloads", 0, sum(GUEST_OFFLOADS))
        reader.end()
        if offloads is not None and offloads & ~(self.driver_features & sum(GUEST_OFFLOADS)):
            raise ValueError(f"{self.name}: saved offloads {offloads:#x} were not negotiated")
        self.put_config(0, mac, notify=False)
        self._used_pairs, self._offloads = pairs, offloads  # for `activated`

    def stats(self) -> dict[str, Any]:
        """Live counters by name."""
        counts: Counter[str] = Counter()
        for pair in self._pairs:
            counts.update(pair.server.counts)
        throttled = {"rx_throttled": self._limiters[0].throttled, "tx_throttled": self._limiters[1].throttled}
        return {**super().stats(), **counts, **throttled}

    def close(self) -> None:
        """Stop and close the back ends."""
        super().close()
        for pair in self._pairs:
            pair.close()
        for network in self._networks:
            network.close()


def parse_mac(mac: str | bytes) -> bytes:
    """6 bytes from text like "52:54:00:12:34:56". Raises ValueError for group addresses and what is none."""
    try:
        value = bytes(int(part, 16) for part in mac.split(":")) if isinstance(mac, str) else bytes(mac)
    except ValueError:
        value = b""
    if len(value) != 6 or value[0] & 1 or not any(value):
        raise ValueError(f"not the MAC address of a card: {mac!r}")
    return value
