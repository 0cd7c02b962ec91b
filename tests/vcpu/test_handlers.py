# SPDX-License-Identifier: Apache-2.0
"""Exit handlers: who is called, what they may return, and who may not own what."""

import pytest

from kvmpy import Hlt, IoOut, Outcome, OverlapError


def test_a_port_handler_gets_the_exit(guest):
    vm = guest("b85a000000 e780 f4")  # mov eax,0x5a  out 0x80,eax  hlt
    seen = []

    @vm.on_io_out(0x80)
    def out(exit):
        seen.append((type(exit), exit.port, exit.size, exit.value))

    assert vm.run(timeout=60) == Outcome("halted", vcpu=0)
    assert seen == [(IoOut, 0x80, 4, 0x5A)]


def test_a_read_handler_answers_by_returning_or_by_answer(guest):
    vm = guest("e480 88c3 e481 f4")  # in al,0x80  mov bl,al  in al,0x81  hlt
    vm.on_io_in(0x80)(lambda exit: 0x12)
    vm.on_io_in(0x81)(lambda exit: exit.answer(0x34))
    vm.run(timeout=60)
    regs = vm.vcpus[0].regs
    assert (regs.rbx & 0xFF, regs.rax & 0xFF) == (0x12, 0x34)


def test_a_string_read_is_answered_with_bytes(guest):
    # mov edi,0x2000  mov ecx,4  mov edx,0x80  cld  rep insb  hlt
    vm = guest("bf00200000 b904000000 ba80000000 fc f36c f4")
    text = iter(b"kvm!")

    @vm.on_io_in(0x80)
    def read(exit):
        return bytes(next(text) for _ in range(exit.count))

    vm.run(timeout=60)
    assert vm.memory.read(0x2000, 4) == b"kvm!"


def test_string_io_reaches_a_device_item_by_item(guest):
    # mov esi,0x1000  mov ecx,3  mov edx,0x80  cld  rep outsb  hlt
    vm = guest("be00100000 b903000000 ba80000000 fc f36e f4")
    seen = []
    vm.pio.claim(0x80, 1, "recorder", write=lambda offset, size, value: seen.append((offset, size, value)))
    vm.run(timeout=60)
    assert seen == [(0, 1, 0xBE), (0, 1, 0x00), (0, 1, 0x10)]


def test_memory_handlers_cover_their_range_and_no_more(guest):
    # mov eax,[0xd0000010]  mov [0xd0000014],eax  mov ebx,[0xd0000020]  hlt
    vm = guest("a1100000d0 a3140000d0 8b1d200000d0 f4")
    written = []
    vm.on_mmio_read(0xD000_0010, 8)(lambda exit: 0xCAFE)
    vm.on_mmio_write(0xD000_0010, 8)(lambda exit: written.append((exit.addr, exit.value)))
    vm.run(timeout=60)
    assert written == [(0xD000_0014, 0xCAFE)]
    assert vm.vcpus[0].regs.rbx == 0xFFFF_FFFF  # nobody there: all ones
    assert vm.mmio.unclaimed == {0xD000_0020: 1}


def test_a_handler_ends_the_run_with_an_outcome(guest):
    vm = guest("e680 ebfc")  # again: out 0x80,al  jmp again
    left = [5]

    @vm.on_io_out(0x80)
    def out(exit):
        left[0] -= 1
        return Outcome("enough", 7) if not left[0] else None

    assert vm.run(timeout=60) == Outcome("enough", 7)
    assert left == [0]


def test_what_a_handler_must_not_return_is_refused(guest):
    vm = guest("e680 f4")
    vm.on_io_out(0x80)(lambda exit: "ok")
    with pytest.raises(TypeError, match="None or an Outcome, not 'ok'"):
        vm.run(timeout=60)


def test_an_exception_in_a_handler_comes_out_with_its_traceback(guest):
    vm = guest("e680 ebfe")

    @vm.on_io_out(0x80)
    def broken(exit):
        raise LookupError("no such thing")

    with pytest.raises(LookupError, match="no such thing") as caught:
        vm.run(timeout=60)
    assert caught.traceback[-1].name == "broken"


def test_overlapping_owners_are_both_named(vm):
    @vm.on_io_out(0x80, count=4)
    def first(exit): ...

    def second(exit): ...

    with pytest.raises(OverlapError) as caught:
        vm.on_io_out(0x83)(second)
    assert "first" in str(caught.value)
    assert "second" in str(caught.value)
    vm.on_io_in(0x83)(second)  # the other direction is free


def test_a_device_and_a_handler_cannot_share_a_port(vm):
    vm.pio.claim(0x70, 2, "clock", read=lambda offset, size: 0, write=lambda offset, size, value: None)
    with pytest.raises(OverlapError, match="clock"):
        vm.on_io_in(0x71)(lambda exit: 0)


def test_one_handler_per_exit_kind(vm):
    vm.on_hlt(lambda exit: None)
    with pytest.raises(OverlapError, match="Hlt is already handled"):
        vm.on_exit(Hlt)(lambda exit: None)
    with pytest.raises(ValueError, match="on_io_out"):
        vm.on_exit(IoOut)


def test_a_hlt_handler_lets_the_guest_go_on(guest):
    vm = guest("f4 f4 e680 f4")  # hlt  hlt  out 0x80,al  hlt
    halts = []
    vm.on_hlt(lambda exit: halts.append(1))
    vm.on_io_out(0x80)(lambda exit: Outcome("there"))
    assert vm.run(timeout=60).reason == "there"
    assert len(halts) == 2


def test_msr_handlers_take_reads_and_writes(guest):
    # mov ecx,0x12345  rdmsr  add eax,1  wrmsr  hlt
    vm = guest("b945230100 0f32 83c001 0f30 f4")
    written = []
    vm.on_msr_read(0x12345)(lambda exit: 0x1_0000_0041)
    vm.on_msr_write(0x12345)(lambda exit: written.append((exit.index, exit.data)))
    vm.run(timeout=60)
    assert written == [(0x12345, 0x1_0000_0042)]
