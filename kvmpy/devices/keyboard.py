# SPDX-License-Identifier: Apache-2.0
"""A PS/2 keyboard as the controller sees it: bytes in, bytes out (IBM PS/2 Hardware Interface Technical
Reference, "Keyboards"; Adam Chapweske, "The PS/2 Keyboard Interface").

It answers every command of an MF2 keyboard, so that firmware and Linux find one at once, and passes on
key codes given by the host in scan code set 2.

Not implemented: scan code sets 1 and 3 can be selected and read back, keys still come in set 2; typematic
repeat and the per-key make/break settings of set 3 are accepted and have no effect.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from typing import Any

from kvmpy.devices.base import StateReader

ACK = 0xFA
RESEND = 0xFE
SELF_TEST_PASSED = 0xAA
ECHO = 0xEE
IDENTITY = (0xAB, 0x83)   # MF2 keyboard

SET_LEDS = 0xED
SCAN_CODE_SET = 0xF0
IDENTIFY = 0xF2
SET_TYPEMATIC = 0xF3
ENABLE = 0xF4
DISABLE = 0xF5
SET_DEFAULTS = 0xF6
ALL_KEYS = range(0xF7, 0xFB)      # make/break/typematic of all keys
SOME_KEYS = range(0xFB, 0xFE)     # ... of the keys that follow
SEND_AGAIN = 0xFE
RESET = 0xFF

QUEUE_SIZE = 256         # a real keyboard keeps 16 bytes; pasted text needs more
OVERRUN = 0x00           # what the last place of a full queue says in set 2


class Keyboard:
    """The keyboard at the end of the wire. It has no lock: it belongs to one controller."""

    def __init__(self) -> None:
        self.reset()

    def reset(self) -> None:
        self.queue: deque[int] = deque()
        self._scanning = True
        self._scan_code_set = 2
        self._leds = 0
        self._command = 0         # the command whose argument comes next; 0: none
        self._last = 0

    @property
    def leds(self) -> int:
        """Bit 0 scroll lock, 1 num lock, 2 caps lock."""
        return self._leds

    def write(self, byte: int) -> None:
        """A byte from the host's controller: a command or its argument."""
        command, self._command = self._command, 0
        if command and byte < SET_LEDS:   # a command instead of the argument is a command
            self._argument(command, byte)
            return
        if byte in (SET_LEDS, SCAN_CODE_SET, SET_TYPEMATIC, *SOME_KEYS):
            self._command = byte
            self._answer(ACK)
        elif byte == IDENTIFY:
            self._answer(ACK, *IDENTITY)
        elif byte == ENABLE:
            self._scanning = True
            self._answer(ACK)
        elif byte == DISABLE:
            self._scanning = False
            self._scan_code_set = 2
            self._answer(ACK)
        elif byte == SET_DEFAULTS:
            self._scan_code_set = 2
            self._answer(ACK)
        elif byte in ALL_KEYS:
            self._answer(ACK)
        elif byte == RESET:
            self.reset()
            self._answer(ACK, SELF_TEST_PASSED)
        elif byte == ECHO:
            self._answer(ECHO)
        elif byte == SEND_AGAIN:
            self._answer(self._last)
        else:
            self._answer(RESEND)

    def read(self) -> int:
        """The next byte for the host; there must be one."""
        self._last = self.queue.popleft()
        return self._last

    def press(self, codes: bytes) -> bool:
        """Key codes in set 2, as the host's user typed them. False: they did not fit and are lost."""
        if not self._scanning:
            return False
        if len(self.queue) + len(codes) >= QUEUE_SIZE:
            if len(self.queue) < QUEUE_SIZE:
                self.queue.append(OVERRUN)
            return False
        self.queue.extend(codes)
        return True

    def _argument(self, command: int, byte: int) -> None:
        self._answer(ACK)
        if command == SET_LEDS:
            self._leds = byte & 0x07
        elif command == SCAN_CODE_SET:
            if byte == 0:
                self._answer(self._scan_code_set, keep=True)
            elif byte <= 3:
                self._scan_code_set = byte
        elif command in SOME_KEYS:
            self._command = command   # any number of keys until the next command

    def _answer(self, *answer: int, keep: bool = False) -> None:
        """An answer goes out before, and instead of, what was still waiting."""
        if not keep:
            self.queue.clear()
        self.queue.extend(answer)

    def save(self) -> dict[str, Any]:
        return {
            "version": 1,
            "queue": bytes(self.queue),
            "scanning": self._scanning,
            "scan_code_set": self._scan_code_set,
            "leds": self._leds,
            "command": self._command,
            "last": self._last,
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Keyboard:
        """A keyboard in a saved state; ValueError when it is not one."""
        s = StateReader("keyboard", state)
        keyboard = cls()
        keyboard.queue = deque(s.data("queue", 0, QUEUE_SIZE))
        keyboard._scanning = s.flag("scanning")
        keyboard._scan_code_set = s.integer("scan_code_set", 1, 3)
        keyboard._leds = s.bits("leds", 0x07)
        keyboard._command = s.u8("command")
        keyboard._last = s.u8("last")
        s.end()
        return keyboard
