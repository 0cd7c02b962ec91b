# SPDX-License-Identifier: Apache-2.0
"""The keyboard controller and its keyboard, as firmware and Linux talk to them."""

from __future__ import annotations

import pytest

from kvmpy.devices import I8042
from kvmpy.devices.i8042 import (
    MODE_DISABLED,
    MODE_IRQ,
    MODE_TRANSLATE,
    STATUS_AUX,
    STATUS_COMMAND,
    STATUS_OUTPUT,
    STATUS_SYSTEM,
    STATUS_TIMEOUT,
    TRANSLATION,
)
from kvmpy.irq import NullLine

A_PRESSED_AND_RELEASED = b"\x1c\xf0\x1c"


class Pc:
    def __init__(self):
        self.irq = NullLine()
        self.resets = 0
        self.i8042 = I8042(self.irq, self.count_reset)

    def count_reset(self):
        self.resets += 1

    def command(self, byte, argument=None):
        self.i8042.command.write(0, 1, byte)
        if argument is not None:
            self.i8042.data.write(0, 1, argument)

    def keyboard(self, byte):
        self.i8042.data.write(0, 1, byte)

    @property
    def status(self):
        return self.i8042.command.read(0, 1)

    def answers(self):
        """All bytes that wait, as a driver would poll them."""
        result = []
        while self.status & STATUS_OUTPUT:
            result.append(self.i8042.data.read(0, 1))
            assert len(result) < 1000
        return result


@pytest.fixture
def pc():
    pc = Pc()
    pc.command(0x60, MODE_IRQ)   # no translation
    return pc


def test_self_test_passes_and_sets_the_system_flag(pc):
    assert not pc.status & STATUS_SYSTEM
    pc.command(0xAA)
    assert pc.answers() == [0x55]
    assert pc.status & STATUS_SYSTEM


def test_keyboard_interface_test_passes(pc):
    pc.command(0xAB)
    assert pc.answers() == [0x00]


def test_command_byte_and_controller_memory_are_read_back(pc):
    pc.command(0x60, 0x75)
    pc.command(0x20)
    assert pc.answers() == [0x75]
    pc.command(0x7F, 0xA5)
    pc.command(0x3F)
    assert pc.answers() == [0xA5]


def test_status_tells_whether_the_last_write_was_a_command(pc):
    pc.command(0xAE)
    assert pc.status & STATUS_COMMAND
    pc.keyboard(0xEE)
    assert not pc.status & STATUS_COMMAND


def test_auxiliary_loop_and_test_show_at_once_that_there_is_no_mouse(pc):
    pc.command(0xD3, 0x5A)
    assert not pc.status & STATUS_AUX
    assert pc.answers() == [0x5A]
    pc.command(0xA9)
    assert pc.answers() == [0x01]


def test_byte_for_the_absent_mouse_is_answered_with_a_timeout(pc):
    pc.command(0xD4, 0xFF)
    assert pc.status & (STATUS_AUX | STATUS_TIMEOUT) == STATUS_AUX | STATUS_TIMEOUT
    assert pc.answers() == [0xFE]
    assert not pc.status & (STATUS_AUX | STATUS_TIMEOUT)


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ([0xFF], [0xFA, 0xAA]),
        ([0xF2], [0xFA, 0xAB, 0x83]),
        ([0xED, 0x07], [0xFA, 0xFA]),
        ([0xF3, 0x20], [0xFA, 0xFA]),
        ([0xF0, 0x00], [0xFA, 0xFA, 0x02]),
        ([0xF0, 0x03], [0xFA, 0xFA]),
        ([0xFB, 0x1C, 0x1D], [0xFA, 0xFA, 0xFA]),
        ([0xF4], [0xFA]),
        ([0xF5], [0xFA]),
        ([0xF6], [0xFA]),
        ([0xF8], [0xFA]),
        ([0xEE], [0xEE]),
        ([0xEE, 0xFE], [0xEE, 0xEE]),
        ([0x00], [0xFE]),
    ],
)
def test_keyboard_command(pc, written, answer):
    received = []
    for byte in written:
        pc.keyboard(byte)
        received += pc.answers()
    assert received == answer


def test_identity_is_translated_as_on_a_pc(pc):
    pc.command(0x60, MODE_IRQ | MODE_TRANSLATE)
    pc.keyboard(0xF2)
    assert pc.answers() == [0xFA, 0xAB, 0x41]


def test_leds_are_shown_to_the_host(pc):
    pc.keyboard(0xED)
    pc.keyboard(0x05)
    assert pc.i8042.leds == 5


def test_keys_arrive_in_set_2_or_translated_to_set_1(pc):
    assert pc.i8042.send_keys(A_PRESSED_AND_RELEASED)
    assert pc.answers() == [0x1C, 0xF0, 0x1C]
    pc.command(0x60, MODE_IRQ | MODE_TRANSLATE)
    assert pc.i8042.send_keys(A_PRESSED_AND_RELEASED)
    assert pc.answers() == [0x1E, 0x9E]


def test_translation_of_some_well_known_keys():
    keys = {0x76: 0x01, 0x16: 0x02, 0x5A: 0x1C, 0x29: 0x39, 0x12: 0x2A, 0x05: 0x3B, 0x83: 0x41, 0x07: 0x58}
    assert {code: TRANSLATION[code] for code in keys} == keys
    assert len(TRANSLATION) == 256


def test_disabled_keyboard_keeps_its_keys(pc):
    pc.command(0xAD)
    pc.i8042.send_keys(A_PRESSED_AND_RELEASED)
    assert pc.answers() == []
    pc.command(0xAE)
    assert pc.answers() == list(A_PRESSED_AND_RELEASED)


def test_writing_to_the_keyboard_enables_its_interface(pc):
    pc.command(0x60, MODE_IRQ | MODE_DISABLED)
    pc.keyboard(0xEE)
    assert pc.answers() == [0xEE]


def test_keys_typed_while_scanning_is_off_are_refused(pc):
    pc.keyboard(0xF5)
    pc.answers()
    assert not pc.i8042.send_keys(b"\x1c")
    assert pc.answers() == []


def test_keys_beyond_the_queue_are_refused_and_the_guest_sees_an_overrun(pc):
    while pc.i8042.send_keys(b"\x1c"):
        pass
    assert pc.answers()[-1] == 0x00


def test_each_byte_makes_an_interrupt_edge(pc):
    pc.i8042.send_keys(A_PRESSED_AND_RELEASED)
    assert pc.irq.edges == 1
    assert pc.answers() == list(A_PRESSED_AND_RELEASED)
    assert pc.irq.edges == 3
    assert not pc.irq.level


def test_no_interrupt_when_the_command_byte_disables_it(pc):
    pc.command(0x60, 0)
    pc.i8042.send_keys(b"\x1c")
    assert not pc.irq.level
    pc.command(0x60, MODE_IRQ)
    assert pc.irq.level


def test_a20_is_kept_in_the_output_port(pc):
    assert pc.i8042.a20
    pc.command(0xD1, 0xDD)
    assert not pc.i8042.a20
    pc.command(0xD0)
    assert pc.answers()[0] & 0x02 == 0
    pc.command(0xD1, 0xDF)
    assert pc.i8042.a20


@pytest.mark.parametrize("pulse", [0xFE, 0xF0, 0xFC])
def test_pulse_of_the_reset_line_resets(pc, pulse):
    pc.command(pulse)
    assert pc.resets == 1


def test_pulse_of_other_lines_does_not_reset(pc):
    pc.command(0xFF)
    pc.command(0xFD)
    assert pc.resets == 0


def test_output_port_reset_bit_resets(pc):
    pc.command(0xD1, 0xFE)
    assert pc.resets == 1


def test_reset_without_anybody_to_do_it_is_logged(caplog):
    I8042(NullLine()).command.write(0, 1, 0xFE)
    assert "reset" in caplog.text


def test_ports_between_data_and_command_belong_to_others(pc):
    assert [pc.i8042.read(offset, 1) for offset in (1, 2, 3)] == [0xFF] * 3
    assert (pc.i8042.data.size, pc.i8042.command.size) == (1, 1)


def test_saved_state_keeps_waiting_keys_and_the_interrupt(pc):
    pc.command(0x60, MODE_IRQ | MODE_TRANSLATE)
    pc.i8042.send_keys(A_PRESSED_AND_RELEASED)
    pc.keyboard(0xED)
    other = Pc()
    other.i8042.load(pc.i8042.save())
    assert other.irq.level
    assert other.answers() == [0x1E, 0xFA]
    other.keyboard(0x02)
    assert other.i8042.leds == 2


def test_load_refuses_a_command_that_takes_no_argument(pc):
    with pytest.raises(ValueError, match="0xaa"):
        pc.i8042.load({**pc.i8042.save(), "argument_of": 0xAA})
