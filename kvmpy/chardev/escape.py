# SPDX-License-Identifier: Apache-2.0
"""Escape commands in a stream of keys: Ctrl-A and a letter, as QEMU has them."""

from __future__ import annotations

from collections.abc import Callable, Mapping

CTRL_A = 0x01


class Escape:
    """Takes Ctrl-A commands out of input; Ctrl-A Ctrl-A is one Ctrl-A for the guest.

    commands: letter (lower case) -> what to do; Ctrl-A with any other key is dropped.
    """

    def __init__(self, commands: Mapping[str, Callable[[], object]]) -> None:
        self._commands = {ord(letter): action for letter, action in commands.items()}
        self._armed = False

    def filter(self, data: bytes, emit: Callable[[bytes], object]) -> None:
        """Give the bytes of `data` that are not commands to `emit`, and run the commands in their place."""
        plain = bytearray()
        for byte in data:
            if not self._armed:
                if byte == CTRL_A:
                    self._armed = True
                else:
                    plain.append(byte)
                continue
            self._armed = False
            if byte == CTRL_A:
                plain.append(byte)
                continue
            action = self._commands.get(byte | 0x20)
            if action is not None:
                if plain:
                    emit(bytes(plain))
                    plain.clear()
                action()
        if plain:
            emit(bytes(plain))
