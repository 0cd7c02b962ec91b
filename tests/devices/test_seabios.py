# SPDX-License-Identifier: Apache-2.0
"""SeaBIOS on these devices alone: what it needs of a machine, proven by booting.

- the ROM at the end of 4 GiB, and its last 128 KiB (bios-256k.bin: 256 KiB) as writable RAM at the end of
  the first MiB. With a PCI host bridge SeaBIOS would unlock and fill that RAM; without, it takes it as it is;
- fw_cfg: the number of processors and the file etc/e820 (or the RTC's memory size bytes). etc/sercon-port
  puts its console on COM1; floppyimg/NAME is a floppy in memory (bios.bin and bios-256k.bin, not -microvm);
- PIC, PIT and local APIC of the engine; UART, RTC, i8042; fw_cfg's DMA is used when it is there.
No PCI, no VGA, no disk controller.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from kvmpy.arch import layout
from kvmpy.chardev import Console
from kvmpy.clock import HostClock
from kvmpy.devices import (
    I8042,
    DebugCon,
    DebugExit,
    FwCfg,
    Port92,
    PostCode,
    ResetControl,
    Rtc,
    Serial,
    Timers,
    seabios,
)
from kvmpy.irq import GsiLine
from kvmpy.memory import Ram
from kvmpy.vcpu import Outcome

SEABIOS = Path("/usr/share/seabios")
GRUB = Path("/usr/lib/grub-rescue/grub-rescue-floppy.img")
MEMORY = 64 << 20
SHADOW = 256 << 10
PATIENCE = 900   # seconds; where KVM emulates ring 0, unpacking GRUB takes more than a minute

pytestmark = pytest.mark.guest

# Boot sector: print sector 2, wait for a key, and end the run with it as status.
#   xor ax,ax   mov ds,ax   mov es,ax   cld
#   mov ax,0201h   mov cx,2   xor dx,dx   mov bx,7e00h   int 13h   jc fail   mov si,7e00h
#   next: lodsb   test al,al   jz key   mov ah,0eh   mov bx,7   int 10h   jmp next
#   key:  mov ah,0   int 16h
#   fail: out 0f4h,al   hlt
BOOT_SECTOR = bytes.fromhex(
    "31c0 8ed8 8ec0 fc  b80102 b90200 31d2 bb007e cd13 7215 be007e"
    "ac 84c0 7409 b40e bb0700 cd10 ebf2  b400 cd16  e6f4 f4"
)


class Pc:
    """A PC without PCI, wired by hand."""

    def __init__(self, vm, bios, floppy, cpus=1):
        self.vm = vm
        self.console = Console()
        self.debug = Console()
        clock = HostClock()
        vm.set_tss_addr(layout.KVM_TSS)
        vm.create_irqchip()
        vm.create_pit2(1)   # KVM_PIT_SPEAKER_DUMMY: with port 0x61
        vm.add_ram(0, MEMORY)
        vm.memory.write(layout.MIB - len(bios[-SHADOW:]), bios[-SHADOW:])
        vm.memory.add((1 << 32) - len(bios), Ram.from_bytes(bios), readonly=True)

        rtc = Rtc(GsiLine(vm, layout.IRQ_RTC), clock)
        keyboard = I8042(GsiLine(vm, layout.IRQ_KEYBOARD), self.reset)
        self.post = PostCode()
        fw_cfg = FwCfg(vm.memory)
        seabios.add_processors(fw_cfg, cpus)
        seabios.add_memory_map(fw_cfg, [(0, MEMORY, 1)])
        seabios.add_serial_console(fw_cfg, layout.PORT_COM[0])
        seabios.add_floppy(fw_cfg, floppy, "test")
        for port, device in (
            (layout.PORT_KEYBOARD, keyboard.data),
            (layout.PORT_KEYBOARD + 4, keyboard.command),
            (layout.PORT_RTC, rtc),
            (layout.PORT_POST, self.post),
            (layout.PORT_SYSTEM_CONTROL, Port92(self.reset)),
            (layout.PORT_DEBUG_EXIT, DebugExit(lambda status: vm.stop(Outcome("debug-exit", status)))),
            (layout.PORT_COM[0], Serial(GsiLine(vm, layout.IRQ_COM[0]), self.console)),
            (layout.PORT_SEABIOS_DEBUG, DebugCon(self.debug)),
            (layout.PORT_FW_CFG, fw_cfg),
            (layout.PORT_RESET, ResetControl(self.reset)),
        ):
            vm.pio.add(port, device)
        self.timers = Timers(clock)
        self.timers.add(rtc)
        for id in range(cpus):
            vm.create_vcpu().cpuid = cpuid(vm, id)

    def reset(self):
        self.vm.stop(Outcome("reset"))

    def __enter__(self):
        self.timers.start()
        self.vm.start()
        return self

    def __exit__(self, *error):
        self.vm.stop()
        self.timers.stop()


def cpuid(vm, apic_id):
    """What the host can do, with the processor's APIC id in leaf 1 and without its own topology leaves."""
    leaves = [leaf for leaf in vm.kvm.get_supported_cpuid() if leaf.function not in (0x0B, 0x1F)]
    for leaf in leaves:
        if leaf.function == 1:
            leaf.ebx = leaf.ebx & 0x00FF_FFFF | apic_id << 24
    return leaves


def image(path):
    if not path.exists():
        pytest.skip(f"{path} is missing (Debian packages seabios, grub-rescue-pc)")
    return path.read_bytes()


@pytest.mark.parametrize(("bios", "cpus"), [("bios.bin", 1), ("bios-256k.bin", 2)])
def test_seabios_boots_a_floppy_from_fw_cfg_and_types_on_the_serial_port(vm, bios, cpus):
    text = b"hello from the second sector\r\nanother line\r\n"
    floppy = BOOT_SECTOR.ljust(510, b"\0") + b"\x55\xaa" + text
    with Pc(vm, image(SEABIOS / bios), floppy, cpus) as pc:
        pc.console.expect("hello from the second sector", timeout=PATIENCE)
        pc.console.send("y")
        assert vm.wait(PATIENCE) == Outcome("debug-exit", ord("y") << 1 | 1)
    log = pc.debug.transcript
    for fact in (
        "QEMU fw_cfg DMA interface supported",
        f"qemu/e820: addr 0x{0:016x} len 0x{MEMORY:016x} [RAM]",
        f"Found {cpus} cpu(s) max supported {cpus} cpu(s)",
        "sercon: using ioport 0x3f8",
        "Mapping floppy floppyimg/test",
        "Found 1 serial ports",
        "PS2 keyboard initialized",
    ):
        assert fact in log


@pytest.mark.slow
def test_grub_rescue_floppy_shows_its_menu_on_the_serial_console(vm):
    with Pc(vm, image(SEABIOS / "bios.bin"), image(GRUB)) as pc:
        pc.console.expect("Booting from Floppy", timeout=PATIENCE)
        pc.console.expect("GNU GRUB", timeout=PATIENCE)
        pc.console.expect("The highlighted entry will be executed automatically", timeout=PATIENCE)
        pc.console.send("c")
        pc.console.expect("grub>", timeout=PATIENCE)
        pc.console.send("reboot\r")
        assert vm.wait(PATIENCE) == Outcome("reset")


@pytest.mark.parametrize(
    ("size", "whole"),
    [(1, 1_474_560), (1_296_384, 1_474_560), (1_228_800, 1_228_800), (1_474_561, 2_949_120)],
)
def test_floppy_image_is_filled_up_to_a_format(size, whole):
    image = b"x" * size
    assert seabios.whole_floppy(image) == image + bytes(whole - size)


def test_floppy_image_that_is_too_long_is_refused():
    with pytest.raises(ValueError, match="2949120"):
        seabios.whole_floppy(bytes(2_949_121))
