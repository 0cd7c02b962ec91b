# SPDX-License-Identifier: Apache-2.0
"""REP INS and OUTS: no item is lost or doubled, registers are exact at every exit, and a page goes in one exit."""

from __future__ import annotations

import random

import lab
import pytest

from kvmpy import _constants as c
from kvmpy import _exits as x

DISK, BUFFER, COUNT = 0x1F0, 0x50E00, 1024  # the buffer begins in the middle of a page
READ = f"start:\n mov edi, {BUFFER}\n mov ecx, {COUNT}\n mov edx, {DISK}\n rep insw\n SAVE rdi\n SAVE rcx\n DONE"
WRITE = f"start:\n mov esi, {BUFFER}\n mov ecx, {COUNT}\n mov edx, {DISK}\n rep outsw\n SAVE rsi\n SAVE rcx\n DONE"
WORDS = random.Random(5).randbytes(2 * COUNT)


class Disk:
    """A port that gives and takes words one after the other."""

    def __init__(self) -> None:
        self.place = 0
        self.taken = b""
        self.exits = 0

    def serve(self, exit) -> None:
        """Answer one exit."""
        assert exit.port == DISK
        assert exit.size == 2
        self.exits += 1
        if isinstance(exit, x.IoIn):
            size = exit.size * exit.count
            data = WORDS[self.place : self.place + size]
            exit.answer(data if exit.count > 1 else int.from_bytes(data, "little"))
            self.place += size
        else:
            assert isinstance(exit, x.IoOut)
            self.taken += exit.data


@pytest.fixture(params=[READ, WRITE], ids=["ins", "outs"])
def guest(request, backend):
    made = lab.Lab(backend, request.param)
    made.vm.memory.write(BUFFER, bytes(2 * COUNT) if request.param == READ else WORDS)
    made.reads = request.param == READ
    yield made
    made.close()


def finish(guest, disk) -> None:
    results = guest.results()
    assert results == [BUFFER + 2 * COUNT, 0]
    data = guest.vm.memory.read(BUFFER, 2 * COUNT)
    assert data == WORDS
    assert (disk.place, disk.taken) == ((2 * COUNT, b"") if guest.reads else (0, WORDS))


def test_all_items_arrive_once(guest):
    disk = Disk()
    while not isinstance(exit := guest.vcpu.run(), x.Hlt):
        disk.serve(exit)
    finish(guest, disk)
    if guest.vm.backend == "tcg":
        assert disk.exits <= 5  # three pages, a word alone at the start of some


def test_kicks_in_between(guest):
    """Every second run is kicked: KVM_RUN completes the access, then returns; registers count what was transferred."""
    disk = Disk()
    while True:
        exit = guest.vcpu.run()
        if isinstance(exit, x.Hlt):
            break
        disk.serve(exit)
        guest.vcpu.kick()
        assert guest.vcpu.run() == x.Interrupted()
        regs = guest.vcpu.regs
        if guest.reads:
            assert regs.rdi == BUFFER + disk.place
            assert regs.rcx == COUNT - disk.place // 2
            assert guest.vm.memory.read(BUFFER, disk.place) == WORDS[: disk.place]
    finish(guest, disk)


@pytest.mark.parametrize("backend", ["tcg"], indirect=True)
def test_single_step_goes_item_by_item(guest):
    disk = Disk()
    guest.vcpu.set_guest_debug(c.KVM_GUESTDBG_ENABLE | c.KVM_GUESTDBG_SINGLESTEP)
    counts = set()
    while not isinstance(exit := guest.vcpu.run(), x.Hlt):
        if isinstance(exit, x.Debug):
            continue
        counts.add(exit.count)
        disk.serve(exit)
    finish(guest, disk)
    assert counts == {1}
    assert disk.exits == COUNT


@pytest.mark.parametrize("backend", ["tcg"], indirect=True)
def test_fault_at_the_second_page(backend):
    """A page fault on the way comes before the device gives what it has no place for."""
    source = f"""
    start:
        mov qword [0xa028], 0x50007     ; 5 GiB: one page, then none
        mov qword [0x50000], 0x51007
        mov dword [0x51000], 0x60003
        mov rdi, 0x140000000 + 0x1000 - 64
        mov ecx, 64
        mov edx, {DISK}
        TRIED rep insw
        SAVE rdi
        SAVE rcx
        mov rax, cr2
        SAVE rax
        DONE
    """
    guest = lab.Lab(backend, source)
    disk = Disk()
    while not isinstance(exit := guest.vcpu.run(), x.Hlt):
        disk.serve(exit)
    end = 0x1_4000_1000
    assert guest.results() == [lab.PF | 2 << 8, end, 32, end]
    assert guest.vm.memory.read(0x61000 - 64, 64) == WORDS[:64]
    assert disk.place == 64
    guest.close()
