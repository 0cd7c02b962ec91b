# SPDX-License-Identifier: Apache-2.0
"""QEMU's firmware configuration device (QEMU docs/specs/fw_cfg.rst): items and named files for firmware.

Selector and data port, the file directory and the DMA interface, at the ports of x86 (0x510). SeaBIOS and
OVMF read their whole configuration from it, Linux shows it in /sys/firmware/qemu_fw_cfg.

Not implemented: writes through the data port, which QEMU dropped too: writable files are written by DMA.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from struct import Struct
from threading import Lock
from typing import Any, Protocol

from kvmpy.devices.base import GuestLog, StateReader
from kvmpy.errors import GuestMemoryError

log = logging.getLogger("kvmpy.devices.fw_cfg")

# Offsets from port 0x510.
SELECTOR = 0x0           # 16 bits, little-endian
DATA = 0x1               # 8 bits; overlaps the selector
DMA_HIGH = 0x4           # 64 bits, big-endian; writing the low half starts the transfer
DMA_LOW = 0x8
DMA_WRITES = ((DMA_HIGH, 4), (DMA_LOW, 4), (DMA_HIGH, 8))

# Keys of items that are not files (QEMU include/standard-headers/linux/qemu_fw_cfg.h).
KEY_SIGNATURE = 0x00
KEY_ID = 0x01
KEY_UUID = 0x02
KEY_RAM_SIZE = 0x03      # 64 bits
KEY_NOGRAPHIC = 0x04     # 16 bits; 1 makes SeaBIOS use the serial console
KEY_NB_CPUS = 0x05       # 16 bits
KEY_KERNEL_ADDR = 0x07
KEY_KERNEL_SIZE = 0x08
KEY_INITRD_ADDR = 0x0A
KEY_INITRD_SIZE = 0x0B
KEY_NUMA = 0x0D
KEY_BOOT_MENU = 0x0E     # 16 bits
KEY_MAX_CPUS = 0x0F      # 16 bits
KEY_KERNEL_ENTRY = 0x10
KEY_KERNEL_DATA = 0x11
KEY_INITRD_DATA = 0x12
KEY_CMDLINE_ADDR = 0x13
KEY_CMDLINE_SIZE = 0x14
KEY_CMDLINE_DATA = 0x15
KEY_SETUP_ADDR = 0x16
KEY_SETUP_SIZE = 0x17
KEY_SETUP_DATA = 0x18
KEY_FILE_DIR = 0x19
KEY_FILE_FIRST = 0x20
KEY_WRITE = 0x4000       # historical: the item is meant to be written
KEY_ARCH_LOCAL = 0x8000
KEY_NONE = 0xFFFF        # what is selected when nothing is

SIGNATURE = b"QEMU"
ID_TRADITIONAL = 0x01
ID_DMA = 0x02
DMA_SIGNATURE = int.from_bytes(b"QEMU CFG", "big")

# The DMA control field; its upper 16 bits are a key.
CTL_ERROR = 0x01
CTL_READ = 0x02
CTL_SKIP = 0x04
CTL_SELECT = 0x08
CTL_WRITE = 0x10
ACCESS = Struct(">IIQ")   # FWCfgDmaAccess: control, length, address

NAME_SIZE = 56           # with the NUL
MAX_FILES = KEY_WRITE - KEY_FILE_FIRST
MAX_OFFSET = 1 << 63
CHUNK = 1 << 20          # guest memory is filled in pieces of this size, so that others may run


class GuestMemoryLike(Protocol):
    """What the DMA interface needs of guest memory; outside of it, it raises GuestMemoryError."""

    def read(self, gpa: int, size: int) -> bytes: ...

    def write(self, gpa: int, data: bytes) -> None: ...

    def fill(self, gpa: int, size: int, byte: int = 0) -> None: ...


@dataclass(slots=True)
class _Item:
    data: bytes
    writable: bool = False
    on_write: Callable[[bytes], object] | None = None


class FwCfg:
    """The device.

    Args:
        memory: guest memory for the DMA interface; None: there is no DMA interface.
    """

    name = "fw_cfg"
    size = 0xC

    def __init__(self, memory: GuestMemoryLike | None = None) -> None:
        self._memory = memory
        self._warn = GuestLog(log)
        self._lock = Lock()
        self._items: dict[int, _Item] = {
            KEY_SIGNATURE: _Item(SIGNATURE),
            KEY_ID: _Item((ID_TRADITIONAL | (ID_DMA if memory is not None else 0)).to_bytes(4, "little")),
        }
        self._files: dict[str, int] = {}      # name -> key
        self._initial: dict[int, bytes] = {}  # of writable files, for reset
        self._key = KEY_NONE
        self._offset = 0
        self._dma_high = 0
        self._update_directory()

    # The host's side: what firmware shall find.

    def add_bytes(self, key: int, data: bytes) -> None:
        """Set the item with the number `key` (not a file's: below 0x20, or from 0x8000 on)."""
        generic = KEY_ID < key < KEY_FILE_FIRST and key != KEY_FILE_DIR
        if not generic and not KEY_ARCH_LOCAL <= key < KEY_ARCH_LOCAL + KEY_WRITE:
            raise ValueError(f"fw_cfg: {key:#x} is not the key of an item that can be set")
        with self._lock:
            self._items[key] = _Item(bytes(data))

    def add_u16(self, key: int, value: int) -> None:
        """Set an item to a 16-bit number."""
        self.add_bytes(key, value.to_bytes(2, "little"))

    def add_u32(self, key: int, value: int) -> None:
        """Set an item to a 32-bit number."""
        self.add_bytes(key, value.to_bytes(4, "little"))

    def add_u64(self, key: int, value: int) -> None:
        """Set an item to a 64-bit number."""
        self.add_bytes(key, value.to_bytes(8, "little"))

    def add_file(
        self,
        name: str,
        data: bytes,
        *,
        writable: bool = False,
        on_write: Callable[[bytes], object] | None = None,
    ) -> int:
        """Add a named file.

        Args:
            name: up to 55 ASCII characters, such as "etc/e820".
            data: its contents; the guest cannot change the length.
            writable: whether the guest may change the contents.
            on_write: called, without locks, with the new contents after each write.

        Returns:
            Its key. Raises ValueError for a bad or a used name.
        """
        if not 0 < len(name) < NAME_SIZE or not name.isascii() or "\0" in name:
            raise ValueError(f"fw_cfg: {name!r} is not a name of 1..{NAME_SIZE - 1} ASCII characters")
        with self._lock:
            if name in self._files:
                raise ValueError(f"fw_cfg: there is a file {name!r} already")
            if len(self._files) >= MAX_FILES:
                raise ValueError(f"fw_cfg: no room for {name!r}, there are {MAX_FILES} files")
            key = KEY_FILE_FIRST + len(self._files)
            self._files[name] = key
            self._items[key] = _Item(bytes(data), writable, on_write)
            if writable:
                self._initial[key] = bytes(data)
            self._update_directory()
        return key

    def file(self, name: str) -> bytes:
        """The contents of a file, with what the guest wrote; KeyError when there is none."""
        with self._lock:
            return self._items[self._files[name]].data

    @property
    def files(self) -> list[str]:
        """The names, sorted."""
        with self._lock:
            return sorted(self._files)

    # The guest's side.

    def read(self, offset: int, size: int) -> int:
        if offset >= DMA_HIGH:
            signature = DMA_SIGNATURE if self._memory is not None else 0
            data = signature.to_bytes(8, "big")[offset - DMA_HIGH :]
            return int.from_bytes(data[:size].ljust(size, b"\xff"), "little")
        if offset != DATA:
            return 0             # the selector is write only
        with self._lock:
            return self._next_byte()

    def write(self, offset: int, size: int, value: int) -> None:
        if offset == SELECTOR and size >= 2:
            with self._lock:
                self._select(value & 0xFFFF)
        elif (offset, size) in DMA_WRITES and self._memory is not None:
            number = int.from_bytes((value & (1 << 8 * size) - 1).to_bytes(size, "little"), "big")
            with self._lock:
                if offset == DMA_HIGH and size == 4:
                    self._dma_high = number
                    return
                if offset == DMA_LOW:
                    number |= self._dma_high << 32
                self._dma_high = 0
            self._transfer(self._memory, number)

    def reset(self) -> None:
        """Nothing is selected; writable files get their first contents back."""
        with self._lock:
            self._key = KEY_NONE
            self._offset = self._dma_high = 0
            for key, data in self._initial.items():
                self._items[key].data = data

    def save(self) -> dict[str, Any]:
        """What the guest can change; the items themselves come from the configuration."""
        with self._lock:
            return {
                "version": 1,
                "key": self._key,
                "offset": self._offset,
                "dma_high": self._dma_high,
                "written": [[key, self._items[key].data] for key in sorted(self._initial)],
            }

    def load(self, state: Mapping[str, Any]) -> None:
        s = StateReader(self.name, state)
        key, offset = s.bits("key", 0xFFFF), s.integer("offset", 0, MAX_OFFSET)
        dma_high, written = s.bits("dma_high", 0xFFFF_FFFF), s.raw("written")
        s.end()
        with self._lock:
            contents = self._check_written(written)
            self._key, self._offset, self._dma_high = key, offset, dma_high
            for k, data in contents.items():
                self._items[k].data = data

    # Inside; the lock is held.

    def _check_written(self, written: object) -> dict[int, bytes]:
        if type(written) is not list or len(written) != len(self._initial):
            raise ValueError(f"fw_cfg: the saved state should have {len(self._initial)} writable files")
        contents: dict[int, bytes] = {}
        for entry in written:
            key, data = entry if type(entry) is list and len(entry) == 2 else (None, None)
            if type(key) is not int or key not in self._initial or type(data) is not bytes or key in contents:
                raise ValueError("fw_cfg: a saved file is not one of this device's writable files")
            size = len(self._initial[key])
            if len(data) != size:
                raise ValueError(f"fw_cfg: file {key:#x} has {size} bytes, saved are {len(data)}")
            contents[key] = data
        return contents

    def _update_directory(self) -> None:
        """The directory is sorted by name; the keys stay what they were when a file was added."""
        directory = bytearray(len(self._files).to_bytes(4, "big"))
        for name in sorted(self._files):
            key = self._files[name]
            directory += len(self._items[key].data).to_bytes(4, "big") + key.to_bytes(2, "big") + bytes(2)
            directory += name.encode("ascii").ljust(NAME_SIZE, b"\0")
        self._items[KEY_FILE_DIR] = _Item(bytes(directory))

    def _select(self, key: int) -> None:
        self._key = key
        self._offset = 0

    def _item(self) -> _Item | None:
        return self._items.get(self._key & ~KEY_WRITE)

    def _next_byte(self) -> int:
        item = self._item()
        if item is None or self._offset >= len(item.data):
            return 0
        self._offset += 1
        return item.data[self._offset - 1]

    def _skip(self, length: int) -> None:
        self._offset = min(self._offset + length, MAX_OFFSET)

    # The DMA interface; the lock is not held while guest memory is accessed.

    def _transfer(self, memory: GuestMemoryLike, gpa: int) -> None:
        """Do what the FWCfgDmaAccess structure at `gpa` says and write the result there."""
        try:
            access = memory.read(gpa, ACCESS.size)   # a copy: the guest may change it meanwhile
        except GuestMemoryError as error:
            self._warn("the DMA address is no memory: %s", error)
            return
        control, length, address = ACCESS.unpack(access)
        if control & CTL_SELECT:
            with self._lock:
                self._select(control >> 16)
        done = True
        if control & CTL_READ:
            done = self._dma_read(memory, address, length)
        elif control & CTL_WRITE:
            done = self._dma_write(memory, address, length)
        elif control & CTL_SKIP:
            with self._lock:
                self._skip(length)
        try:
            memory.write(gpa, (0 if done else CTL_ERROR).to_bytes(4, "big"))
        except GuestMemoryError as error:
            self._warn("the DMA result cannot be written: %s", error)

    def _dma_read(self, memory: GuestMemoryLike, address: int, length: int) -> bool:
        """`length` bytes of the item to guest memory, zeros past its end; False: an error."""
        with self._lock:
            item, start = self._item(), self._offset
            data = item.data if item is not None else b""
            self._skip(length)
        there = max(min(length, len(data) - start), 0)
        try:
            for at in range(0, there, CHUNK):
                memory.write(address + at, data[start + at : start + min(at + CHUNK, there)])
            for at in range(there, length, CHUNK):
                memory.fill(address + at, min(CHUNK, length - at), 0)
        except GuestMemoryError as error:
            self._warn("a DMA transfer leaves guest memory: %s", error)
            return False
        return True

    def _dma_write(self, memory: GuestMemoryLike, address: int, length: int) -> bool:
        """`length` bytes of guest memory into the item, if it is writable and they fit; False: an error."""
        with self._lock:
            item, start = self._item(), self._offset
            if item is None or not item.writable or start + length > len(item.data):
                return False
        try:
            data = memory.read(address, length)
        except GuestMemoryError as error:
            self._warn("a DMA transfer leaves guest memory: %s", error)
            return False
        with self._lock:
            item.data = contents = item.data[:start] + data + item.data[start + length :]
            self._offset = start + length
        if item.on_write is not None:
            item.on_write(contents)
        return True
