# SPDX-License-Identifier: Apache-2.0
"""Machine: a whole PC from a configuration, with the life cycle of a process: start, wait, stop."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from types import TracebackType
from typing import Any

from kvmpy import _exits as x
from kvmpy.arch import layout
from kvmpy.arch.entry import Entry
from kvmpy.boot import load
from kvmpy.boot.cpuid import CpuidPolicy
from kvmpy.chardev import CharBackend, Console
from kvmpy.clock import GuestClock
from kvmpy.errors import StateError
from kvmpy.irq import GsiLine
from kvmpy.machine import tables
from kvmpy.machine.board import Board
from kvmpy.machine.config import Config
from kvmpy.machine.firmware import describe_machine, load_firmware
from kvmpy.machine.stats import Counters, Stats
from kvmpy.machine.virtio import Virtio
from kvmpy.pci import PciBus
from kvmpy.vcpu import Outcome, State
from kvmpy.vm import Vm

PICS = ((0, 0x08), (1, 0x70))  # KVM_IRQCHIP_PIC_MASTER and _SLAVE with the BIOS's interrupt vectors
# Their masks for the test programs: those in real mode raise line 11 without a word to the PIC before.
TESTDEV_OPEN = (0xFF & ~(1 << 2), 0xFF & ~(1 << 11 - 8))
PIT_SPEAKER_DUMMY = 1  # KVM_PIT_SPEAKER_DUMMY: the PIT answers port 0x61 too (api.rst 4.72)


class Machine:
    """A PC: RAM, processors, interrupt chips, serial console, clock, firmware tables, and a guest to boot.

    Takes a `Config`, or its fields as keywords: `Machine(kernel="vmlinuz", initrd="initrd.gz", memory="512M",
    cpus=2, cmdline="console=ttyS0")`. The guest is loaded at once, so a bad image is a BootError here; it runs
    from `start()` on. As a context manager it starts on entry and is closed on exit.
    """

    def __init__(self, config: Config | None = None, **fields: Any) -> None:
        if config is not None and fields:
            raise ValueError(f"give a Config or its fields, not both: {', '.join(fields)}")
        self.config = config = config if config is not None else Config(**fields)
        self._console: CharBackend = config.console if config.console is not None else Console()
        self._failure: BaseException | None = None
        with contextlib.ExitStack() as undo:
            undo.callback(self._console.close)
            self.vm = undo.enter_context(
                Vm(config.backend, assist=config.assist, lead=True, deterministic=config.deterministic)
            )
            self._add_chips()
            self._add_memory()
            # PCI's pins are shared and level-triggered; several functions may hold one up.
            bus = PciBus(self.vm.mmio, [GsiLine(self.vm, gsi) for gsi in layout.IRQ_PCI]) if config.pci else None
            self.board = Board(
                self.vm,
                clock=config.clock if config.deterministic is None else GuestClock(lambda: int(self.vm.clock.clock)),
                console=self._console,
                debugcon=config.debugcon,
                testdev=config.testdev,
                end=self.vm.stop,
                failed=self._device_failed,
                pci=bus,
            )
            if config.triple_fault == "reset":
                self.vm.on_shutdown(self._triple_fault)
            describe_machine(config, self.board)
            self.virtio = Virtio(config, self.vm, bus)
            undo.callback(self.virtio.close)
            self._add_vcpus()
            self._counters = Counters(self.vm, self.virtio)
            undo.callback(self._counters.close)
            self.entry = self._load()
            self.vm.vcpus[0].enter(self.entry)
            undo.pop_all()

    # What it is made of

    @property
    def console(self) -> Console:
        """The in-memory console on COM1. Raises StateError when the configuration sends COM1 elsewhere."""
        if not isinstance(self._console, Console):
            raise StateError(f"COM1 goes to {self._console!r}, there is no in-memory console")
        return self._console

    @property
    def backend(self) -> str:
        """The engine it runs on: "kvm" or "tcg"; `backend_reason` says why."""
        return self.vm.backend

    @property
    def backend_reason(self) -> str:
        """Why this engine was taken."""
        return self.vm.kvm.reason

    def stats(self) -> Stats:
        """Live counters of everything: processors, engine, devices, disks, memory; see `kvmpy.machine.stats.Stats`.

        `machine.stats().prometheus()` is the same as text for Prometheus.
        """
        return self._counters.collect()

    # Life cycle

    @property
    def state(self) -> State:
        """NEW, RUNNING, PAUSED or STOPPED."""
        return self.vm.state

    def start(self, *, paused: bool = False) -> None:
        """Start the processors; with `paused` they wait for `resume()`. Raises StateError the second time."""
        if self.vm.state is not State.NEW:
            raise StateError("this machine was started before; make a new one")
        self.vm.start(paused=paused)
        if not paused:
            self.board.timers.start()

    def wait(self, timeout: float | None = None) -> Outcome:
        """Wait until the guest ends, and return how: "poweroff", "reset", "debug-exit", "stopped".

        Raises GuestError (with `report`) when the guest died, what a device or handler raised, TimeoutError
        after `timeout` seconds (the machine goes on), KeyboardInterrupt on Ctrl-C (the machine is stopped).
        """
        outcome = self.vm.wait(timeout)
        if self._failure is not None:
            raise self._failure
        return outcome

    def run(self, timeout: float | None = None) -> Outcome:
        """Start, wait and stop. As `wait()`, but a TimeoutError stops the machine too."""
        self.start()
        try:
            return self.wait(timeout)
        finally:
            self.stop()

    def pause(self, timeout: float | None = None) -> None:
        """Take all processors out of the guest, stop timers and devices; returns when nothing touches its memory."""
        self.vm.pause(timeout)
        self.board.timers.stop()
        self.virtio.pause()

    def resume(self) -> None:
        """Go on after `pause()`."""
        if self.vm.state is State.PAUSED:
            self.virtio.resume()
            self.board.timers.start()
            self.vm.resume()

    def stop(self) -> None:
        """Stop the processors; `wait()` then returns the outcome "stopped", unless the guest was faster."""
        self.vm.stop()

    def press_power_button(self) -> None:
        """Ask the guest to shut down, as the button on the case does."""
        self.board.events.press_power_button()

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Call `callback()` once, in some thread, when the run is over."""
        self.vm.add_done_callback(callback)

    def close(self) -> None:
        """Stop everything and free it. Idempotent. Raises what a disk raises that cannot be closed cleanly."""
        with contextlib.ExitStack() as closing:
            closing.callback(self._console.close)
            closing.callback(self.board.timers.stop)
            closing.callback(self.vm.close)
            closing.callback(self._counters.close)
            self.vm.stop()
            self.vm.join()
            self.virtio.close()

    def __enter__(self) -> Machine:
        try:
            self.start()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # Putting it together

    def _add_chips(self) -> None:
        vm = self.vm
        # Old Intel processors run real mode through a page table and a TSS that KVM keeps in guest space.
        vm.set_identity_map_addr(layout.KVM_IDENTITY_MAP)
        vm.set_tss_addr(layout.KVM_TSS)
        vm.create_irqchip()
        vm.create_pit2(PIT_SPEAKER_DUMMY)
        if self.config.firmware is None:
            # As firmware leaves them. Linux with hardware-reduced ACPI takes for granted that there are none,
            # and would get the first serial interrupt as exception 4.
            for number, base in PICS:
                chip = vm.get_irqchip(number)
                chip.pic.imr, chip.pic.irq_base = 0xFF, base
                if self.config.testdev:
                    chip.pic.imr = TESTDEV_OPEN[number]
                vm.set_irqchip(chip)

    def _add_memory(self) -> None:
        ram, huge = self.config.ram, self.config.huge_pages
        low = min(ram, layout.LOW_RAM_END)
        self.vm.add_ram(0, low, huge_pages=huge)
        if ram > low:
            self.vm.add_ram(layout.HIGH_RAM_START, ram - low, huge_pages=huge)

    def _add_vcpus(self) -> None:
        kvm = self.vm.kvm
        # KVM keeps this feature out of its list although its local APIC has it (api.rst 4.46).
        deadline = ["tsc_deadline_timer"] if kvm.check_extension("TSC_DEADLINE_TIMER") else []
        policy = CpuidPolicy(self.vm.assist.supported_cpuid(), self.config.cpu, cpus=self.config.cpus, allow=deadline)
        for index in range(self.config.cpus):
            self.vm.create_vcpu(policy.apic_id(index)).cpuid = policy.kvm_entries(index)

    def _load(self) -> Entry:
        config = self.config
        if config.firmware is not None:
            return load_firmware(config, self.vm, self.board, layout.PORT_COM[0])
        assert config.kernel is not None
        slots = self.virtio.slots
        rsdp = tables.write(config, self.vm.memory, slots.places, slots.host) if config.acpi else 0
        words = [config.cmdline]
        if not config.acpi and config.load_address is None:  # flat images take no command line
            words += slots.cmdline
        return load(
            config.kernel,
            self.vm.memory,
            cmdline=" ".join(filter(None, words)) or None,
            initrd=config.initrd,
            modules=config.modules,
            load_address=config.load_address,
            entry=config.entry,
            mode=config.mode,
            format=config.image_format,
            decompress=False if config.decompress is None and not self._software else config.decompress,
            rsdp=rsdp,
            seed=config.deterministic,
        )

    @property
    def _software(self) -> bool:
        """Whether the software CPU runs the guest."""
        return self.backend == "tcg" or self.vm.assist.leads

    def _triple_fault(self, exit: x.Shutdown) -> Outcome:
        return Outcome("reset")

    def _device_failed(self, error: BaseException) -> None:
        self._failure = error
        self.vm.stop(Outcome("failed"))
