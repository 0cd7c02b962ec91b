# SPDX-License-Identifier: Apache-2.0
"""Booting a firmware (SeaBIOS): the ROM at the reset vector, and what it reads from fw_cfg and CMOS."""

from __future__ import annotations

from pathlib import Path

from kvmpy.arch import layout
from kvmpy.arch.entry import Entry
from kvmpy.boot import load
from kvmpy.devices import fw_cfg as keys
from kvmpy.devices import seabios
from kvmpy.errors import BootError
from kvmpy.machine.board import Board
from kvmpy.machine.config import Config
from kvmpy.vm import Vm

E820_RAM = 1


def describe_machine(config: Config, board: Board) -> None:
    """Put into fw_cfg and CMOS what any guest may look for there: memory, processors, the user's files."""
    high = max(0, config.ram - layout.LOW_RAM_END)
    board.rtc.set_memory_size(config.ram - high, high)
    board.fw_cfg.add_u64(keys.KEY_RAM_SIZE, config.ram)
    seabios.add_processors(board.fw_cfg, config.cpus)
    for name, data in config.fw_cfg.items():
        board.fw_cfg.add_file(name, data)


def load_firmware(config: Config, vm: Vm, board: Board, serial_port: int) -> Entry:
    """Load the ROM and fill fw_cfg and CMOS. Returns the reset entry; raises BootError."""
    assert config.firmware is not None
    table = board.fw_cfg
    seabios.add_memory_map(table, [(start, size, E820_RAM) for start, size in vm.memory.ram_ranges()])
    seabios.add_serial_console(table, serial_port)
    if config.floppy is not None:
        try:
            seabios.add_floppy(table, Path(config.floppy).read_bytes())
        except ValueError as e:
            raise BootError(f"{config.floppy}: {e}") from e
    return load(config.firmware, vm.memory, format="firmware")
