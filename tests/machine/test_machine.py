# SPDX-License-Identifier: Apache-2.0
"""A machine with tiny flat guests: every way a guest can end, its console, its life cycle."""

import asyncio

import pytest

import kvmpy
from kvmpy import BootError, Config, GuestShutdown, Machine, Outcome, StateError, aio
from kvmpy.vcpu import State

LONG = 30

# 32-bit guests, loaded and started at 1 MiB
DEBUG_EXIT = "b003 e6f4 f4"  # mov al,3  out 0xf4,al  hlt
POWER_OFF = "66ba0006 b034 ee f4"  # mov dx,0x600  mov al,0x34 (SLP_EN, S5)  out dx,al  hlt
RESET_CF9 = "66baf90c b006 ee f4"  # mov dx,0xcf9  mov al,6  out dx,al  hlt
RESET_KEYBOARD = "b0fe e664 f4"  # mov al,0xfe  out 0x64,al  hlt
TRIPLE_FAULT = "0f0b"  # ud2 without an IDT
FOREVER = "ebfe"
# mov dx,0x3f8  mov al,'k'  out dx,al  mov al,'v'  out dx,al  mov al,'m'  out dx,al  then power off
HELLO = "66baf803 b06b ee b076 ee b06d ee" + POWER_OFF
# again: mov dx,0x3fd  in al,dx  test al,1  jz again   mov dx,0x3f8  in al,dx  inc al  out dx,al  jmp again
PLUS_ONE = "66bafd03 ec a801 74f7 66baf803 ec fec0 ee ebec"


@pytest.fixture
def machine(backend):
    """A factory of machines that run flat code; each is closed at the end."""
    made = []

    def make(code, **fields):
        options = {"memory": "8M", "load_address": 0x10_0000, "backend": backend} | fields
        made.append(Machine(kernel=_file(code), **options))
        return made[-1]

    yield make
    for machine in made:
        machine.close()


def _file(code):
    import io

    return io.BytesIO(bytes.fromhex(code))


@pytest.mark.parametrize(
    ("code", "outcome"),
    [
        (DEBUG_EXIT, Outcome("debug-exit", 7)),
        (POWER_OFF, Outcome("poweroff")),
        (RESET_CF9, Outcome("reset")),
        (RESET_KEYBOARD, Outcome("reset")),
    ],
    ids=["debug-exit", "poweroff", "reset-cf9", "reset-keyboard"],
)
def test_a_guest_ends_its_machine(machine, code, outcome):
    ended = machine(code).run(timeout=LONG)
    assert (ended.reason, ended.code) == (outcome.reason, outcome.code)


def test_looking_for_pci_is_no_reset(machine):
    # mov dx,0xcf8  mov eax,0x80000600  out dx,eax  mov dx,0xcfc  in eax,dx  (all ones?)  add al,2  out 0xf4,al
    m = machine("66baf80c b800060080 ef 66bafc0c ed 0402 e6f4 f4")
    assert m.run(timeout=LONG).code == 3


def test_a_triple_fault_is_an_error_with_a_report(machine):
    with pytest.raises(GuestShutdown) as caught:
        machine(TRIPLE_FAULT).run(timeout=LONG)
    assert "rip 0000000000100000" in caught.value.report
    assert "ud2" in caught.value.report


def test_a_triple_fault_can_mean_reset(machine):
    assert machine(TRIPLE_FAULT, triple_fault="reset").run(timeout=LONG).reason == "reset"


def test_the_console_shows_what_the_guest_writes(machine):
    m = machine(HELLO)
    assert m.run(timeout=LONG).reason == "poweroff"
    assert m.console.transcript == "kvm"


def test_what_is_typed_reaches_the_guest(machine):
    m = machine(PLUS_ONE)
    m.start()
    m.console.send("HAL")
    assert m.console.expect("IBM", timeout=LONG).text == "IBM"


def test_pause_and_resume(machine):
    m = machine(PLUS_ONE)
    m.start()
    m.pause(LONG)
    assert m.state is State.PAUSED
    m.console.send("A")
    m.resume()
    m.console.expect("B", timeout=LONG)
    m.stop()
    assert m.wait(LONG) == Outcome("stopped")


def test_a_machine_runs_once(machine):
    m = machine(POWER_OFF)
    m.run(timeout=LONG)
    with pytest.raises(StateError, match="started before"):
        m.start()


def test_several_processors_but_only_the_first_starts(machine):
    m = machine(DEBUG_EXIT, cpus=4)
    assert m.run(timeout=LONG).code == 7
    assert [vcpu.id for vcpu in m.vm.vcpus] == [0, 1, 2, 3]


def test_stats_count_exits_by_kind(machine):
    m = machine(HELLO)
    m.run(timeout=LONG)
    assert m.stats()["exits"][0]["IoOut"] >= 4


def test_memory_above_the_hole_is_there(machine):
    m = machine(DEBUG_EXIT, memory="3200M")
    ranges = m.vm.memory.ram_ranges()
    assert ranges == [(0, 0xC000_0000), (0x1_0000_0000, 128 << 20)]


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"memory": "lots"}, "not 'lots'"),
        ({"memory": 1000}, "whole number of MiB"),
        ({"cpus": 0}, "cpus must be 1..254"),
        ({"kernel": None}, "either a kernel or a firmware"),
        ({"firmware": "bios.bin"}, "either a kernel or a firmware"),
        ({"triple_fault": "maybe"}, "triple_fault"),
    ],
)
def test_a_configuration_that_makes_no_sense_is_refused(fields, message):
    with pytest.raises(ValueError, match=message):
        Config(**({"kernel": "vmlinuz"} | fields))


def test_a_kernel_that_is_none_is_refused_before_anything_runs(machine):
    with pytest.raises(BootError, match="not a kernel"):
        machine("00" * 64, load_address=None)


def test_an_unknown_cpu_feature_is_refused_with_near_names(machine):
    with pytest.raises(ValueError, match="avx2"):
        machine(FOREVER, cpu="host,-avx22")


def test_an_exception_in_a_device_comes_out_of_wait(machine):
    m = machine(DEBUG_EXIT)

    def broken(exit):
        raise OSError("the device broke")

    m.vm.pio.remove(next(device for _, device in m.board.devices if device.name == "debug-exit"))
    m.vm.on_io_out(0xF4)(broken)
    with pytest.raises(OSError, match="the device broke"):
        m.run(timeout=LONG)


def test_asyncio_waits_without_blocking(backend):
    async def main():
        fields = {"memory": "8M", "load_address": 0x10_0000, "backend": backend}
        async with aio.Machine(kernel=_file(PLUS_ONE), **fields) as m:
            waiting = asyncio.create_task(m.wait())
            m.console.send("a")
            found = await m.console.expect("b", timeout=LONG)
            assert not waiting.done()
            m.stop()
            return found.text, await waiting

    text, outcome = asyncio.run(asyncio.wait_for(main(), LONG))
    assert text == "b"
    assert outcome == Outcome("stopped")


def test_asyncio_gets_the_error_of_a_dead_guest(backend):
    async def main():
        async with aio.Machine(
            kernel=_file(TRIPLE_FAULT), memory="8M", load_address=0x10_0000, backend=backend
        ) as m:
            await m.wait()

    with pytest.raises(kvmpy.GuestShutdown):
        asyncio.run(asyncio.wait_for(main(), LONG))
