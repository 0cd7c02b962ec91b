# SPDX-License-Identifier: Apache-2.0
# Written by tools/struct_stubs.py from the compiled module.

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, Self, TypeVar, final, overload

from _typeshed import ReadableBuffer
from typing_extensions import disjoint_base

_S = TypeVar("_S", bound=Struct)
_T = TypeVar("_T")

@final
class Layout:
    name: str
    origin: str
    size: int
    tail: bool
    fields: dict[str, Field]

@disjoint_base
class Field:
    name: str
    offset: int
    size: int
    alias: bool

@final
class IntField(Field):
    @overload
    def __get__(self, instance: None, owner: type[Struct] | None = None, /) -> Self: ...
    @overload
    def __get__(self, instance: Struct, owner: type[Struct] | None = None, /) -> int: ...
    def __set__(self, instance: Struct, value: int, /) -> None: ...

@final
class BytesField(Field):
    @overload
    def __get__(self, instance: None, owner: type[Struct] | None = None, /) -> Self: ...
    @overload
    def __get__(self, instance: Struct, owner: type[Struct] | None = None, /) -> bytes: ...
    def __set__(self, instance: Struct, value: ReadableBuffer, /) -> None: ...

@final
class StructField(Field, Generic[_S]):
    @overload
    def __get__(self, instance: None, owner: type[Struct] | None = None, /) -> Self: ...
    @overload
    def __get__(self, instance: Struct, owner: type[Struct] | None = None, /) -> _S: ...
    def __set__(self, instance: Struct, value: _S | Mapping[str, Any], /) -> None: ...

@final
class ArrayField(Field, Generic[_T]):
    @overload
    def __get__(self, instance: None, owner: type[Struct] | None = None, /) -> Self: ...
    @overload
    def __get__(self, instance: Struct, owner: type[Struct] | None = None, /) -> Array[_T]: ...
    def __set__(self, instance: Struct, value: Array[_T] | Sequence[_T], /) -> None: ...

@final
class Array(Generic[_T]):
    def __len__(self) -> int: ...
    @overload
    def __getitem__(self, key: int, /) -> _T: ...
    @overload
    def __getitem__(self, key: slice, /) -> list[_T]: ...
    def __setitem__(self, key: int, value: _T, /) -> None: ...
    def __iter__(self) -> Iterator[_T]: ...
    __hash__: ClassVar[None]  # type: ignore[assignment]

@disjoint_base
class Struct:
    layout: ClassVar[Layout]
    __match_args__: ClassVar[tuple[str, ...]]
    __hash__: ClassVar[None]  # type: ignore[assignment]
    def __init__(self, **fields: Any) -> None: ...
    def __bytes__(self) -> bytes: ...
    def __len__(self) -> int: ...
    def copy(self) -> Self: ...
    @classmethod
    def from_bytes(cls, data: ReadableBuffer) -> Self: ...
    def to_dict(self) -> dict[str, Any]: ...
    @classmethod
    def from_dict(cls, state: Mapping[str, Any]) -> Self: ...
    @property
    def tail(self) -> bytes: ...

def route_irqchip(gsi: int, irqchip: int, pin: int) -> IrqRoutingEntry: ...
def route_msi(gsi: int, address: int, data: int, devid: int | None = None) -> IrqRoutingEntry: ...
def route_hv_sint(gsi: int, vcpu: int, sint: int) -> IrqRoutingEntry: ...
def route_xen_evtchn(gsi: int, port: int, vcpu: int, priority: int = 0xFFFF_FFFF) -> IrqRoutingEntry: ...

class Regs(Struct):
    rax: IntField
    rbx: IntField
    rcx: IntField
    rdx: IntField
    rsi: IntField
    rdi: IntField
    rsp: IntField
    rbp: IntField
    r8: IntField
    r9: IntField
    r10: IntField
    r11: IntField
    r12: IntField
    r13: IntField
    r14: IntField
    r15: IntField
    rip: IntField
    rflags: IntField
    def __init__(
        self,
        *,
        rax: int = ...,
        rbx: int = ...,
        rcx: int = ...,
        rdx: int = ...,
        rsi: int = ...,
        rdi: int = ...,
        rsp: int = ...,
        rbp: int = ...,
        r8: int = ...,
        r9: int = ...,
        r10: int = ...,
        r11: int = ...,
        r12: int = ...,
        r13: int = ...,
        r14: int = ...,
        r15: int = ...,
        rip: int = ...,
        rflags: int = ...,
    ) -> None: ...

class Segment(Struct):
    base: IntField
    limit: IntField
    selector: IntField
    type: IntField
    present: IntField
    dpl: IntField
    db: IntField
    s: IntField
    l: IntField
    g: IntField
    avl: IntField
    unusable: IntField
    def __init__(
        self,
        *,
        base: int = ...,
        limit: int = ...,
        selector: int = ...,
        type: int = ...,
        present: int = ...,
        dpl: int = ...,
        db: int = ...,
        s: int = ...,
        l: int = ...,
        g: int = ...,
        avl: int = ...,
        unusable: int = ...,
    ) -> None: ...

class Dtable(Struct):
    base: IntField
    limit: IntField
    def __init__(
        self,
        *,
        base: int = ...,
        limit: int = ...,
    ) -> None: ...

class Sregs(Struct):
    cs: StructField[Segment]
    ds: StructField[Segment]
    es: StructField[Segment]
    fs: StructField[Segment]
    gs: StructField[Segment]
    ss: StructField[Segment]
    tr: StructField[Segment]
    ldt: StructField[Segment]
    gdt: StructField[Dtable]
    idt: StructField[Dtable]
    cr0: IntField
    cr2: IntField
    cr3: IntField
    cr4: IntField
    cr8: IntField
    efer: IntField
    apic_base: IntField
    interrupt_bitmap: ArrayField[int]
    def __init__(
        self,
        *,
        cs: Segment | Mapping[str, Any] = ...,
        ds: Segment | Mapping[str, Any] = ...,
        es: Segment | Mapping[str, Any] = ...,
        fs: Segment | Mapping[str, Any] = ...,
        gs: Segment | Mapping[str, Any] = ...,
        ss: Segment | Mapping[str, Any] = ...,
        tr: Segment | Mapping[str, Any] = ...,
        ldt: Segment | Mapping[str, Any] = ...,
        gdt: Dtable | Mapping[str, Any] = ...,
        idt: Dtable | Mapping[str, Any] = ...,
        cr0: int = ...,
        cr2: int = ...,
        cr3: int = ...,
        cr4: int = ...,
        cr8: int = ...,
        efer: int = ...,
        apic_base: int = ...,
        interrupt_bitmap: Sequence[int] = ...,
    ) -> None: ...

class Sregs2(Struct):
    cs: StructField[Segment]
    ds: StructField[Segment]
    es: StructField[Segment]
    fs: StructField[Segment]
    gs: StructField[Segment]
    ss: StructField[Segment]
    tr: StructField[Segment]
    ldt: StructField[Segment]
    gdt: StructField[Dtable]
    idt: StructField[Dtable]
    cr0: IntField
    cr2: IntField
    cr3: IntField
    cr4: IntField
    cr8: IntField
    efer: IntField
    apic_base: IntField
    flags: IntField
    pdptrs: ArrayField[int]
    def __init__(
        self,
        *,
        cs: Segment | Mapping[str, Any] = ...,
        ds: Segment | Mapping[str, Any] = ...,
        es: Segment | Mapping[str, Any] = ...,
        fs: Segment | Mapping[str, Any] = ...,
        gs: Segment | Mapping[str, Any] = ...,
        ss: Segment | Mapping[str, Any] = ...,
        tr: Segment | Mapping[str, Any] = ...,
        ldt: Segment | Mapping[str, Any] = ...,
        gdt: Dtable | Mapping[str, Any] = ...,
        idt: Dtable | Mapping[str, Any] = ...,
        cr0: int = ...,
        cr2: int = ...,
        cr3: int = ...,
        cr4: int = ...,
        cr8: int = ...,
        efer: int = ...,
        apic_base: int = ...,
        flags: int = ...,
        pdptrs: Sequence[int] = ...,
    ) -> None: ...

class Fpu(Struct):
    fpr: ArrayField[bytes]
    fcw: IntField
    fsw: IntField
    ftwx: IntField
    last_opcode: IntField
    last_ip: IntField
    last_dp: IntField
    xmm: ArrayField[bytes]
    mxcsr: IntField
    def __init__(
        self,
        *,
        fpr: Sequence[bytes] = ...,
        fcw: int = ...,
        fsw: int = ...,
        ftwx: int = ...,
        last_opcode: int = ...,
        last_ip: int = ...,
        last_dp: int = ...,
        xmm: Sequence[bytes] = ...,
        mxcsr: int = ...,
    ) -> None: ...

class Xsave(Struct):
    region: ArrayField[int]
    def __init__(
        self,
        *,
        region: Sequence[int] = ...,
        tail: ReadableBuffer = ...,
    ) -> None: ...

class Xcr(Struct):
    xcr: IntField
    value: IntField
    def __init__(
        self,
        *,
        xcr: int = ...,
        value: int = ...,
    ) -> None: ...

class Xcrs(Struct):
    nr_xcrs: IntField
    flags: IntField
    xcrs: ArrayField[Xcr]
    def __init__(
        self,
        *,
        nr_xcrs: int = ...,
        flags: int = ...,
        xcrs: Sequence[Xcr] = ...,
    ) -> None: ...

class Debugregs(Struct):
    db: ArrayField[int]
    dr6: IntField
    dr7: IntField
    flags: IntField
    def __init__(
        self,
        *,
        db: Sequence[int] = ...,
        dr6: int = ...,
        dr7: int = ...,
        flags: int = ...,
    ) -> None: ...

class LapicState(Struct):
    regs: BytesField
    def __init__(
        self,
        *,
        regs: ReadableBuffer = ...,
    ) -> None: ...

class MpState(Struct):
    mp_state: IntField
    def __init__(
        self,
        *,
        mp_state: int = ...,
    ) -> None: ...

class EventsException(Struct):
    injected: IntField
    nr: IntField
    has_error_code: IntField
    pending: IntField
    error_code: IntField
    def __init__(
        self,
        *,
        injected: int = ...,
        nr: int = ...,
        has_error_code: int = ...,
        pending: int = ...,
        error_code: int = ...,
    ) -> None: ...

class EventsInterrupt(Struct):
    injected: IntField
    nr: IntField
    soft: IntField
    shadow: IntField
    def __init__(
        self,
        *,
        injected: int = ...,
        nr: int = ...,
        soft: int = ...,
        shadow: int = ...,
    ) -> None: ...

class EventsNmi(Struct):
    injected: IntField
    pending: IntField
    masked: IntField
    def __init__(
        self,
        *,
        injected: int = ...,
        pending: int = ...,
        masked: int = ...,
    ) -> None: ...

class EventsSmi(Struct):
    smm: IntField
    pending: IntField
    smm_inside_nmi: IntField
    latched_init: IntField
    def __init__(
        self,
        *,
        smm: int = ...,
        pending: int = ...,
        smm_inside_nmi: int = ...,
        latched_init: int = ...,
    ) -> None: ...

class EventsTripleFault(Struct):
    pending: IntField
    def __init__(
        self,
        *,
        pending: int = ...,
    ) -> None: ...

class VcpuEvents(Struct):
    exception: StructField[EventsException]
    interrupt: StructField[EventsInterrupt]
    nmi: StructField[EventsNmi]
    sipi_vector: IntField
    flags: IntField
    smi: StructField[EventsSmi]
    triple_fault: StructField[EventsTripleFault]
    exception_has_payload: IntField
    exception_payload: IntField
    def __init__(
        self,
        *,
        exception: EventsException | Mapping[str, Any] = ...,
        interrupt: EventsInterrupt | Mapping[str, Any] = ...,
        nmi: EventsNmi | Mapping[str, Any] = ...,
        sipi_vector: int = ...,
        flags: int = ...,
        smi: EventsSmi | Mapping[str, Any] = ...,
        triple_fault: EventsTripleFault | Mapping[str, Any] = ...,
        exception_has_payload: int = ...,
        exception_payload: int = ...,
    ) -> None: ...

class SyncRegs(Struct):
    regs: StructField[Regs]
    sregs: StructField[Sregs]
    events: StructField[VcpuEvents]
    def __init__(
        self,
        *,
        regs: Regs | Mapping[str, Any] = ...,
        sregs: Sregs | Mapping[str, Any] = ...,
        events: VcpuEvents | Mapping[str, Any] = ...,
    ) -> None: ...

class GuestDebugArch(Struct):
    debugreg: ArrayField[int]
    def __init__(
        self,
        *,
        debugreg: Sequence[int] = ...,
    ) -> None: ...

class GuestDebug(Struct):
    control: IntField
    arch: StructField[GuestDebugArch]
    def __init__(
        self,
        *,
        control: int = ...,
        arch: GuestDebugArch | Mapping[str, Any] = ...,
    ) -> None: ...

class Translation(Struct):
    linear_address: IntField
    physical_address: IntField
    valid: IntField
    writeable: IntField
    usermode: IntField
    def __init__(
        self,
        *,
        linear_address: int = ...,
        physical_address: int = ...,
        valid: int = ...,
        writeable: int = ...,
        usermode: int = ...,
    ) -> None: ...

class MsrEntry(Struct):
    index: IntField
    data: IntField
    def __init__(
        self,
        *,
        index: int = ...,
        data: int = ...,
    ) -> None: ...

class CpuidEntry(Struct):
    function: IntField
    eax: IntField
    ebx: IntField
    ecx: IntField
    edx: IntField
    def __init__(
        self,
        *,
        function: int = ...,
        eax: int = ...,
        ebx: int = ...,
        ecx: int = ...,
        edx: int = ...,
    ) -> None: ...

class CpuidEntry2(Struct):
    function: IntField
    index: IntField
    flags: IntField
    eax: IntField
    ebx: IntField
    ecx: IntField
    edx: IntField
    def __init__(
        self,
        *,
        function: int = ...,
        index: int = ...,
        flags: int = ...,
        eax: int = ...,
        ebx: int = ...,
        ecx: int = ...,
        edx: int = ...,
    ) -> None: ...

class X86Mce(Struct):
    status: IntField
    addr: IntField
    misc: IntField
    mcg_status: IntField
    bank: IntField
    def __init__(
        self,
        *,
        status: int = ...,
        addr: int = ...,
        misc: int = ...,
        mcg_status: int = ...,
        bank: int = ...,
    ) -> None: ...

class PicState(Struct):
    last_irr: IntField
    irr: IntField
    imr: IntField
    isr: IntField
    priority_add: IntField
    irq_base: IntField
    read_reg_select: IntField
    poll: IntField
    special_mask: IntField
    init_state: IntField
    auto_eoi: IntField
    rotate_on_auto_eoi: IntField
    special_fully_nested_mode: IntField
    init4: IntField
    elcr: IntField
    elcr_mask: IntField
    def __init__(
        self,
        *,
        last_irr: int = ...,
        irr: int = ...,
        imr: int = ...,
        isr: int = ...,
        priority_add: int = ...,
        irq_base: int = ...,
        read_reg_select: int = ...,
        poll: int = ...,
        special_mask: int = ...,
        init_state: int = ...,
        auto_eoi: int = ...,
        rotate_on_auto_eoi: int = ...,
        special_fully_nested_mode: int = ...,
        init4: int = ...,
        elcr: int = ...,
        elcr_mask: int = ...,
    ) -> None: ...

class IoapicState(Struct):
    base_address: IntField
    ioregsel: IntField
    id: IntField
    irr: IntField
    redirtbl: ArrayField[int]
    def __init__(
        self,
        *,
        base_address: int = ...,
        ioregsel: int = ...,
        id: int = ...,
        irr: int = ...,
        redirtbl: Sequence[int] = ...,
    ) -> None: ...

class Irqchip(Struct):
    chip_id: IntField
    chip: BytesField
    pic: StructField[PicState]
    ioapic: StructField[IoapicState]
    def __init__(
        self,
        *,
        chip_id: int = ...,
        chip: ReadableBuffer = ...,
        pic: PicState | Mapping[str, Any] = ...,
        ioapic: IoapicState | Mapping[str, Any] = ...,
    ) -> None: ...

class PitChannelState(Struct):
    count: IntField
    latched_count: IntField
    count_latched: IntField
    status_latched: IntField
    status: IntField
    read_state: IntField
    write_state: IntField
    write_latch: IntField
    rw_mode: IntField
    mode: IntField
    bcd: IntField
    gate: IntField
    count_load_time: IntField
    def __init__(
        self,
        *,
        count: int = ...,
        latched_count: int = ...,
        count_latched: int = ...,
        status_latched: int = ...,
        status: int = ...,
        read_state: int = ...,
        write_state: int = ...,
        write_latch: int = ...,
        rw_mode: int = ...,
        mode: int = ...,
        bcd: int = ...,
        gate: int = ...,
        count_load_time: int = ...,
    ) -> None: ...

class PitState(Struct):
    channels: ArrayField[PitChannelState]
    def __init__(
        self,
        *,
        channels: Sequence[PitChannelState] = ...,
    ) -> None: ...

class PitState2(Struct):
    channels: ArrayField[PitChannelState]
    flags: IntField
    def __init__(
        self,
        *,
        channels: Sequence[PitChannelState] = ...,
        flags: int = ...,
    ) -> None: ...

class ClockData(Struct):
    clock: IntField
    flags: IntField
    realtime: IntField
    host_tsc: IntField
    def __init__(
        self,
        *,
        clock: int = ...,
        flags: int = ...,
        realtime: int = ...,
        host_tsc: int = ...,
    ) -> None: ...

class IrqRoutingIrqchip(Struct):
    irqchip: IntField
    pin: IntField
    def __init__(
        self,
        *,
        irqchip: int = ...,
        pin: int = ...,
    ) -> None: ...

class IrqRoutingMsi(Struct):
    address_lo: IntField
    address_hi: IntField
    data: IntField
    devid: IntField
    def __init__(
        self,
        *,
        address_lo: int = ...,
        address_hi: int = ...,
        data: int = ...,
        devid: int = ...,
    ) -> None: ...

class IrqRoutingHvSint(Struct):
    vcpu: IntField
    sint: IntField
    def __init__(
        self,
        *,
        vcpu: int = ...,
        sint: int = ...,
    ) -> None: ...

class IrqRoutingXenEvtchn(Struct):
    port: IntField
    vcpu: IntField
    priority: IntField
    def __init__(
        self,
        *,
        port: int = ...,
        vcpu: int = ...,
        priority: int = ...,
    ) -> None: ...

class IrqRoutingEntry(Struct):
    gsi: IntField
    type: IntField
    flags: IntField
    u: BytesField
    irqchip: StructField[IrqRoutingIrqchip]
    msi: StructField[IrqRoutingMsi]
    hv_sint: StructField[IrqRoutingHvSint]
    xen_evtchn: StructField[IrqRoutingXenEvtchn]
    def __init__(
        self,
        *,
        gsi: int = ...,
        type: int = ...,
        flags: int = ...,
        u: ReadableBuffer = ...,
        irqchip: IrqRoutingIrqchip | Mapping[str, Any] = ...,
        msi: IrqRoutingMsi | Mapping[str, Any] = ...,
        hv_sint: IrqRoutingHvSint | Mapping[str, Any] = ...,
        xen_evtchn: IrqRoutingXenEvtchn | Mapping[str, Any] = ...,
    ) -> None: ...

class XenHvmConfig(Struct):
    flags: IntField
    msr: IntField
    blob_addr_32: IntField
    blob_addr_64: IntField
    blob_size_32: IntField
    blob_size_64: IntField
    def __init__(
        self,
        *,
        flags: int = ...,
        msr: int = ...,
        blob_addr_32: int = ...,
        blob_addr_64: int = ...,
        blob_size_32: int = ...,
        blob_size_64: int = ...,
    ) -> None: ...

class XenHvmAttr(Struct):
    type: IntField
    u: BytesField
    long_mode: IntField
    vector: IntField
    shared_info: IntField
    xen_version: IntField
    evtchn_send_port: IntField
    evtchn_type: IntField
    evtchn_flags: IntField
    evtchn_port: IntField
    evtchn_vcpu: IntField
    evtchn_priority: IntField
    evtchn_fd: IntField
    def __init__(
        self,
        *,
        type: int = ...,
        u: ReadableBuffer = ...,
        long_mode: int = ...,
        vector: int = ...,
        shared_info: int = ...,
        xen_version: int = ...,
        evtchn_send_port: int = ...,
        evtchn_type: int = ...,
        evtchn_flags: int = ...,
        evtchn_port: int = ...,
        evtchn_vcpu: int = ...,
        evtchn_priority: int = ...,
        evtchn_fd: int = ...,
    ) -> None: ...

class XenVcpuAttr(Struct):
    type: IntField
    u: BytesField
    gpa: IntField
    vcpu_id: IntField
    vector: IntField
    state: IntField
    state_entry_time: IntField
    time_running: IntField
    time_runnable: IntField
    time_blocked: IntField
    time_offline: IntField
    timer_port: IntField
    timer_priority: IntField
    timer_expires_ns: IntField
    def __init__(
        self,
        *,
        type: int = ...,
        u: ReadableBuffer = ...,
        gpa: int = ...,
        vcpu_id: int = ...,
        vector: int = ...,
        state: int = ...,
        state_entry_time: int = ...,
        time_running: int = ...,
        time_runnable: int = ...,
        time_blocked: int = ...,
        time_offline: int = ...,
        timer_port: int = ...,
        timer_priority: int = ...,
        timer_expires_ns: int = ...,
    ) -> None: ...

class NestedState(Struct):
    flags: IntField
    format: IntField
    size: IntField
    hdr: BytesField
    vmx_vmxon_pa: IntField
    vmx_vmcs12_pa: IntField
    vmx_smm_flags: IntField
    vmx_flags: IntField
    vmx_preemption_timer_deadline: IntField
    svm_vmcb_pa: IntField
    def __init__(
        self,
        *,
        flags: int = ...,
        format: int = ...,
        size: int = ...,
        hdr: ReadableBuffer = ...,
        vmx_vmxon_pa: int = ...,
        vmx_vmcs12_pa: int = ...,
        vmx_smm_flags: int = ...,
        vmx_flags: int = ...,
        vmx_preemption_timer_deadline: int = ...,
        svm_vmcb_pa: int = ...,
        tail: ReadableBuffer = ...,
    ) -> None: ...
