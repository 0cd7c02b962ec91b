# SPDX-License-Identifier: Apache-2.0
"""`Vm`: KVM's virtual machine with guest memory, buses, exit handlers and a life cycle.

Every ioctl of the VM is a method here too (`kvmpy._kvm.Vm` is its base); this adds what a program embedding
a VM wants: `add_ram`, `memory`, `pio` and `mmio` buses, `on_*` handlers, and run/start/pause/stop/wait.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import TypeVar, cast

from kvmpy import _exits as x
from kvmpy import _kvm
from kvmpy._constants import KVM_MEM_GUEST_MEMFD, KVM_MSR_EXIT_REASON_FILTER
from kvmpy.bus import Bus
from kvmpy.engines import Kvm, open_kvm
from kvmpy.errors import BackendError, StateError
from kvmpy.memory import GuestMemory, HugePages, Ram, Region
from kvmpy.vcpu import Assist, Handlers, Loop, Outcome, Runner, State, Vcpu
from kvmpy.vcpu.handlers import Handler
from kvmpy.vcpu.msrs import filter_ranges

H = TypeVar("H", bound=Handler)

CAP_DETERMINISTIC = 0x6B76_0001  # KVMPY_CAP_TCG_DETERMINISTIC (tcg/vm.h)


class Vm(_kvm.Vm):
    """A virtual machine: memory, vCPUs, buses and handlers on one engine.

    `backend` is "auto", "kvm" or "tcg" ($KVMPY_BACKEND replaces "auto"); `kvm` is an open engine to use
    instead. `assist` says whether the software CPU runs what the kernel's KVM cannot emulate (default: yes, unless
    `$KVMPY_ASSIST` is 0); it is then `vm.assist`. With `lead` it runs the whole guest where that KVM emulates ring 0;
    then `vm.assist.supported_cpuid()` is what a guest can be given.

    `deterministic` is a seed: time is then counted in instructions and RDRAND comes from the seed, so that two runs
    with the same inputs are the same, instruction by instruction. It needs the software CPU, which "auto" then takes,
    and one vCPU (docs/software-cpu.md).

    Raises BackendError when no engine can be used, or one that cannot be deterministic.
    """

    vcpu_class = Vcpu

    def __init__(
        self,
        backend: str = "auto",
        *,
        kvm: Kvm | None = None,
        assist: bool | None = None,
        lead: bool = False,
        deterministic: int | None = None,
    ) -> None:
        self._own_kvm = kvm is None
        if kvm is None:
            kvm = open_kvm("tcg" if deterministic is not None and backend == "auto" else backend)
        try:
            if deterministic is not None and not 0 <= deterministic < 1 << 64:
                raise ValueError(f"deterministic is a seed of 64 bits, not {deterministic}")
            if deterministic is not None and kvm.backend != "tcg":
                raise BackendError(f"only the software CPU (tcg) can be deterministic, not {kvm.backend}")
            super().__init__(kvm)
        except BaseException:
            if self._own_kvm:
                kvm.close()
            raise
        self.assist = Assist(self, assist, lead=lead)
        wrote = self.wrote if self.must_be_told else self.assist.wrote if self.assist.leads else None
        self.memory = GuestMemory(self.set_user_memory_region, wrote)
        self.pio = Bus("pio")
        self.mmio = Bus("mmio")
        self.handlers = Handlers(self.pio, self.mmio)
        self._vcpus: list[Vcpu] = []  # a processor lives as long as its VM, whoever else holds it
        self._runner: Runner | None = None
        self.deterministic = deterministic
        if deterministic is not None:
            self.enable_cap(CAP_DETERMINISTIC, deterministic)

    @property
    def kvm(self) -> Kvm:
        """The engine's system handle."""
        return cast(Kvm, super().kvm)

    # Processors and memory

    def create_vcpu(self, id: int | None = None) -> Vcpu:
        """Create a processor; `id` is its APIC id, by default the next free one (KVM_CREATE_VCPU, api.rst 4.7)."""
        vcpu = cast(Vcpu, super().create_vcpu(id))
        self._vcpus.append(vcpu)
        return vcpu

    @property
    def vcpus(self) -> Sequence[Vcpu]:
        """The processors in the order of their creation."""
        return tuple(self._vcpus)

    def add_ram(
        self,
        gpa: int,
        size: int | None = None,
        *,
        ram: Ram | None = None,
        file: str | os.PathLike[str] | None = None,
        huge_pages: HugePages | None = None,
        readonly: bool = False,
        log_dirty: bool = False,
    ) -> Region:
        """Give the guest `size` bytes of memory at guest address `gpa` (both page multiples).

        By default it is anonymous and zeroed; `file` maps a file (shared), `ram` takes a `Ram` made before.
        `huge_pages` is None, "thp", "2M" or "1G"; with `readonly` guest writes become MMIO exits; with
        `log_dirty` the pages the guest writes are recorded.
        """
        if ram is not None:
            if size is not None or file is not None or huge_pages is not None:
                raise ValueError("add_ram(ram=...) takes its size and backing from that Ram")
        elif file is not None:
            ram = Ram.file(file, size, readonly=readonly)
        elif size is None:
            raise ValueError("add_ram needs a size, a file or a Ram")
        else:
            ram = Ram.anonymous(size, huge_pages=huge_pages)
        return self.memory.add(gpa, ram, readonly=readonly, log_dirty=log_dirty)

    def set_user_memory_region(self, slot: int, gpa: int, size: int, hva: int, flags: int = 0) -> None:
        """Put host memory into a slot, as KVM_SET_USER_MEMORY_REGION (api.rst 4.35); the assist follows."""
        super().set_user_memory_region(slot, gpa, size, hva, flags)
        self.assist.set_slot(slot, gpa, size, hva, flags)

    def set_user_memory_region2(
        self,
        slot: int,
        gpa: int,
        size: int,
        hva: int,
        flags: int = 0,
        guest_memfd: int = -1,
        guest_memfd_offset: int = 0,
    ) -> None:
        """The same as KVM_SET_USER_MEMORY_REGION2 (api.rst 4.140). The assist sees what is shared with the host."""
        super().set_user_memory_region2(slot, gpa, size, hva, flags, guest_memfd, guest_memfd_offset)
        self.assist.set_slot(slot, gpa, size, hva, flags & ~KVM_MEM_GUEST_MEMFD)

    def ioeventfd(
        self, fd: int | _kvm._HasFileno, addr: int, size: int = 0, *,
        pio: bool = False, datamatch: int | None = None, deassign: bool = False,
    ) -> None:  # fmt: skip
        """Signal `fd` at writes of the guest, as KVM_IOEVENTFD (api.rst 4.59); the assist follows."""
        super().ioeventfd(fd, addr, size, pio=pio, datamatch=datamatch, deassign=deassign)
        self.assist.zone(addr, 1, pio=pio, there=not deassign)

    def register_coalesced_mmio(self, addr: int, size: int, *, pio: bool = False) -> None:
        """Collect writes in the ring, as KVM_REGISTER_COALESCED_MMIO (api.rst 4.116); the assist follows."""
        super().register_coalesced_mmio(addr, size, pio=pio)
        self.assist.zone(addr, size, pio=pio, there=True)

    def unregister_coalesced_mmio(self, addr: int, size: int, *, pio: bool = False) -> None:
        """The opposite."""
        super().unregister_coalesced_mmio(addr, size, pio=pio)
        self.assist.zone(addr, size, pio=pio, there=False)

    # Handlers

    def on_io_out(self, port: int, count: int = 1) -> Callable[[H], H]:
        """Decorator: call the function with each IoOut to `port` (and the `count - 1` ports after it)."""
        return self._register(lambda fn: self.handlers.on_port(port, count, fn, write=True))

    def on_io_in(self, port: int, count: int = 1) -> Callable[[H], H]:
        """Decorator: call the function with each IoIn from `port`; it returns the value or answers the exit."""
        return self._register(lambda fn: self.handlers.on_port(port, count, fn, write=False))

    def on_mmio_write(self, gpa: int, size: int) -> Callable[[H], H]:
        """Decorator: call the function with each MmioWrite that starts in [gpa, gpa + size)."""
        return self._register(lambda fn: self.handlers.on_memory(gpa, size, fn, write=True))

    def on_mmio_read(self, gpa: int, size: int) -> Callable[[H], H]:
        """Decorator: call the function with each MmioRead in [gpa, gpa + size); it returns the value."""
        return self._register(lambda fn: self.handlers.on_memory(gpa, size, fn, write=False))

    def on_hypercall(self, nr: int | None = None) -> Callable[[H], H]:
        """Decorator: call the function with each Hypercall `nr`, or with all that no other takes (None)."""
        return self._register(lambda fn: self.handlers.on_key(self.handlers.hypercall, nr, f"hypercall {nr}", fn))

    def on_msr_read(self, index: int) -> Callable[[H], H]:
        """Decorator: call the function with each RDMSR of `index`; it returns the value, or fails the exit."""
        return self._register(lambda fn: self._on_msr(self.handlers.msr_read, index, "RDMSR", fn))

    def on_msr_write(self, index: int) -> Callable[[H], H]:
        """Decorator: call the function with each WRMSR to `index`."""
        return self._register(lambda fn: self._on_msr(self.handlers.msr_write, index, "WRMSR", fn))

    def on_hlt(self, handler: H) -> H:
        """Decorator: call the function with each Hlt exit (there is none with an in-kernel irqchip)."""
        return self.on_exit(x.Hlt)(handler)

    def on_debug(self, handler: H) -> H:
        """Decorator: call the function with each Debug exit (single step, breakpoints)."""
        return self.on_exit(x.Debug)(handler)

    def on_shutdown(self, handler: H) -> H:
        """Decorator: call the function with a Shutdown exit (triple fault)."""
        return self.on_exit(x.Shutdown)(handler)

    def on_exit(self, kind: type[x.Exit]) -> Callable[[H], H]:
        """Decorator: call the function with each exit of class `kind` that has no device or number."""
        if kind in _ROUTED:
            raise ValueError(f"{kind.__name__} exits are routed by address or number: use {_ROUTED[kind]}")
        return self._register(lambda fn: self.handlers.on_key(self.handlers.by_type, kind, kind.__name__, fn))

    @staticmethod
    def _register(register: Callable[[H], None]) -> Callable[[H], H]:
        def decorator(handler: H) -> H:
            register(handler)
            return handler

        return decorator

    # Life cycle

    @property
    def state(self) -> State:
        """NEW before the first start, then RUNNING, PAUSED or STOPPED."""
        return State.NEW if self._runner is None else self._runner.state

    def start(self, *, paused: bool = False) -> None:
        """Start one thread per vCPU and return. Raises StateError when the VM is running already."""
        if self._runner is not None and not self._runner.done:
            raise StateError("the VM is running already")
        loops = [Loop(vcpu, self.pio, self.mmio, self.handlers, self.assist) for vcpu in self.vcpus]
        self._runner = Runner(loops)
        self._runner.start(paused=paused)

    def run(self, timeout: float | None = None) -> Outcome:
        """Start all vCPUs, wait until the run ends, and return why.

        Raises what a handler raised, GuestError when the guest died, TimeoutError after `timeout` seconds,
        KeyboardInterrupt on Ctrl-C; in each of these cases the vCPUs are stopped. It can be called again.
        """
        self.start()
        try:
            return self.wait(timeout)
        finally:
            self.stop()
            self.join()

    def wait(self, timeout: float | None = None) -> Outcome:
        """Wait for the end of the run; as `run()`, but a TimeoutError lets the VM go on."""
        return self._started().wait(timeout)

    def pause(self, timeout: float | None = None) -> None:
        """Take all vCPUs out of the guest; returns when they are out. Raises TimeoutError."""
        self._started().pause(timeout)

    def resume(self) -> None:
        """Let paused vCPUs go on."""
        self._started().resume()

    def stop(self, outcome: Outcome | None = None) -> None:
        """Ask all vCPUs to stop; `wait()` then returns `outcome`. Harmless when nothing runs."""
        if self._runner is not None:
            self._runner.stop(outcome)

    def join(self) -> None:
        """Wait until the threads of all vCPUs have ended, after `stop()`; the calling one excepted."""
        if self._runner is not None:
            self._runner.join()

    def add_done_callback(self, callback: Callable[[], None]) -> None:
        """Call `callback()` once, in some thread, when the present run is over."""
        self._started().add_done_callback(callback)

    def close(self) -> None:
        """Stop the vCPUs, wait for them, and free everything. Idempotent."""
        self.stop()
        self.join()
        self.assist.close()
        super().close()
        self._vcpus.clear()
        self.memory.close()
        if self._own_kvm:
            self._own_kvm = False  # closing the parent closes its children: once is enough
            self.kvm.close()

    def _started(self) -> Runner:
        if self._runner is None:
            raise StateError("the VM was never started; call start() or run() first")
        return self._runner

    def _on_msr(self, table: dict[int, Handler], index: int, what: str, handler: Handler) -> None:
        self.handlers.on_key(table, index, f"{what} {index:#x}", handler)
        self.enable_cap("X86_USER_SPACE_MSR", KVM_MSR_EXIT_REASON_FILTER)
        self.set_msr_filter(filter_ranges(self.handlers.msr_read, self.handlers.msr_write))


_ROUTED = {
    x.IoOut: "on_io_out",
    x.IoIn: "on_io_in",
    x.MmioRead: "on_mmio_read",
    x.MmioWrite: "on_mmio_write",
    x.Hypercall: "on_hypercall",
    x.RdMsr: "on_msr_read",
    x.WrMsr: "on_msr_write",
}
