# SPDX-License-Identifier: Apache-2.0
"""8042 keyboard controller of the PC AT (IBM PC AT Technical Reference, "Keyboard Controller"; IBM PS/2
Hardware Interface Technical Reference, "Keyboard and Auxiliary Device Controller") with a keyboard.

There is no mouse, and a guest learns so at once: the auxiliary tests fail instead of timing out. The
command that pulses the reset line, and the output port's reset bit, call `on_reset`.

Not implemented: the A20 gate moves no address line (KVM has none; the bit is kept and read back); the
password commands 0xA4-0xA6 and the controller's other internal commands do nothing.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from threading import Lock
from typing import TYPE_CHECKING, Any

from kvmpy.devices.base import ByteRegisters, GuestLog, StateReader, Window
from kvmpy.devices.keyboard import Keyboard

if TYPE_CHECKING:
    from kvmpy.irq import IrqLine

log = logging.getLogger("kvmpy.devices.i8042")

# Offsets from port 0x60. What lies between belongs to others (0x61: PIT and speaker).
DATA = 0
STATUS = COMMAND = 4

# Status register.
STATUS_OUTPUT = 0x01     # a byte waits in the output buffer
STATUS_INPUT = 0x02      # never: a written byte is taken at once
STATUS_SYSTEM = 0x04     # self-test passed
STATUS_COMMAND = 0x08    # the last write went to the command port
STATUS_UNLOCKED = 0x10   # the keyboard lock is open
STATUS_AUX = 0x20        # the output byte is the auxiliary device's
STATUS_TIMEOUT = 0x40

# Controller command byte.
MODE_IRQ = 0x01
MODE_AUX_IRQ = 0x02
MODE_SYSTEM = 0x04
MODE_DISABLED = 0x10
MODE_AUX_DISABLED = 0x20
MODE_TRANSLATE = 0x40    # set 2 -> set 1
MODE_ALL = 0x7F

# Output port.
OUT_RUN = 0x01           # 0 resets the system
OUT_A20 = 0x02
OUT_FIXED = 0xCC         # keyboard clock and data idle high

# Controller commands.
CMD_READ_RAM = range(0x20, 0x40)
CMD_WRITE_RAM = range(0x60, 0x80)
CMD_AUX_DISABLE = 0xA7
CMD_AUX_ENABLE = 0xA8
CMD_AUX_TEST = 0xA9
CMD_SELF_TEST = 0xAA
CMD_KEYBOARD_TEST = 0xAB
CMD_DISABLE = 0xAD
CMD_ENABLE = 0xAE
CMD_READ_INPUT = 0xC0
CMD_READ_OUTPUT = 0xD0
CMD_WRITE_OUTPUT = 0xD1
CMD_WRITE_BUFFER = 0xD2
CMD_WRITE_AUX_BUFFER = 0xD3
CMD_WRITE_AUX = 0xD4
CMD_TEST_INPUTS = 0xE0
CMD_PULSE = range(0xF0, 0x100)   # bits 0-3 that are 0 pulse the same bits of the output port
WITH_ARGUMENT = (*CMD_WRITE_RAM, CMD_WRITE_OUTPUT, CMD_WRITE_BUFFER, CMD_WRITE_AUX_BUFFER, CMD_WRITE_AUX)

SELF_TEST_PASSED = 0x55
KEYBOARD_TEST_PASSED = 0x00
AUX_CLOCK_LOW = 0x01     # auxiliary test: the clock line is stuck low, that is, nobody is there
INPUT_PORT = 0x80        # keyboard not locked
AUX_SILENT = 0xFE        # what the controller says for a device that does not answer

# The state in which a PC's firmware leaves it.
RESET_MODE = MODE_IRQ | MODE_TRANSLATE
RESET_OUTPUT = OUT_FIXED | OUT_RUN | OUT_A20

ANSWERS = 16             # bytes of the controller's own that may wait

# Scan code set 2 -> set 1 for codes 0x00..0x7F, as the 8042's firmware has it; beyond, only two differ.
TRANSLATION = bytes.fromhex(
    "ff43413f3d3b3c58 64444240 3e0f2959 65382a70 1d10025a 66712c1f 1e11035b"
    "672e2d20 1205045c 68392f21 1413065d 69313023 2215075e 6a723224 1608095f"
    "6b332517 180b0a60 6c343526 27190c61 6d732874 1a0d626e 3a361c1b 752b6376"
    "55567778 797a0e7b 7c4f7d4b 477e7f6f 5253504c 4d480145 574e514a 37494654"
) + bytes(range(0x80, 0x100)).replace(b"\x83", b"\x41").replace(b"\x84", b"\x54")
BREAK_PREFIX = 0xF0


class I8042(ByteRegisters):
    """Controller and keyboard; put `data` at port 0x60 and `command` at port 0x64.

    Args:
        irq: the keyboard's interrupt line (ISA IRQ 1).
        on_reset: called, without locks, when the guest asks for a reset of the machine.
    """

    name = "i8042"
    size = 5

    _mode: int
    _output_port: int
    _ram: bytearray
    _argument_of: int         # the command whose argument comes next; 0: none
    _after_command: bool
    _passed: bool             # the self-test
    _full: bool               # the output buffer, with
    _output: int              # ... its byte and
    _origin: int              # ... STATUS_AUX, STATUS_TIMEOUT
    _answers: deque[int]      # of the controller itself: byte | origin << 8
    _released: bool           # the keyboard has sent the break prefix

    def __init__(self, irq: IrqLine, on_reset: Callable[[], object] | None = None) -> None:
        self._lock = Lock()
        self._irq = irq
        self._on_reset = on_reset
        self._warn = GuestLog(log)
        self.data = Window(self, DATA, 1, "i8042 data")
        self.command = Window(self, COMMAND, 1, "i8042 command")
        self._reset_registers()

    # The guest's side.

    def read_byte(self, offset: int) -> int:
        if offset == STATUS:
            with self._lock:
                return self._status()
        if offset != DATA:
            return 0xFF
        with self._lock:
            value = self._output
            self._full = False
            self._irq.set(False)              # down, so that the next byte makes an edge
            self._fill()
            self._irq.set(self._level())
        return value

    def write_byte(self, offset: int, value: int) -> None:
        reset = False
        if offset == COMMAND:
            with self._lock:
                self._after_command = True
                reset = self._run_command(value)
                self._fill()
                self._irq.set(self._level())
        elif offset == DATA:
            with self._lock:
                self._after_command = False
                reset = self._write_data(value)
                self._fill()
                self._irq.set(self._level())
        if reset:
            if self._on_reset is None:
                self._warn("the guest asked for a reset and nobody is there to do it")
            else:
                self._on_reset()

    # The host's side.

    def send_keys(self, codes: bytes) -> bool:
        """Type: scan codes of set 2, e.g. b"\\x1c\\xf0\\x1c" for the letter A pressed and released.

        Returns False if the keyboard is switched off or its queue is full; the codes are then lost.
        """
        with self._lock:
            taken = self._keyboard.press(codes)
            self._fill()
            self._irq.set(self._level())
        return taken

    @property
    def leds(self) -> int:
        """Bit 0 scroll lock, 1 num lock, 2 caps lock."""
        return self._keyboard.leds

    @property
    def a20(self) -> bool:
        """What the guest set the A20 gate to (which moves nothing)."""
        return bool(self._output_port & OUT_A20)

    def reset(self) -> None:
        with self._lock:
            self._reset_registers()
            self._irq.set(self._level())

    def save(self) -> dict[str, Any]:
        with self._lock:
            return {
                "version": 1,
                "mode": self._mode,
                "output_port": self._output_port,
                "ram": bytes(self._ram),
                "argument_of": self._argument_of,
                "after_command": self._after_command,
                "passed": self._passed,
                "full": self._full,
                "output": self._output,
                "origin": self._origin,
                "answers": list(self._answers),
                "released": self._released,
                "keyboard": self._keyboard.save(),
            }

    def load(self, state: Mapping[str, Any]) -> None:
        s = StateReader(self.name, state)
        keyboard = Keyboard.from_state(s.raw("keyboard"))
        mode, output_port, ram = s.bits("mode", MODE_ALL), s.u8("output_port"), s.data("ram", 32, 32)
        argument_of = s.u8("argument_of")
        after_command, passed, full = s.flag("after_command"), s.flag("passed"), s.flag("full")
        output, origin = s.u8("output"), s.bits("origin", STATUS_AUX | STATUS_TIMEOUT)
        answers = s.integers("answers", ANSWERS, STATUS_AUX << 8 | STATUS_TIMEOUT << 8 | 0xFF)
        released = s.flag("released")
        s.end()
        if argument_of and argument_of not in WITH_ARGUMENT:
            raise ValueError(f"i8042: saved command {argument_of:#x} takes no argument")
        with self._lock:
            self._mode, self._output_port, self._ram = mode, output_port, bytearray(ram)
            self._argument_of, self._after_command, self._passed = argument_of, after_command, passed
            self._full, self._output, self._origin = full, output, origin
            self._answers, self._released, self._keyboard = deque(answers), released, keyboard
            self._irq.set(self._level())

    # Inside; the lock is held from here on.

    def _reset_registers(self) -> None:
        self._mode = RESET_MODE
        self._output_port = RESET_OUTPUT
        self._ram = bytearray(32)             # byte 0 is the mode and lives there
        self._argument_of = 0
        self._after_command = False
        self._passed = False
        self._full = False
        self._output = 0
        self._origin = 0
        self._answers = deque()
        self._released = False
        self._keyboard = Keyboard()

    def _status(self) -> int:
        status = STATUS_UNLOCKED
        if self._full:
            status |= STATUS_OUTPUT | self._origin
        if self._passed or self._mode & MODE_SYSTEM:
            status |= STATUS_SYSTEM
        if self._after_command:
            status |= STATUS_COMMAND
        return status

    def _run_command(self, command: int) -> bool:
        """A byte to the command port; returns True when it asks for a reset."""
        self._argument_of = 0
        if command in WITH_ARGUMENT:
            self._argument_of = command
        elif command in CMD_READ_RAM:
            index = command & 0x1F
            self._answer(self._ram[index] if index else self._mode)
        elif command == CMD_SELF_TEST:
            self._passed = True
            self._answers.clear()
            self._full = False
            self._answer(SELF_TEST_PASSED)
        elif command == CMD_KEYBOARD_TEST:
            self._answer(KEYBOARD_TEST_PASSED)
        elif command == CMD_AUX_TEST:
            self._answer(AUX_CLOCK_LOW)
        elif command == CMD_DISABLE:
            self._mode |= MODE_DISABLED
        elif command == CMD_ENABLE:
            self._mode &= ~MODE_DISABLED
        elif command == CMD_AUX_DISABLE:
            self._mode |= MODE_AUX_DISABLED
        elif command == CMD_AUX_ENABLE:
            self._mode &= ~MODE_AUX_DISABLED
        elif command == CMD_READ_INPUT:
            self._answer(INPUT_PORT)
        elif command == CMD_READ_OUTPUT:
            self._answer(self._output_port | (STATUS_UNLOCKED if self._level() else 0))
        elif command == CMD_TEST_INPUTS:
            self._answer(0)
        elif command in CMD_PULSE:
            return not command & OUT_RUN
        else:
            log.debug("controller command %#04x does nothing", command)
        return False

    def _write_data(self, value: int) -> bool:
        """A byte to the data port; returns True when it asks for a reset."""
        command, self._argument_of = self._argument_of, 0
        if not command:
            self._mode &= ~MODE_DISABLED      # talking to the keyboard opens its interface
            self._keyboard.write(value)
        elif command in CMD_WRITE_RAM:
            if command & 0x1F:
                self._ram[command & 0x1F] = value
            else:
                self._mode = value & MODE_ALL
        elif command == CMD_WRITE_OUTPUT:
            self._output_port = value | OUT_RUN
            return not value & OUT_RUN
        elif command == CMD_WRITE_AUX:
            self._answer(AUX_SILENT, STATUS_AUX | STATUS_TIMEOUT)
        else:
            # 0xD3 should mark the byte as the auxiliary device's. A controller that has none does not, and
            # by that Linux sees at once that there is no mouse port.
            self._answer(value)
        return False

    def _answer(self, byte: int, origin: int = 0) -> None:
        if len(self._answers) < ANSWERS:      # a guest that never reads loses the rest
            self._answers.append(byte | origin << 8)

    def _fill(self) -> None:
        """Move the next byte into the output buffer: the controller's own first, then the keyboard's."""
        if self._full:
            return
        if self._answers:
            entry = self._answers.popleft()
            self._output, self._origin, self._full = entry & 0xFF, entry >> 8, True
            return
        while self._keyboard.queue and not self._mode & MODE_DISABLED:
            byte = self._keyboard.read()
            if self._mode & MODE_TRANSLATE:
                if byte == BREAK_PREFIX:
                    self._released = True     # set 1 says it in the next byte's top bit
                    continue
                byte = TRANSLATION[byte] | (0x80 if self._released else 0)
                self._released = False
            self._output, self._origin, self._full = byte, 0, True
            return

    def _level(self) -> bool:
        return self._full and not self._origin & STATUS_AUX and bool(self._mode & MODE_IRQ)
