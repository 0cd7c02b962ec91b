# SPDX-License-Identifier: Apache-2.0
"""A switch in this process: machines, taps, streams and user-mode networks on one Ethernet."""

from __future__ import annotations

import socket
import threading

from kvmpy.errors import NetworkError, StateError
from kvmpy.net._hub import PLAIN, VNET, Hub
from kvmpy.net.backend import OFFLOADS, Closing, NetBackend, wire


class Switch(Closing):
    """Learns behind which port an address is; sends broadcasts, groups and what is unknown to all ports.

    `port()` makes an end for a machine's network card, `connect()` takes any back end as an uplink:

        switch = Switch()
        switch.connect(UserNet())
        first, second = switch.port(), switch.port()      # each a back end of a card

    flood_limit: frames per second that a port may send to all; what is more is dropped. Frames for a port that is
    full are dropped, so that a guest that stands still holds up nobody. 64 ports. Raises NetworkError.
    """

    def __init__(self, *, flood_limit: int = 10_000) -> None:
        if not 1 <= flood_limit <= 1 << 30:
            raise ValueError(f"a flood limit is at least 1 frame per second, not {flood_limit}")
        self._ports: list[SwitchPort] = []
        self._uplinks: list[tuple[int, NetBackend]] = []
        self._closed = False
        try:
            self._hub = Hub(flood_rate=flood_limit)
        except OSError as error:
            raise NetworkError(f"no switch: {error.strerror}") from error
        self._thread = threading.Thread(target=self._hub.run, name="kvmpy-switch", daemon=True)
        self._thread.start()

    def port(self, *, mac: str | bytes | None = None) -> SwitchPort:
        """A new port, for a network card. mac: the only address that may send from it; else a guest can take others'.

        Raises NetworkError when all ports are taken, ValueError.
        """
        if self._closed:
            raise StateError("the switch is closed")
        only = None
        if mac is not None:
            only = bytes.fromhex(mac.replace(":", "")) if isinstance(mac, str) else bytes(mac)
            if len(only) != 6 or only[0] & 1:
                raise ValueError(f"not the MAC address of a card: {mac!r}")
        ours, theirs = wire()
        try:
            number = self._hub.add(VNET, theirs.fileno(), 0, only)
        except OSError as error:
            ours.close()
            theirs.close()
            raise NetworkError(f"the switch has no port left: {error.strerror}") from error
        port = SwitchPort(self, self._hub, number, ours, theirs)
        self._ports.append(port)
        return port

    def connect(self, backend: NetBackend) -> None:
        """Plug in a back end, which is closed with the switch: a `Tap`, a `UserNet`, a `StreamSocket`, another's
        port."""
        if self._closed or backend.fd < 0:
            raise StateError("the switch is closed" if self._closed else f"{backend!r} is closed")
        try:
            number = self._hub.add(VNET if backend.vnet_header else PLAIN, backend.fd, backend.offloads)
        except OSError as error:
            raise NetworkError(f"the switch cannot take {backend!r}: {error.strerror}") from error
        backend.set_offloads(OFFLOADS)  # what the receiver of a frame does not take is done here
        self._uplinks.append((number, backend))

    def stats(self) -> dict[str, int]:
        """Counters of all ports, added up."""
        total: dict[str, int] = {}
        for number in [port.number for port in self._ports] + [number for number, _ in self._uplinks]:
            for name, value in self._hub.state(number)[2].items():
                total[name] = total.get(name, 0) + value
        return total

    def close(self) -> None:
        """Unplug the ports, whose cards see it, and close what was connected; again is no error."""
        if self._closed:
            return
        for port in self._ports[:]:
            port.unplug()
        self._closed = True
        self._hub.stop()
        self._thread.join()
        self._hub.close()
        for _, backend in self._uplinks:
            backend.close()

    def _gone(self, port: SwitchPort) -> None:
        self._ports.remove(port)


class SwitchPort(Closing):
    """A port of a `Switch`: a back end. Closed with its card; a switch that closes before only pulls the cable out."""

    vnet_header = True
    offloads = OFFLOADS

    def __init__(self, switch: Switch, hub: Hub, number: int, ours: socket.socket, theirs: socket.socket) -> None:
        self._switch = switch
        self._hub = hub
        self.number = number
        self._ends = ours, theirs
        self.fd = ours.fileno()
        self._closed = False

    def set_offloads(self, offloads: int) -> None:
        """What the guest's driver takes."""
        if not self._closed:
            self._hub.takes(self.number, offloads)

    def stats(self) -> dict[str, int]:
        """Live counters by name; rx is from the guest."""
        return self._hub.state(self.number)[2]

    def unplug(self) -> None:
        """Give the switch's end back; the card hears that its peer is gone. Again is no error."""
        if self._closed:
            return
        self._closed = True
        self._switch._gone(self)
        self._hub.remove(self.number)
        self._ends[1].close()

    def close(self) -> None:
        """Unplug it and close the card's end; again is no error."""
        self.unplug()
        self.fd = -1
        self._ends[0].close()

    def __del__(self) -> None:
        self._ends[0].close()  # of a port that no card ever had
