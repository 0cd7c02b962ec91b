# SPDX-License-Identifier: Apache-2.0
"""The board: which device sits where and which pin its interrupt line leads to.

    port            device                      interrupt
    0x060 0x064     i8042 keyboard controller   IRQ 1
    0x061           PIT gate and speaker (the engine's PIT)
    0x070-0x071     RTC and CMOS                IRQ 8
    0x080           POST code
    0x092           system control port A
    0x0E9 0x402     debug console
    0x0F4           debug exit
    0x0E0-0x0E8 0x2000  the test device, where the configuration wants it
    0x3F8-0x3FF     COM1                        IRQ 4
    0x510-0x51B     fw_cfg
    0x600-0x601     ACPI sleep registers
    0x608-0x60B     ACPI events: power button   IRQ 9
    0xCF8-0xCFF     PCI configuration, or no PCI; in it, 0xCF9: reset control

PIC, IOAPIC, local APICs and the PIT belong to the engine (`vm.create_irqchip()`, `vm.create_pit2()`).
"""

from __future__ import annotations

from collections.abc import Callable

from kvmpy.arch import layout
from kvmpy.bus import Device
from kvmpy.chardev import CharBackend
from kvmpy.clock import Clock
from kvmpy.devices import (
    I8042,
    DebugCon,
    DebugExit,
    FwCfg,
    GenericEvents,
    NoPci,
    PcTestdev,
    Port92,
    PostCode,
    ResetControl,
    Rtc,
    Serial,
    SleepRegisters,
    Timers,
)
from kvmpy.irq import GsiLine
from kvmpy.pci import ConfigPorts, PciBus
from kvmpy.vcpu import Outcome
from kvmpy.vm import Vm


class Board:
    """The devices of a machine, wired to a VM.

    pci: the bus that the configuration ports lead to; None: a machine without PCI.
    end: called by a device, in whatever thread, with the outcome when the guest ends the run. failed: called
    with the exception when a device fails in the timer thread.
    """

    def __init__(
        self,
        vm: Vm,
        *,
        clock: Clock,
        console: CharBackend,
        debugcon: CharBackend | None,
        testdev: bool,
        end: Callable[[Outcome], None],
        failed: Callable[[BaseException], None],
        pci: PciBus | None = None,
    ) -> None:
        def reset() -> None:
            end(Outcome("reset"))

        self.serial = Serial(GsiLine(vm, layout.IRQ_COM[0]), console, "com1")
        self.rtc = Rtc(GsiLine(vm, layout.IRQ_RTC), clock)
        self.keyboard = I8042(GsiLine(vm, layout.IRQ_KEYBOARD), reset)
        self.post = PostCode()
        self.events = GenericEvents(GsiLine(vm, layout.IRQ_SCI))
        self.fw_cfg = FwCfg(vm.memory)
        self.timers = Timers(clock, failed)
        self.timers.add(self.rtc)
        reset_control = ResetControl(reset)
        self.devices: list[tuple[int, Device]] = [
            (layout.PORT_KEYBOARD, self.keyboard.data),
            (layout.PORT_KEYBOARD + 4, self.keyboard.command),
            (layout.PORT_RTC, self.rtc),
            (layout.PORT_POST, self.post),
            (layout.PORT_SYSTEM_CONTROL, Port92(reset)),
            (layout.PORT_DEBUGCON, DebugCon(debugcon)),
            (layout.PORT_DEBUG_EXIT, DebugExit(lambda status: end(Outcome("debug-exit", status)))),
            (layout.PORT_COM[0], self.serial),
            (layout.PORT_SEABIOS_DEBUG, DebugCon(debugcon, "seabios-debug")),
            (layout.PORT_FW_CFG, self.fw_cfg),
            (layout.PORT_ACPI, SleepRegisters(lambda: end(Outcome("poweroff")))),
            (layout.PORT_ACPI_EVENTS, self.events),
            (layout.PORT_PCI_ADDRESS, ConfigPorts(pci, reset_control) if pci is not None else NoPci(reset_control)),
        ]
        if testdev:
            self._add_testdev(vm)
        for port, device in self.devices:
            vm.pio.add(port, device)

    def _add_testdev(self, vm: Vm) -> None:
        parts = PcTestdev([GsiLine(vm, gsi) for gsi in range(layout.IOAPIC_PINS)])
        self.devices += [
            (layout.PORT_TESTDEV_LATCH, parts.latch),
            (layout.PORT_TESTDEV_FLUSH, parts.flush),
            (layout.PORT_TESTDEV_BYTES, parts.latch_bytes),
            (layout.PORT_TESTDEV_LINES, parts.lines),
        ]
        vm.mmio.add(layout.TESTDEV_MEMORY, parts.memory)
