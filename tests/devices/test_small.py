# SPDX-License-Identifier: Apache-2.0
"""The devices of a register or two: debug exit, debug console, POST codes, the reset ports."""

from __future__ import annotations

import pytest

from kvmpy.devices import DebugCon, DebugExit, Port92, PostCode, ResetControl


class Calls(list):
    """A callback that remembers its arguments."""

    def __call__(self, *args):
        self.append(args)


@pytest.mark.parametrize(
    ("size", "value", "status"),
    [(1, 0, 1), (1, 0x10, 0x21), (1, 0x1FF, 0x1FF), (4, 0x8000_0000, 0x1_0000_0001)],
)
def test_debug_exit_status_is_value_times_two_plus_one(size, value, status):
    exits = Calls()
    DebugExit(exits).write(0, size, value)
    assert exits == [(status,)]


def test_debug_exit_ignores_reads_and_other_offsets():
    exits = Calls()
    port = DebugExit(exits)
    port.write(1, 1, 1)
    assert port.read(0, 4) == 0
    assert exits == []


def test_debugcon_passes_bytes_on_and_says_that_it_is_there():
    out = bytearray()

    class Sink:
        def write(self, data):
            out.extend(data)

    port = DebugCon(Sink())
    port.write(0, 1, ord("h"))
    port.write(0, 1, ord("i"))
    assert out == b"hi"
    assert port.read(0, 1) == 0xE9


def test_post_keeps_the_last_different_codes():
    post = PostCode()
    for code in [1, 1, 2, 2, 1, *range(3, 40)]:
        post.write(0, 1, code)
    assert post.codes == list(range(8, 40))
    assert post.read(0, 1) == 39


def test_port92_resets_when_the_bit_rises():
    resets = Calls()
    port = Port92(resets)
    port.write(0, 1, 0x03)
    port.write(0, 1, 0x03)
    assert resets == [()]
    port.write(0, 1, 0x02)
    port.write(0, 1, 0x03)
    assert len(resets) == 2


def test_port92_a20_is_on_at_first_and_kept():
    port = Port92()
    assert port.read(0, 1) == 0x02
    port.write(0, 1, 0)
    assert not port.a20
    port.reset()
    assert port.a20


@pytest.mark.parametrize("kind", [0x04, 0x06, 0x0E])
def test_reset_control_resets_when_the_trigger_rises(kind):
    resets = Calls()
    port = ResetControl(resets)
    port.write(0, 1, kind & ~0x04)
    assert resets == []
    port.write(0, 1, kind)
    port.write(0, 1, kind)
    assert resets == [()]
    assert port.read(0, 1) == kind


@pytest.mark.parametrize("port", [Port92(), ResetControl()])
def test_reset_that_nobody_takes_is_logged(port, caplog):
    port.write(0, 1, 0x05)
    assert "reset" in caplog.text
