# SPDX-License-Identifier: Apache-2.0
"""What a processor remembers of page tables, and when it must forget it (SDM vol. 3A 4.10.4)."""

import pytest

from kvmpy import IoOut
from kvmpy.boot import load

MIB = 1 << 20
VIRTUAL = 0x4000_0000
OLD, NEW = 2 * MIB, 4 * MIB  # two large pages
TABLES = {OLD: 0x2_0000, NEW: 0x2_1000}  # page tables that map their pages one by one
P, LARGE, DIRTY, ACCESSED = 0x3, 0x83, 0x40, 0x20
#       invlpg [rcx]    mov rax,cr3  mov cr3,rax
FLUSH = {"invlpg": "0f0139", "mov cr3": "0f20d8 0f22d8"}


class Guest:
    """A long-mode guest that reads at `rbx` for us, then does one change to its page tables and one flush."""

    def __init__(self, vm, flush):
        vm.add_ram(0, 64 * MIB)
        for base in (OLD, NEW):
            for page in range(512):
                vm.memory.write(base + page * 0x1000, (base | page).to_bytes(4, "little"))
                vm.memory.write(TABLES[base] + 8 * page, (base + page * 0x1000 | P).to_bytes(8, "little"))
        #      mov eax,[rbx]  out 80h,eax  mov [rsi],rdi  (flush)  jmp
        body = bytes.fromhex("8b03 e780 48893e" + FLUSH[flush])
        code = body + b"\xeb" + (-len(body) - 2 & 0xFF).to_bytes(1, "little")
        self.vm, self.vcpu = vm, vm.create_vcpu()
        entry = load(code, vm.memory, load_address=0x10_0000, mode="long")
        self.vcpu.enter(entry)
        self.entry = self._directory(self.vcpu.sregs.cr3)

    def _directory(self, cr3):
        """The address of the page directory entry for VIRTUAL."""
        table = self.vm.memory.u64(cr3 & ~0xFFF) & ~0xFFF
        return (self.vm.memory.u64(table + 8 * (VIRTUAL >> 30)) & ~0xFFF) + 8 * (VIRTUAL >> 21 & 511)

    def point_at(self, value):
        """Before the guest runs: what its directory entry is."""
        self.vm.memory.write(self.entry, value.to_bytes(8, "little"))

    def read(self, page, *, change=None, flush_at=0):
        """What the guest reads in a page of VIRTUAL; `change` and the flush take place before the read."""
        regs = self.vcpu.regs
        regs.rbx, regs.rsi, regs.rcx = VIRTUAL + page * 0x1000, self.entry, flush_at
        regs.rdi = change if change is not None else self.vm.memory.u64(self.entry)
        self.vcpu.regs = regs
        exit = self.vcpu.run()
        assert isinstance(exit, IoOut) and exit.port == 0x80
        return int.from_bytes(exit.data, "little")


@pytest.fixture(params=FLUSH)
def guest(request, vm):
    return Guest(vm, request.param)


def test_a_flush_anywhere_in_a_large_page_forgets_all_of_it(guest):
    guest.point_at(OLD | LARGE)
    assert [guest.read(page) for page in (1, 2, 300)] == [OLD | 1, OLD | 2, OLD | 300]
    assert guest.read(2, change=NEW | LARGE, flush_at=VIRTUAL + 0x5008) == NEW | 2
    assert [guest.read(page) for page in (300, 1, 7)] == [NEW | 300, NEW | 1, NEW | 7]


def test_a_flush_of_any_address_forgets_where_page_tables_are(guest):
    guest.point_at(TABLES[OLD] | P)
    assert [guest.read(page) for page in (1, 2)] == [OLD | 1, OLD | 2]
    # An address that has nothing to do with it; pages that were never translated.
    assert guest.read(3, change=TABLES[NEW] | P, flush_at=0x20_0000) == NEW | 3
    assert guest.read(4) == NEW | 4


def test_a_table_instead_of_a_large_page_and_back(guest):
    guest.point_at(OLD | LARGE)
    assert guest.read(9) == OLD | 9
    assert guest.read(9, change=TABLES[NEW] | P, flush_at=VIRTUAL + 0x9000) == NEW | 9
    assert guest.read(8) == NEW | 8
    assert guest.read(8, change=OLD | LARGE, flush_at=VIRTUAL + 0x8000) == OLD | 8
    assert guest.read(9, flush_at=VIRTUAL + 0x9000) == OLD | 9


def test_accessed_and_dirty_of_a_large_page_are_set_in_memory(vm):
    """First a read, which sets A and leaves the page known, then a write, which must still set D."""
    guest = Guest(vm, "invlpg")
    guest.point_at(OLD | LARGE)
    guest.read(1)
    assert vm.memory.u64(guest.entry) & (ACCESSED | DIRTY) == ACCESSED
    regs = guest.vcpu.regs
    # The store of a "change" goes through VIRTUAL itself this time, to another page of it.
    regs.rsi, regs.rdi, regs.rbx = VIRTUAL + 0x3000, 0x77, VIRTUAL + 0x3000
    regs.rcx = 0
    guest.vcpu.regs = regs
    exit = guest.vcpu.run()
    assert isinstance(exit, IoOut) and int.from_bytes(exit.data, "little") == 0x77
    assert vm.memory.u64(guest.entry) & (ACCESSED | DIRTY) == ACCESSED | DIRTY
