# SPDX-License-Identifier: Apache-2.0
"""Messages as interrupts: each vector has an eventfd that the engine turns into its message.

A vector's GSI exists only for its route (KVM_SET_GSI_ROUTING, KVM_IRQFD). The routing table is replaced as a whole
(api.rst 4.52), so one object keeps it, with the pins of the chips as the engine has them at first.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Iterable
from typing import Protocol

from kvmpy._constants import KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE
from kvmpy._structs import IrqRoutingEntry, route_irqchip, route_msi

IOAPIC_PINS = 24
LAST_GSI = 4095  # KVM_MAX_IRQ_ROUTES is 4096


class HasMsi(Protocol):
    """The part of `kvmpy.Vm` that is needed here."""

    def set_gsi_routing(self, entries: Iterable[IrqRoutingEntry], /) -> object:
        """KVM_SET_GSI_ROUTING, api.rst 4.52."""
        ...

    def irqfd(self, fd: int, gsi: int, *, resample: int | None = None, deassign: bool = False) -> object:
        """KVM_IRQFD, api.rst 4.75."""
        ...


class MsiLine(Protocol):
    """Where a vector's messages go."""

    def route(self, address: int, data: int) -> bool:
        """Send this message from now on; False when the interrupt chips do not take it."""
        ...

    def signal(self) -> None:
        """Send the message."""
        ...

    def close(self) -> None:
        """Send no more; again is no error."""
        ...


class MsiSource(Protocol):
    """What makes lines: `MsiRoutes`, or a double in tests."""

    def line(self) -> MsiLine:
        """A new line without a route."""
        ...


class MsiRoutes:
    """The routing table of a VM. vm: with its interrupt chips made. first: the first GSI for messages."""

    def __init__(self, vm: HasMsi, first: int = IOAPIC_PINS) -> None:
        self._vm = vm
        self._lock = threading.Lock()
        self._routes: dict[int, tuple[int, int]] = {}
        self._free = list(range(LAST_GSI, first - 1, -1))

    def line(self) -> MsiLine:
        """A new line. Raises OSError (no descriptors), ValueError (no GSI)."""
        with self._lock:
            if not self._free:
                raise ValueError(f"all {LAST_GSI + 1} GSIs are taken")
            gsi = self._free.pop()
        return _Line(self, self._vm, gsi)

    def set(self, gsi: int, message: tuple[int, int] | None) -> bool:
        """Route a GSI to (address, data), or to nothing; False when the engine refuses the message."""
        with self._lock:
            old = self._routes.get(gsi)
            self._put(gsi, message)
            try:
                self._vm.set_gsi_routing(self._table())
            except OSError:
                self._put(gsi, old)
                return False
            return True

    def _put(self, gsi: int, message: tuple[int, int] | None) -> None:
        if message is None:
            self._routes.pop(gsi, None)
        else:
            self._routes[gsi] = message

    def release(self, gsi: int) -> None:
        """The GSI can be given to another line."""
        with self._lock:
            self._routes.pop(gsi, None)
            self._free.append(gsi)

    def _table(self) -> list[IrqRoutingEntry]:
        pins = [route_irqchip(gsi, KVM_IRQCHIP_IOAPIC, gsi) for gsi in range(IOAPIC_PINS)]
        pins += [route_irqchip(gsi, KVM_IRQCHIP_PIC_MASTER, gsi) for gsi in range(8)]
        pins += [route_irqchip(gsi, KVM_IRQCHIP_PIC_SLAVE, gsi - 8) for gsi in range(8, 16)]
        return pins + [route_msi(gsi, address, data) for gsi, (address, data) in self._routes.items()]


class _Line:
    def __init__(self, routes: MsiRoutes, vm: HasMsi, gsi: int) -> None:
        self._routes = routes
        self._vm = vm
        self._gsi = gsi
        self._fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._connected = False

    def route(self, address: int, data: int) -> bool:
        """See `MsiLine`."""
        if not self._routes.set(self._gsi, (address, data)):
            return False
        if not self._connected:
            self._vm.irqfd(self._fd, self._gsi)
            self._connected = True
        return True

    def signal(self) -> None:
        """See `MsiLine`."""
        if self._fd >= 0:
            os.eventfd_write(self._fd, 1)

    def close(self) -> None:
        """See `MsiLine`."""
        if self._fd < 0:
            return
        if self._connected:
            with contextlib.suppress(OSError):  # the VM may be gone, and its irqfds with it
                self._vm.irqfd(self._fd, self._gsi, deassign=True)
        fd, self._fd = self._fd, -1
        os.close(fd)
        self._routes.release(self._gsi)
