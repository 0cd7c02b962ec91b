# SPDX-License-Identifier: Apache-2.0
"""Guest memory seen by real guests, on every engine."""

import pytest

from kvmpy import Hlt, MmioWrite, Vm
from kvmpy.errors import KvmError
from kvmpy.memory import DirtyLog, DirtyRing, Ram

PAGE = 4096
CODE = 0x1000
DATA = 0x10000

# Real mode with ds = 0x1000, so that [n] is guest address 0x1_0000 + n:
#   mov ax,0x1000  mov ds,ax  mov byte [0x0003],7  mov byte [0x2000],8  mov byte [0x2fff],9  hlt
STORES = bytes.fromhex("b80010 8ed8 c606030007 c606002008 c606ff2f09 f4")
DIRTY = [DATA, DATA + 2 * PAGE]


def run(vm: Vm, code: bytes):
    """Run real-mode code at 0x1000 until the first exit."""
    vm.memory.write(CODE, code)
    vcpu = vm.vcpus[0] if vm.vcpus else vm.create_vcpu()
    vcpu.enter_real_mode(CODE)
    return vcpu.run()


@pytest.fixture(params=["anonymous", "memfd", "file", "thp"])
def ram(request, tmp_path):
    """64 KiB of each kind (2 MiB of the last)."""
    if request.param == "file":
        return Ram.file(tmp_path / "ram", 16 * PAGE, create=True)
    if request.param == "thp":
        return Ram.anonymous(1 << 21, huge_pages="thp")
    return getattr(Ram, request.param)(16 * PAGE)


def test_a_guest_reads_and_writes_every_kind_of_memory(vm, ram):
    vm.add_ram(CODE, PAGE)
    vm.memory.add(0x20_0000 if ram.size > DATA else DATA, ram)
    if ram.size > DATA:
        vm.memory.add(DATA, ram, offset=0, size=16 * PAGE)  # shown at two addresses
    view = vm.memory.view(DATA, 4 * PAGE)
    assert run(vm, STORES) == Hlt()
    assert (view[3], view[0x2000], view[0x2FFF]) == (7, 8, 9)
    assert (ram.load(3, 1), vm.memory.u8(DATA + 0x2FFF)) == (7, 9)


def test_a_write_to_read_only_memory_becomes_an_exit(vm):
    vm.add_ram(CODE, PAGE)
    vm.memory.add(DATA, Ram.from_bytes(b"ROM"), readonly=True)
    match run(vm, STORES):
        case MmioWrite(addr=addr, data=data):
            assert (addr, bytes(data)) == (DATA + 3, b"\x07")
        case other:
            raise AssertionError(other)
    assert vm.memory.read(DATA, 4) == b"ROM\0"


def test_a_removed_region_is_gone_for_the_guest_and_its_slot_is_reused(vm):
    vm.add_ram(CODE, PAGE)
    first = vm.add_ram(DATA, 4 * PAGE)
    assert run(vm, STORES) == Hlt()
    vm.memory.remove(first)
    assert isinstance(run(vm, STORES), MmioWrite)
    second = vm.add_ram(DATA, 4 * PAGE)
    assert (second.slot, vm.memory.u8(DATA + 3)) == (first.slot, 0)
    assert run(vm, STORES) == Hlt()
    assert (second.ram.load(3, 1), first.ram.load(3, 1)) == (7, 7)


def test_the_host_changes_code_between_runs(vm):
    vm.add_ram(CODE, PAGE)
    vm.add_ram(DATA, 4 * PAGE)
    assert run(vm, STORES) == Hlt()
    assert run(vm, STORES.replace(b"\x07", b"\x55")) == Hlt()
    assert vm.memory.u8(DATA + 3) == 0x55
    # ... and through a view, announced
    vm.memory.view(CODE, PAGE)[9] = 0x66
    vm.memory.wrote(CODE + 9, 1)
    vm.vcpus[0].enter_real_mode(CODE)
    assert vm.vcpus[0].run() == Hlt()
    assert vm.memory.u8(DATA + 3) == 0x66


def test_the_dirty_log_has_the_guests_pages_and_the_hosts(vm):
    vm.add_ram(CODE, PAGE)
    vm.add_ram(DATA, 4 * PAGE)
    vm.memory.start_dirty_log(DirtyLog(vm))
    vm.memory.collect_dirty()
    assert run(vm, STORES) == Hlt()
    assert list(vm.memory.collect_dirty()) == [CODE, *DIRTY]
    assert list(vm.memory.collect_dirty()) == []
    vm.memory.put_u8(DATA + PAGE, 1)
    assert list(vm.memory.collect_dirty().ranges()) == [(DATA + PAGE, PAGE)]
    vm.memory.stop_dirty_log()
    with pytest.raises(KvmError):
        vm.get_dirty_log(0)


def test_the_dirty_ring_gives_the_same_answer(vm):
    try:
        vm.enable_dirty_ring(1024)
    except KvmError as error:
        pytest.skip(str(error))
    vm.add_ram(CODE, PAGE)
    vm.add_ram(DATA, 4 * PAGE)
    vm.create_vcpu()
    ring = DirtyRing(vm)
    vm.memory.start_dirty_log(ring)
    vm.memory.collect_dirty()
    assert run(vm, STORES) == Hlt()
    ring.drain()
    assert list(vm.memory.collect_dirty()) == [CODE, *DIRTY]
    assert list(vm.memory.collect_dirty()) == []
    vm.vcpus[0].enter_real_mode(CODE)
    assert vm.vcpus[0].run() == Hlt()
    assert list(vm.memory.collect_dirty().ranges()) == [(DATA, PAGE), (DATA + 2 * PAGE, PAGE)]


def test_closing_the_vm_frees_its_memory(backend):
    with Vm(backend) as vm:
        region = vm.add_ram(CODE, PAGE)
        ram, memory = region.ram, vm.memory
        assert ram.views == 1
    assert ram.views == 0
    assert memory.regions == ()


def test_an_engine_that_caches_code_watches_writes(vm):
    assert (vm.memory.watcher is not None) == vm.must_be_told == (vm.backend == "tcg")
