# SPDX-License-Identifier: Apache-2.0
"""16550A UART (National Semiconductor PC16550D data sheet, section 8 "Registers").

All registers and interrupt sources with their priorities, both FIFOs with the four receive trigger
levels, the modem lines, loopback and break are here. Time on the wire is not: a byte that the guest
sends is gone at once, so the transmitter is always empty, and bytes for the guest that do not fit the
receive FIFO wait in a backlog instead of being lost.

Not implemented: baud rate and frame format have no effect (they are kept and read back); parity and
framing errors never occur; DMA mode (TXRDY/RXRDY pins) is accepted and ignored; the character timeout
interrupt comes at once instead of after four character times; OUT2 does not gate the interrupt, as on
the chip itself (some PC adapters wire it so).
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Mapping
from threading import Lock
from typing import TYPE_CHECKING, Any, Protocol

from kvmpy.devices.base import ByteRegisters, GuestLog, StateReader

if TYPE_CHECKING:
    from kvmpy.irq import IrqLine

log = logging.getLogger("kvmpy.devices.serial")

# Offsets (table II). RBR/THR and IER turn into the divisor while LCR_DLAB is set.
RBR = THR = DLL = 0
IER = DLM = 1
IIR = FCR = 2
LCR = 3
MCR = 4
LSR = 5
MSR = 6
SCR = 7

# Interrupt enable (8.7).
IER_RDA = 0x01           # received data available, and the FIFO timeout
IER_THRE = 0x02          # transmitter holding register empty
IER_RLS = 0x04           # receiver line status
IER_MS = 0x08            # modem status
IER_ALL = 0x0F

# Interrupt identification (8.6), highest priority first.
IIR_RLS = 0x06
IIR_RDA = 0x04
IIR_TIMEOUT = 0x0C
IIR_THRE = 0x02
IIR_MS = 0x00
IIR_NONE = 0x01
IIR_FIFOS = 0xC0         # FIFOs are enabled

# FIFO control (8.5).
FCR_ENABLE = 0x01
FCR_CLEAR_RX = 0x02
FCR_CLEAR_TX = 0x04
FCR_KEPT = 0xC9          # trigger level, DMA mode, enable
FCR_TRIGGERS = (1, 4, 8, 14)

# Line control (8.1).
LCR_BREAK = 0x40
LCR_DLAB = 0x80

# Modem control (8.8).
MCR_DTR = 0x01
MCR_RTS = 0x02
MCR_OUT1 = 0x04
MCR_OUT2 = 0x08
MCR_LOOP = 0x10
MCR_ALL = 0x1F

# Line status (8.4).
LSR_DR = 0x01            # data ready
LSR_OE = 0x02            # overrun
LSR_PE = 0x04
LSR_FE = 0x08
LSR_BI = 0x10            # break
LSR_THRE = 0x20
LSR_TEMT = 0x40
LSR_FIFO_ERROR = 0x80    # some byte in the receive FIFO has an error
LSR_ERRORS = LSR_OE | LSR_PE | LSR_FE | LSR_BI

# Modem status (8.9): four deltas, then the four lines.
MSR_DCTS = 0x01
MSR_DDSR = 0x02
MSR_TERI = 0x04          # ring has ended
MSR_DDCD = 0x08
MSR_CTS = 0x10
MSR_DSR = 0x20
MSR_RI = 0x40
MSR_DCD = 0x80
MSR_DELTAS = 0x0F
MSR_LINES = 0xF0

# Reset values (table I). The divisor has none; 12 is 9600 baud, which firmware commonly leaves.
RESET_DIVISOR = 12
RESET_LINES = MSR_CTS | MSR_DSR | MSR_DCD   # a peer is connected and ready

FIFO_SIZE = 16
BACKLOG_SIZE = 1 << 20   # bytes that may wait for the guest to read; a guest that never reads costs no more

_BYTES = tuple(bytes((value,)) for value in range(256))
_FLAGS = 8               # a received byte carries its LSR error bits above bit 8


class CharBackend(Protocol):
    """Where the bytes go and come from (kvmpy.chardev)."""

    def write(self, data: bytes) -> object: ...

    def attach(self, receive: Callable[[bytes], object]) -> object: ...


class Serial(ByteRegisters):
    """One serial port.

    Args:
        irq: the interrupt line.
        backend: where sent bytes go and received ones come from; None: nowhere.
    """

    size = 8

    _ier: int
    _fcr: int
    _lcr: int
    _mcr: int
    _scr: int
    _divisor: int
    _errors: int             # OE, PE, FE, BI of the LSR: they stay until it is read
    _deltas: int             # of the MSR: likewise
    _thre_pending: bool
    _fifo: deque[int]        # byte | LSR error bits << _FLAGS

    def __init__(self, irq: IrqLine, backend: CharBackend | None = None, name: str = "serial") -> None:
        self.name = name
        self._warn = GuestLog(log)
        self._lock = Lock()
        self._irq = irq
        self._backend = backend
        self._backlog: deque[int] = deque()
        self._lines = RESET_LINES
        self._reset_registers()
        if backend is not None:
            backend.attach(self.receive)

    # The guest's side.

    def read_byte(self, offset: int) -> int:
        if offset == RBR:
            return self._read_data()
        if offset == LSR:
            return self._read_line_status()
        with self._lock:
            if offset == IER:
                return self._divisor >> 8 if self._lcr & LCR_DLAB else self._ier
            if offset == LCR:
                return self._lcr
            if offset == MCR:
                return self._mcr
            if offset == SCR:
                return self._scr
            if offset == IIR:
                value = self._identify()
                if value == IIR_THRE:
                    self._thre_pending = False   # reading it is what acknowledges this source (8.6)
                if self._fcr & FCR_ENABLE:
                    value |= IIR_FIFOS
            else:
                value = self._modem_status()
                self._deltas = 0
            self._irq.set(self._level())
        return value

    def write_byte(self, offset: int, value: int) -> None:
        if offset == THR:
            self._write_data(value)
            return
        with self._lock:
            if offset == IER:
                if self._lcr & LCR_DLAB:
                    self._divisor = self._divisor & 0xFF | value << 8
                else:
                    # Enabling the source while the register is empty raises it, acknowledged or not.
                    if value & IER_THRE and not self._ier & IER_THRE:
                        self._thre_pending = True
                    self._ier = value & IER_ALL
            elif offset == FCR:
                self._write_fifo_control(value)
            elif offset == LCR:
                starts_break = value & ~self._lcr & LCR_BREAK
                self._lcr = value
                if starts_break and self._mcr & MCR_LOOP:
                    self._push(LSR_BI << _FLAGS)
            elif offset == MCR:
                self._write_modem_control(value & MCR_ALL)
            elif offset == SCR:
                self._scr = value
            # LSR and MSR: writes are for factory testing (8.4) and ignored.
            self._irq.set(self._level())

    # The host's side.

    def receive(self, data: bytes) -> None:
        """Bytes from the outside; may be called from any thread."""
        with self._lock:
            room = BACKLOG_SIZE - len(self._backlog)
            self._backlog.extend(data[:room])
            self._refill()
            self._irq.set(self._level())
        if len(data) > room:
            self._warn("%s: the guest does not read; %d input bytes dropped", self.name, len(data) - room)

    def receive_break(self) -> None:
        """A break from the outside: the guest sees one NUL with the break indicator (Linux: SysRq)."""
        with self._lock:
            if len(self._backlog) < BACKLOG_SIZE:
                self._backlog.append(LSR_BI << _FLAGS)
            self._refill()
            self._irq.set(self._level())

    def set_modem_lines(
        self,
        *,
        cts: bool | None = None,
        dsr: bool | None = None,
        ri: bool | None = None,
        dcd: bool | None = None,
    ) -> None:
        """Set the input lines; None leaves one as it is. The guest sees the change once loopback is off."""
        with self._lock:
            before = self._modem_lines()
            for level, bit in ((cts, MSR_CTS), (dsr, MSR_DSR), (ri, MSR_RI), (dcd, MSR_DCD)):
                if level is not None:
                    self._lines = self._lines | bit if level else self._lines & ~bit
            self._note_line_change(before)
            self._irq.set(self._level())

    @property
    def modem_control(self) -> int:
        """The MCR as the guest set it (MCR_DTR, MCR_RTS, MCR_OUT1, MCR_OUT2, MCR_LOOP)."""
        return self._mcr

    @property
    def break_sent(self) -> bool:
        """Whether the guest holds its output in the break condition."""
        return bool(self._lcr & LCR_BREAK)

    @property
    def waiting(self) -> int:
        """How many received bytes the guest has not read yet."""
        return len(self._fifo) + len(self._backlog)

    def reset(self) -> None:
        with self._lock:
            self._reset_registers()
            self._irq.set(self._level())

    def save(self) -> dict[str, Any]:
        with self._lock:
            return {
                "version": 1,
                "ier": self._ier,
                "fcr": self._fcr,
                "lcr": self._lcr,
                "mcr": self._mcr,
                "scr": self._scr,
                "divisor": self._divisor,
                "errors": self._errors,
                "lines": self._lines,
                "deltas": self._deltas,
                "thre_pending": self._thre_pending,
                "fifo": list(self._fifo),
                "backlog": list(self._backlog),
            }

    def load(self, state: Mapping[str, Any]) -> None:
        s = StateReader(self.name, state)
        ier, fcr = s.bits("ier", IER_ALL), s.bits("fcr", FCR_KEPT)
        lcr, mcr, scr = s.u8("lcr"), s.bits("mcr", MCR_ALL), s.u8("scr")
        divisor, errors = s.integer("divisor", 0, 0xFFFF), s.bits("errors", LSR_ERRORS)
        lines, deltas = s.bits("lines", MSR_LINES), s.bits("deltas", MSR_DELTAS)
        thre_pending = s.flag("thre_pending")
        received = (LSR_ERRORS & ~LSR_OE) << _FLAGS | 0xFF
        fifo = s.integers("fifo", FIFO_SIZE if fcr & FCR_ENABLE else 1, received)
        backlog = s.integers("backlog", BACKLOG_SIZE, received)
        s.end()
        with self._lock:
            self._ier, self._fcr, self._lcr, self._mcr, self._scr = ier, fcr, lcr, mcr, scr
            self._divisor, self._errors, self._lines, self._deltas = divisor, errors, lines, deltas
            self._thre_pending = thre_pending
            self._fifo, self._backlog = deque(fifo), deque(backlog)
            self._irq.set(self._level())

    # Registers; the lock is held from here on, except in the three that say otherwise.

    def _reset_registers(self) -> None:
        self._ier = self._fcr = self._lcr = self._mcr = self._scr = 0
        self._divisor = RESET_DIVISOR
        self._errors = 0
        self._deltas = 0
        self._thre_pending = False
        self._fifo = deque()
        self._refill()

    def _read_data(self) -> int:
        """RBR or DLL; takes the lock."""
        with self._lock:
            if self._lcr & LCR_DLAB:
                return self._divisor & 0xFF
            value = self._fifo.popleft() & 0xFF if self._fifo else 0
            if self._fifo:
                self._errors |= self._fifo[0] >> _FLAGS
            self._refill()
            self._irq.set(self._level())
        return value

    def _read_line_status(self) -> int:
        """LSR; takes the lock."""
        if not self._fifo and not self._errors:
            return LSR_THRE | LSR_TEMT    # what drivers poll before each byte
        with self._lock:
            value = LSR_THRE | LSR_TEMT | self._errors
            if self._fifo:
                value |= LSR_DR
                if self._fcr & FCR_ENABLE and any(entry >> _FLAGS for entry in self._fifo):
                    value |= LSR_FIFO_ERROR
            if not self._errors:
                return value              # the usual case: nothing changes, the pin neither
            self._errors = 0
            if self._fifo:
                self._fifo[0] &= 0xFF     # its error has now been seen
            self._irq.set(self._level())
        return value

    def _write_data(self, value: int) -> None:
        """THR or DLL; takes the lock."""
        with self._lock:
            if self._lcr & LCR_DLAB:
                self._divisor = self._divisor & 0xFF00 | value
                return
            loop = self._mcr & MCR_LOOP
            if loop:
                self._push(value)
            interrupts = self._ier
            if interrupts:
                self._thre_pending = False
                self._irq.set(self._level())   # fall: an edge-triggered controller needs the next edge
            else:
                self._thre_pending = True      # the usual case, a polling driver: the pin stays low
        if not loop and self._backend is not None:
            self._backend.write(_BYTES[value])
        if interrupts:
            with self._lock:
                self._thre_pending = True
                self._irq.set(self._level())

    def _write_fifo_control(self, value: int) -> None:
        if (value ^ self._fcr) & FCR_ENABLE:
            value |= FCR_CLEAR_RX         # switching the mode empties the FIFOs (8.5)
            value |= FCR_CLEAR_TX
        # The other bits count only when bit 0 is written as one.
        self._fcr = value & FCR_KEPT if value & FCR_ENABLE else 0
        if value & FCR_CLEAR_RX:
            self._fifo.clear()
            self._refill()
        if value & FCR_CLEAR_TX and self._ier & IER_THRE:
            self._thre_pending = True

    def _write_modem_control(self, value: int) -> None:
        before = self._modem_lines()
        self._mcr = value
        self._note_line_change(before)
        self._refill()                    # bytes from outside wait while loopback is on

    def _modem_lines(self) -> int:
        if not self._mcr & MCR_LOOP:
            return self._lines
        mcr = self._mcr
        return (
            (MSR_CTS if mcr & MCR_RTS else 0)
            | (MSR_DSR if mcr & MCR_DTR else 0)
            | (MSR_RI if mcr & MCR_OUT1 else 0)
            | (MSR_DCD if mcr & MCR_OUT2 else 0)
        )

    def _modem_status(self) -> int:
        return self._modem_lines() | self._deltas

    def _note_line_change(self, before: int) -> None:
        after = self._modem_lines()
        changed = before ^ after
        self._deltas |= changed >> 4 & (MSR_DCTS | MSR_DDSR | MSR_DDCD)
        if before & ~after & MSR_RI:
            self._deltas |= MSR_TERI

    def _push(self, entry: int) -> None:
        """A byte has arrived in the receiver."""
        capacity = FIFO_SIZE if self._fcr & FCR_ENABLE else 1
        if len(self._fifo) >= capacity:
            self._errors |= LSR_OE
            if capacity > 1:
                return                    # the byte in the shift register is overwritten, the FIFO is not
            self._fifo.clear()            # without FIFO the unread byte is (8.4)
        self._fifo.append(entry)
        if len(self._fifo) == 1:
            self._errors |= entry >> _FLAGS

    def _refill(self) -> None:
        if self._mcr & MCR_LOOP:
            return
        capacity = FIFO_SIZE if self._fcr & FCR_ENABLE else 1
        while self._backlog and len(self._fifo) < capacity:
            self._push(self._backlog.popleft())

    def _identify(self) -> int:
        if self._errors and self._ier & IER_RLS:
            return IIR_RLS
        if self._fifo and self._ier & IER_RDA:
            trigger = FCR_TRIGGERS[self._fcr >> 6] if self._fcr & FCR_ENABLE else 1
            return IIR_RDA if len(self._fifo) >= trigger else IIR_TIMEOUT
        if self._thre_pending and self._ier & IER_THRE:
            return IIR_THRE
        if self._deltas and self._ier & IER_MS:
            return IIR_MS
        return IIR_NONE

    def _level(self) -> bool:
        return self._identify() != IIR_NONE
