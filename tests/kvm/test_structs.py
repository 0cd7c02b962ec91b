# SPDX-License-Identifier: Apache-2.0
"""The structures as Python objects."""

from __future__ import annotations

import pickle

import pytest

from kvmpy import _constants as c
from kvmpy import _structs as s


def test_fields_start_at_zero_and_take_keywords():
    regs = s.Regs(rip=0x1000, rax=2)
    assert (regs.rip, regs.rax, regs.rbx) == (0x1000, 2, 0)
    with pytest.raises(TypeError, match="no field 'eax'"):
        s.Regs(eax=1)
    with pytest.raises(TypeError):
        s.Regs(1)


@pytest.mark.parametrize("value", [-1, 1 << 64])
def test_integers_that_do_not_fit_are_refused(value):
    regs = s.Regs()
    with pytest.raises(ValueError, match=r"rax: .* does not fit in 64 bits"):
        regs.rax = value
    assert regs.rax == 0


def test_small_and_signed_fields_are_bounded():
    segment = s.Segment()
    segment.dpl = 255
    with pytest.raises(ValueError, match="dpl: 0x100 does not fit in 8 bits"):
        segment.dpl = 256
    channel = s.PitChannelState(count_load_time=-5)
    assert channel.count_load_time == -5
    with pytest.raises(ValueError, match="64 bits"):
        channel.count_load_time = 1 << 63


def test_wrong_types_are_refused():
    with pytest.raises(TypeError, match="rax: an int is needed, not str"):
        s.Regs(rax="1")
    with pytest.raises(TypeError, match="a Segment is needed, not Regs"):
        s.Sregs(cs=s.Regs())
    with pytest.raises(AttributeError):
        s.Regs().nothing = 1
    with pytest.raises(TypeError):
        s.Struct()


def test_nested_structures_are_views():
    sregs = s.Sregs()
    cs = sregs.cs
    cs.base = 0x1234
    assert sregs.cs.base == 0x1234
    sregs.ds = cs
    assert sregs.ds.base == 0x1234
    sregs.ds.base = 1
    assert cs.base == 0x1234
    copy = cs.copy()
    copy.base = 7
    assert sregs.cs.base == 0x1234


def test_a_view_keeps_its_parent_alive():
    view = s.Sregs(cr3=5).cs
    for _ in range(100):
        s.Sregs()
    view.base = 1
    assert view.base == 1


def test_nested_structures_take_dicts():
    sregs = s.Sregs(cs=s.Segment(base=3).to_dict(), gdt=s.Dtable(base=9, limit=7))
    assert (sregs.cs.base, sregs.gdt.limit) == (3, 7)


def test_arrays_are_views_of_fixed_length():
    debug = s.Debugregs(db=[1, 2, 3, 4])
    debug.db[0] = 0xF0
    debug.db[-1] = 9
    assert debug.db == [0xF0, 2, 3, 9]
    assert list(debug.db[1:3]) == [2, 3]
    assert len(debug.db) == 4
    with pytest.raises(IndexError, match="there are 4 items"):
        debug.db[4]
    with pytest.raises(ValueError, match="4 items are needed, not 2"):
        debug.db = [1, 2]
    with pytest.raises(ValueError, match=r"db\[0\]: .* does not fit"):
        debug.db[0] = 1 << 64
    assert repr(debug.db) == "[0xf0, 0x2, 0x3, 0x9]"


def test_arrays_of_structures_and_of_bytes():
    xcrs = s.Xcrs(nr_xcrs=1)
    xcrs.xcrs[0].value = 7
    xcrs.xcrs[1] = s.Xcr(xcr=1)
    assert xcrs.xcrs[0].value == 7
    assert xcrs.xcrs[1].xcr == 1
    fpu = s.Fpu()
    fpu.xmm[3] = bytes(range(16))
    assert fpu.xmm[3] == bytes(range(16))
    with pytest.raises(ValueError, match="16 bytes are needed, not 3"):
        fpu.xmm[0] = b"abc"


def test_unions_are_aliases():
    chip = s.Irqchip(chip_id=c.KVM_IRQCHIP_IOAPIC)
    chip.ioapic.redirtbl[2] = 0x1_0000
    assert chip.chip[24 + 16 : 24 + 24] == (0x1_0000).to_bytes(8, "little")
    chip.pic.irr = 5
    assert chip.chip[1] == 5
    assert "pic" not in repr(chip)


def test_equality_copy_and_repr():
    a, b = s.Regs(rax=1), s.Regs(rax=1)
    assert a == b
    assert a != s.Regs()
    assert a != s.Segment()
    assert a.copy() == a and a.copy() is not a
    assert repr(s.Dtable(base=0x1000, limit=0xFF)) == "Dtable(base=0x1000, limit=0xff)"
    with pytest.raises(TypeError):
        hash(a)


ALL = [v for v in vars(s).values() if isinstance(v, type) and issubclass(v, s.Struct) and v is not s.Struct]


@pytest.mark.parametrize("cls", ALL)
def test_every_class_survives_bytes_dict_and_pickle(cls):
    pattern = bytes((7 * i + 1) & 0xFF for i in range(cls.layout.size))
    made = cls.from_bytes(pattern)
    assert bytes(made) == pattern
    assert len(made) == cls.layout.size
    assert pickle.loads(pickle.dumps(made)) == made
    for field in cls.layout.fields.values():
        assert field.offset + field.size <= cls.layout.size
    again = cls.from_dict(made.to_dict())
    assert again.to_dict() == made.to_dict()
    assert plain(made.to_dict())


def plain(value: object) -> bool:
    if isinstance(value, dict):
        return all(isinstance(k, str) and plain(v) for k, v in value.items())
    if isinstance(value, list):
        return all(plain(v) for v in value)
    return isinstance(value, (int, bytes))


def test_from_bytes_checks_the_size():
    with pytest.raises(ValueError, match="Regs: 144 bytes are needed, not 143"):
        s.Regs.from_bytes(bytes(143))
    with pytest.raises(ValueError, match="144 bytes are needed, not 145"):
        s.Regs.from_bytes(bytes(145))
    with pytest.raises(ValueError, match="Xsave: 4096 bytes are needed, not 4095"):
        s.Xsave.from_bytes(bytes(4095))


@pytest.mark.parametrize(
    "state",
    [
        None,
        {},
        {"base": 1},
        {"base": 1, "limit": 2, "more": 3},
        {"base": "1", "limit": 2},
        {"base": 1, "limit": 1 << 16},
        {"base": 1, "limit": None},
    ],
)
def test_from_dict_refuses_what_is_wrong(state):
    with pytest.raises(ValueError, match=r"Dtable|limit|base"):
        s.Dtable.from_dict(state)


def test_from_dict_refuses_deep_mistakes():
    state = s.Sregs().to_dict()
    state["cs"]["base"] = b"x"
    with pytest.raises(ValueError):
        s.Sregs.from_dict(state)
    state = s.Fpu().to_dict()
    state["xmm"][0] = b"short"
    with pytest.raises(ValueError):
        s.Fpu.from_dict(state)
    state["xmm"] = 5
    with pytest.raises(ValueError):
        s.Fpu.from_dict(state)


def test_a_tail_is_what_follows_the_fixed_part():
    area = s.Xsave(tail=b"abcd")
    assert len(area) == 4100
    assert area.tail == b"abcd"
    assert s.Xsave.from_bytes(bytes(area)) == area
    assert s.Xsave.from_dict(area.to_dict()) == area
    assert s.Xsave() != area
    assert s.Xsave().tail == b""
    with pytest.raises(AttributeError, match="Regs has no tail"):
        _ = s.Regs().tail


def test_reserved_bytes_are_kept():
    raw = b"\xff" * s.Segment.layout.size
    assert bytes(s.Segment.from_bytes(raw).copy()) == raw


def test_match_by_field():
    match s.Dtable(base=0x1000, limit=3):
        case s.Dtable(base=0x1000, limit=limit):
            assert limit == 3
        case _:
            pytest.fail("no match")


def test_the_memory_of_a_view_cannot_be_had_without_its_parent():
    """Making a view needs a token of the module: a class cannot be talked into having no memory."""
    for argument in (s.Sregs(), object(), None):
        made = s.Segment.__new__(s.Segment, argument)
        assert bytes(made) == bytes(s.Segment.layout.size)


def test_a_field_does_not_reach_into_other_structures():
    assert s.Sregs.cr3.__get__(s.Sregs(cr3=5), s.Sregs) == 5
    for field in (s.Sregs.cr3, s.Sregs.tr, s.Sregs.interrupt_bitmap, s.LapicState.regs):
        with pytest.raises(TypeError, match="is not a field of Dtable"):
            field.__get__(s.Dtable(), s.Dtable)
        with pytest.raises(TypeError, match="is not a field of Dtable"):
            field.__set__(s.Dtable(), 0)


def test_routes():
    entry = s.route_msi(24, 0x1_FEE0_1000, 0x41, devid=8)
    assert (entry.gsi, entry.type, entry.flags) == (24, c.KVM_IRQ_ROUTING_MSI, 1)
    assert (entry.msi.address_lo, entry.msi.address_hi, entry.msi.data, entry.msi.devid) == (0xFEE0_1000, 1, 0x41, 8)
    entry = s.route_irqchip(4, c.KVM_IRQCHIP_IOAPIC, 20)
    assert (entry.irqchip.irqchip, entry.irqchip.pin) == (2, 20)
    assert s.route_hv_sint(1, 2, 3).hv_sint.to_dict() == {"vcpu": 2, "sint": 3}
    assert s.route_xen_evtchn(1, 2, 3).xen_evtchn.priority == 0xFFFF_FFFF
