# SPDX-License-Identifier: Apache-2.0
"""The 16550A as a driver sees it. `port[n]` reads register n."""

from __future__ import annotations

import threading

import pytest

from kvmpy.devices import Serial
from kvmpy.devices.serial import (
    FCR,
    FCR_CLEAR_RX,
    FCR_ENABLE,
    FIFO_SIZE,
    IER,
    IER_MS,
    IER_RDA,
    IER_RLS,
    IER_THRE,
    IIR,
    IIR_FIFOS,
    IIR_MS,
    IIR_NONE,
    IIR_RDA,
    IIR_RLS,
    IIR_THRE,
    IIR_TIMEOUT,
    LCR,
    LCR_BREAK,
    LCR_DLAB,
    LSR,
    LSR_BI,
    LSR_DR,
    LSR_FIFO_ERROR,
    LSR_OE,
    LSR_TEMT,
    LSR_THRE,
    MCR,
    MCR_DTR,
    MCR_LOOP,
    MCR_OUT1,
    MCR_OUT2,
    MCR_RTS,
    MSR,
    MSR_CTS,
    MSR_DCD,
    MSR_DCTS,
    MSR_DDSR,
    MSR_DSR,
    MSR_RI,
    MSR_TERI,
    RBR,
    SCR,
    THR,
)
from kvmpy.irq import NullLine


class Wire:
    """A character back end that keeps what was sent."""

    def __init__(self):
        self.sent = b""
        self.receive = None

    def write(self, data):
        self.sent += data

    def attach(self, receive):
        self.receive = receive


class Port:
    def __init__(self):
        self.wire = Wire()
        self.irq = NullLine()
        self.serial = Serial(self.irq, self.wire)

    def __getitem__(self, register):
        return self.serial.read(register, 1)

    def __setitem__(self, register, value):
        self.serial.write(register, 1, value)


@pytest.fixture
def port():
    return Port()


def test_written_byte_is_sent_at_once_and_the_transmitter_stays_empty(port):
    port[THR] = ord("x")
    assert port.wire.sent == b"x"
    assert port[LSR] == LSR_THRE | LSR_TEMT


def test_dlab_puts_the_divisor_in_front_of_data_and_interrupt_enable(port):
    port[LCR] = LCR_DLAB | 3
    port[0] = 0x34
    port[1] = 0x12
    assert (port[0], port[1]) == (0x34, 0x12)
    port[LCR] = 3
    assert port[IER] == 0
    assert port.wire.sent == b""


def test_scratch_keeps_its_byte(port):
    port[SCR] = 0xA5
    assert port[SCR] == 0xA5


def test_upper_bits_of_ier_and_mcr_read_zero(port):
    port[IER] = 0xFF
    port[MCR] = 0xEF
    assert (port[IER], port[MCR]) == (0x0F, 0x0F)


def test_received_bytes_come_in_order_and_data_ready_falls_with_the_last(port):
    port.wire.receive(b"ab")
    assert port[LSR] & LSR_DR
    assert port[RBR] == ord("a")
    assert port[LSR] & LSR_DR
    assert port[RBR] == ord("b")
    assert not port[LSR] & LSR_DR


def test_more_input_than_fits_waits_instead_of_overrunning(port):
    port[FCR] = FCR_ENABLE
    text = bytes(range(200))
    port.wire.receive(text)
    assert bytes(port[RBR] for _ in text) == text
    assert not port[LSR] & (LSR_OE | LSR_DR)


def test_input_beyond_the_backlog_is_dropped_with_a_log_record(port, caplog):
    port.wire.receive(bytes(2 << 20))
    assert port.serial.waiting == (1 << 20)
    assert "dropped" in caplog.text


@pytest.mark.parametrize(("bits", "level"), [(0x00, 1), (0x40, 4), (0x80, 8), (0xC0, 14)])
def test_below_the_trigger_level_the_timeout_interrupt_tells_of_data(port, bits, level):
    port[FCR] = FCR_ENABLE | bits
    port[IER] = IER_RDA
    port.wire.receive(bytes(level))
    assert port[IIR] == IIR_FIFOS | IIR_RDA
    port[RBR]
    assert port[IIR] == IIR_FIFOS | (IIR_TIMEOUT if level > 1 else IIR_NONE)
    assert port.irq.level == (level > 1)


def test_priorities_are_line_status_data_transmitter_modem(port):
    port[FCR] = FCR_ENABLE
    port[IER] = IER_RLS | IER_RDA | IER_THRE | IER_MS
    port.serial.receive_break()
    port.serial.set_modem_lines(cts=False)
    assert port[IIR] == IIR_FIFOS | IIR_RLS
    assert port[LSR] & LSR_BI
    assert port[IIR] == IIR_FIFOS | IIR_RDA
    assert port[RBR] == 0
    assert port[IIR] == IIR_FIFOS | IIR_THRE
    assert port[IIR] == IIR_FIFOS | IIR_MS
    assert port[MSR] & MSR_DCTS
    assert port[IIR] == IIR_FIFOS | IIR_NONE
    assert not port.irq.level


def test_enabling_the_transmitter_interrupt_raises_it_and_reading_iir_takes_it_away(port):
    port[IER] = IER_THRE
    assert port.irq.level
    assert port[IIR] == IIR_THRE
    assert not port.irq.level
    assert port[IIR] == IIR_NONE


def test_enabling_again_what_is_enabled_raises_nothing(port):
    port[IER] = IER_THRE
    port[IIR]
    port[IER] = IER_THRE | IER_RDA
    assert port[IIR] == IIR_NONE


def test_each_sent_byte_makes_a_new_edge_even_without_reading_iir(port):
    port[IER] = IER_THRE
    edges = port.irq.edges
    port[THR] = 1
    port[THR] = 2
    assert port.irq.edges == edges + 2
    assert port.irq.level


def test_reading_iir_for_a_higher_source_does_not_acknowledge_the_transmitter(port):
    port[IER] = IER_THRE | IER_RDA
    port.wire.receive(b"x")
    assert port[IIR] == IIR_RDA
    port[RBR]
    assert port[IIR] == IIR_THRE


def test_loopback_returns_the_bytes_and_sends_none(port):
    port[MCR] = MCR_LOOP
    port[THR] = 0x5A
    assert port[RBR] == 0x5A
    assert port.wire.sent == b""


@pytest.mark.parametrize(
    ("mcr", "msr"), [(MCR_DTR, MSR_DSR), (MCR_RTS, MSR_CTS), (MCR_OUT1, MSR_RI), (MCR_OUT2, MSR_DCD)]
)
def test_loopback_wires_each_output_to_its_input(port, mcr, msr):
    port[MCR] = MCR_LOOP | mcr
    assert port[MSR] & 0xF0 == msr


def test_input_from_outside_waits_for_the_end_of_loopback(port):
    port[MCR] = MCR_LOOP
    port.wire.receive(b"x")
    assert not port[LSR] & LSR_DR
    port[MCR] = 0
    assert port[RBR] == ord("x")


def test_loopback_overrun_without_fifo_keeps_the_newest_byte(port):
    port[MCR] = MCR_LOOP
    port[THR] = 1
    port[THR] = 2
    assert port[LSR] & LSR_OE
    assert not port[LSR] & LSR_OE
    assert port[RBR] == 2


def test_loopback_overrun_with_fifo_keeps_the_oldest_bytes(port):
    port[FCR] = FCR_ENABLE
    port[MCR] = MCR_LOOP
    for i in range(FIFO_SIZE + 1):
        port[THR] = i
    assert port[LSR] & LSR_OE
    assert [port[RBR] for _ in range(FIFO_SIZE)] == list(range(FIFO_SIZE))


def test_break_in_the_fifo_shows_when_its_byte_is_next(port):
    port[FCR] = FCR_ENABLE
    port.wire.receive(b"a")
    port.serial.receive_break()
    assert port[LSR] & (LSR_BI | LSR_FIFO_ERROR) == LSR_FIFO_ERROR
    port[RBR]
    assert port[LSR] & (LSR_BI | LSR_FIFO_ERROR) == LSR_BI | LSR_FIFO_ERROR
    assert port[LSR] & (LSR_BI | LSR_FIFO_ERROR) == 0


def test_break_sent_in_loopback_is_received(port):
    port[MCR] = MCR_LOOP
    port[LCR] = LCR_BREAK
    assert port.serial.break_sent
    assert port[LSR] & LSR_BI
    assert port[RBR] == 0


def test_modem_deltas_are_cleared_by_reading_and_ring_counts_only_when_it_ends(port):
    port[MSR]
    port.serial.set_modem_lines(ri=True, dsr=False)
    assert port[MSR] == MSR_CTS | MSR_DCD | MSR_RI | MSR_DDSR
    port.serial.set_modem_lines(ri=False)
    assert port[MSR] == MSR_CTS | MSR_DCD | MSR_TERI
    assert port[MSR] == MSR_CTS | MSR_DCD


def test_switching_the_fifo_mode_empties_it(port):
    port[FCR] = FCR_ENABLE
    port[MCR] = MCR_LOOP
    port[THR] = 1
    port[FCR] = 0
    assert not port[LSR] & LSR_DR
    assert port[IIR] == IIR_NONE


def test_clearing_the_fifo_drops_what_it_holds(port):
    port[FCR] = FCR_ENABLE
    port[MCR] = MCR_LOOP
    port[THR] = 1
    port[FCR] = FCR_ENABLE | FCR_CLEAR_RX
    assert not port[LSR] & LSR_DR


def test_wide_access_is_split_into_bytes(port):
    port.serial.write(LCR, 2, 0x0103)
    assert (port[LCR], port[MCR]) == (3, 1)
    assert port.serial.read(LCR, 2) == 0x0103
    assert port.serial.read(SCR, 4) == 0xFFFF_FF00


def test_reset_takes_the_interrupt_away(port):
    port[IER] = IER_THRE
    port.serial.reset()
    assert not port.irq.level
    assert port[IER] == 0


def test_two_threads_lose_no_byte_and_leave_the_line_low(port):
    port[FCR] = FCR_ENABLE
    port[IER] = IER_RDA
    text = bytes(range(256)) * 40

    def send():
        for start in range(0, len(text), 100):
            port.wire.receive(text[start : start + 100])

    sender = threading.Thread(target=send)
    sender.start()
    received = bytearray()
    while len(received) < len(text):
        if port[LSR] & LSR_DR:
            received.append(port[RBR])
    sender.join()
    assert received == text
    assert not port.irq.level


def test_saved_state_keeps_data_interrupt_and_backlog(port):
    port[FCR] = FCR_ENABLE
    port[IER] = IER_RDA | IER_THRE
    port.wire.receive(bytes(range(40)))
    other = Port()
    other.serial.load(port.serial.save())
    assert other.irq.level
    assert other[IIR] == IIR_FIFOS | IIR_RDA
    assert [other[RBR] for _ in range(40)] == list(range(40))
    assert other[IIR] == IIR_FIFOS | IIR_THRE
