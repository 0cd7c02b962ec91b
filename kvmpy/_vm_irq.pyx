# SPDX-License-Identifier: Apache-2.0
# cython: auto_pickle=False, autotestdict=False, nonecheck=True
"""The interrupt chips of a VM and the ways to them: lines, MSIs, routes, eventfds, coalesced writes."""

from cpython.bytearray cimport PyByteArray_AS_STRING
from libc.stdint cimport int32_t, uint8_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memset

from kvmpy._handle cimport Handle
from kvmpy._linux_kvm cimport *
from kvmpy._lists cimport pack

from kvmpy._structs import Irqchip, IrqRoutingEntry, PitState, PitState2

cdef extern from "kvm_compat.h" nogil:
    struct kvm_irq_level:
        uint32_t irq
        int32_t status
        uint32_t level
    struct kvm_pit_config:
        uint32_t flags
    struct kvm_reinject_control:
        uint8_t pit_reinject
    struct kvm_msi:
        uint32_t address_lo
        uint32_t address_hi
        uint32_t data
        uint32_t flags
        uint32_t devid
    struct kvm_irqfd:
        uint32_t fd
        uint32_t gsi
        uint32_t flags
        uint32_t resamplefd
    struct kvm_ioeventfd:
        uint64_t datamatch
        uint64_t addr
        uint32_t len
        int32_t fd
        uint32_t flags
    struct kvm_hyperv_eventfd:
        uint32_t conn_id
        int32_t fd
        uint32_t flags
    struct kvm_coalesced_mmio_zone:
        uint64_t addr
        uint32_t size
        uint32_t pio
    enum: KVM_MSI_VALID_DEVID, KVM_IRQFD_FLAG_DEASSIGN, KVM_IRQFD_FLAG_RESAMPLE
    enum: KVM_IOEVENTFD_FLAG_DATAMATCH, KVM_IOEVENTFD_FLAG_PIO, KVM_IOEVENTFD_FLAG_DEASSIGN
    enum: KVM_HYPERV_EVENTFD_DEASSIGN


cdef int descriptor(object fd) except? -1:
    """A file descriptor from an int or an object with fileno()."""
    return fd if isinstance(fd, int) else fd.fileno()


cdef class VmIrq(Handle):
    """The interrupt side of a Vm."""

    # Chips

    def create_irqchip(self):
        """PIC, IOAPIC and a LAPIC per vCPU in the engine; before any vCPU.

        KVM_CREATE_IRQCHIP, api.rst 4.24; needs KVM_CAP_IRQCHIP.
        """
        self.need(KVM_CAP_IRQCHIP, KVM_CREATE_IRQCHIP)
        self.call_nogil(KVM_CREATE_IRQCHIP, 0)

    def get_irqchip(self, uint32_t chip_id):
        """The state of KVM_IRQCHIP_PIC_MASTER, _PIC_SLAVE or _IOAPIC, an Irqchip.

        KVM_GET_IRQCHIP, api.rst 4.26; needs KVM_CAP_IRQCHIP.
        """
        self.need(KVM_CAP_IRQCHIP, KVM_GET_IRQCHIP)
        chip = Irqchip(chip_id=chip_id)
        self.put(Irqchip, chip, KVM_GET_IRQCHIP)
        return chip

    def set_irqchip(self, chip):
        """Set the state of the chip that `chip.chip_id` names.

        KVM_SET_IRQCHIP, api.rst 4.27; needs KVM_CAP_IRQCHIP.
        """
        self.need(KVM_CAP_IRQCHIP, KVM_SET_IRQCHIP)
        self.put(Irqchip, chip, KVM_SET_IRQCHIP)

    def create_pit(self):
        """An i8254 without the speaker.

        KVM_CREATE_PIT, the obsolete form of create_pit2(); needs KVM_CAP_PIT.
        """
        self.need(KVM_CAP_PIT, KVM_CREATE_PIT)
        self.call_nogil(KVM_CREATE_PIT, 0)

    def create_pit2(self, uint32_t flags=0):
        """An i8254 timer beside an in-kernel irqchip; `flags`: KVM_PIT_SPEAKER_DUMMY.

        KVM_CREATE_PIT2, api.rst 4.71; needs KVM_CAP_PIT2.
        """
        cdef kvm_pit_config config
        self.need(KVM_CAP_PIT2, KVM_CREATE_PIT2)
        memset(&config, 0, sizeof(config))
        config.flags = flags
        self.call_nogil(KVM_CREATE_PIT2, <uintptr_t> &config)

    @property
    def pit(self):
        """The PIT's channels, a PitState.

        KVM_GET_PIT, KVM_SET_PIT; obsolete: pit2 has more; needs KVM_CAP_PIT.
        """
        self.need(KVM_CAP_PIT, KVM_GET_PIT)
        return self.get(PitState, KVM_GET_PIT)

    @pit.setter
    def pit(self, value):
        self.need(KVM_CAP_PIT, KVM_SET_PIT)
        self.put(PitState, value, KVM_SET_PIT)

    @property
    def pit2(self):
        """The PIT's channels and flags, a PitState2.

        KVM_GET_PIT2, KVM_SET_PIT2, api.rst 4.72, 4.73; needs KVM_CAP_PIT_STATE2.
        """
        self.need(KVM_CAP_PIT_STATE2, KVM_GET_PIT2)
        return self.get(PitState2, KVM_GET_PIT2)

    @pit2.setter
    def pit2(self, value):
        self.need(KVM_CAP_PIT_STATE2, KVM_SET_PIT2)
        self.put(PitState2, value, KVM_SET_PIT2)

    def reinject_control(self, bint reinject):
        """Shall the PIT deliver late the ticks that the guest missed?

        KVM_REINJECT_CONTROL, api.rst 4.99; needs KVM_CAP_REINJECT_CONTROL.
        """
        cdef kvm_reinject_control control
        self.need(KVM_CAP_REINJECT_CONTROL, KVM_REINJECT_CONTROL)
        memset(&control, 0, sizeof(control))
        control.pit_reinject = reinject
        self.call(KVM_REINJECT_CONTROL, <uintptr_t> &control)

    # Interrupts

    def irq_line(self, uint32_t gsi, bint level):
        """Set the level of interrupt line `gsi`.

        KVM_IRQ_LINE, api.rst 4.25.
        """
        cdef kvm_irq_level line
        line.irq, line.level = gsi, level
        self.call(KVM_IRQ_LINE, <uintptr_t> &line)

    def irq_line_status(self, uint32_t gsi, bint level):
        """The same, saying what became of it: 0 coalesced with one still pending, > 0 delivered, < 0 masked."""
        cdef kvm_irq_level line
        self.need(KVM_CAP_IRQ_INJECT_STATUS, KVM_IRQ_LINE_STATUS)
        line.irq, line.level = gsi, level
        self.call(KVM_IRQ_LINE_STATUS, <uintptr_t> &line)
        return line.status

    def signal_msi(self, uint64_t address, uint32_t data, devid=None):
        """Inject a message signalled interrupt; was it delivered, not blocked by the guest?

        KVM_SIGNAL_MSI, api.rst 4.71; needs KVM_CAP_SIGNAL_MSI.
        """
        cdef kvm_msi msi
        self.need(KVM_CAP_SIGNAL_MSI, KVM_SIGNAL_MSI)
        memset(&msi, 0, sizeof(msi))
        msi.address_lo, msi.address_hi, msi.data = <uint32_t> address, address >> 32, data
        if devid is not None:
            msi.devid, msi.flags = devid, KVM_MSI_VALID_DEVID
        return self.call(KVM_SIGNAL_MSI, <uintptr_t> &msi) > 0

    def set_gsi_routing(self, entries):
        """Where each GSI leads, a list of IrqRoutingEntry that replaces the old one.

        KVM_SET_GSI_ROUTING, api.rst 4.52; needs KVM_CAP_IRQ_ROUTING.

        E.g. [route_irqchip(4, KVM_IRQCHIP_IOAPIC, 4), route_msi(24, address, data)].
        """
        self.need(KVM_CAP_IRQ_ROUTING, KVM_SET_GSI_ROUTING)
        cdef bytearray room = pack(entries, IrqRoutingEntry, 8, "KVM_SET_GSI_ROUTING")
        self.call_nogil(KVM_SET_GSI_ROUTING, <uintptr_t> PyByteArray_AS_STRING(room))

    # Eventfds

    def irqfd(self, fd, uint32_t gsi, *, resample=None, bint deassign=False):
        """Let eventfd `fd` raise interrupt `gsi`.

        KVM_IRQFD, api.rst 4.75; needs KVM_CAP_IRQFD and KVM_CAP_IRQFD_RESAMPLE.

        `resample` is an eventfd that KVM signals when the guest ends a level-triggered interrupt. The caller keeps
        both open. `deassign` ends it.
        """
        cdef kvm_irqfd request
        self.need(KVM_CAP_IRQFD, KVM_IRQFD)
        memset(&request, 0, sizeof(request))
        request.fd, request.gsi = descriptor(fd), gsi
        if resample is not None:
            self.need(KVM_CAP_IRQFD_RESAMPLE, KVM_IRQFD)
            request.resamplefd, request.flags = descriptor(resample), KVM_IRQFD_FLAG_RESAMPLE
        if deassign:
            request.flags |= KVM_IRQFD_FLAG_DEASSIGN
        self.call_nogil(KVM_IRQFD, <uintptr_t> &request)

    def ioeventfd(self, fd, uint64_t addr, uint32_t size=0, *, bint pio=False, datamatch=None, bint deassign=False):
        """Let a guest write of `size` bytes (0: any) at `addr` signal eventfd `fd` without an exit.

        KVM_IOEVENTFD, api.rst 4.59; needs KVM_CAP_IOEVENTFD and KVM_CAP_IOEVENTFD_ANY_LENGTH.

        `pio`: `addr` is a port. `datamatch`: only writes of this value. `deassign` ends it.
        """
        cdef kvm_ioeventfd request
        self.need(KVM_CAP_IOEVENTFD, KVM_IOEVENTFD)
        if not size:
            self.need(KVM_CAP_IOEVENTFD_ANY_LENGTH, KVM_IOEVENTFD)
        memset(&request, 0, sizeof(request))
        request.fd, request.addr, request.len = descriptor(fd), addr, size
        if datamatch is not None:
            request.datamatch, request.flags = datamatch, KVM_IOEVENTFD_FLAG_DATAMATCH
        if pio:
            request.flags |= KVM_IOEVENTFD_FLAG_PIO
        if deassign:
            request.flags |= KVM_IOEVENTFD_FLAG_DEASSIGN
        self.call_nogil(KVM_IOEVENTFD, <uintptr_t> &request)

    def hyperv_eventfd(self, uint32_t conn_id, fd=-1, *, bint deassign=False):
        """Let the hypercall SIGNAL_EVENT for `conn_id` signal eventfd `fd`.

        KVM_HYPERV_EVENTFD, api.rst 4.113; needs KVM_CAP_HYPERV_EVENTFD.
        """
        cdef kvm_hyperv_eventfd request
        self.need(KVM_CAP_HYPERV_EVENTFD, KVM_HYPERV_EVENTFD)
        memset(&request, 0, sizeof(request))
        request.conn_id, request.fd = conn_id, descriptor(fd)
        request.flags = KVM_HYPERV_EVENTFD_DEASSIGN if deassign else 0
        self.call_nogil(KVM_HYPERV_EVENTFD, <uintptr_t> &request)

    # Coalesced writes: Vcpu.coalesced() takes them

    cdef int coalesced_zone(self, unsigned long request, uint64_t addr, uint32_t size, bint pio) except -1:
        cdef kvm_coalesced_mmio_zone zone
        self.need(KVM_CAP_COALESCED_PIO if pio else KVM_CAP_COALESCED_MMIO, request)
        zone.addr, zone.size, zone.pio = addr, size, pio
        self.call_nogil(request, <uintptr_t> &zone)
        return 0

    def register_coalesced_mmio(self, uint64_t addr, uint32_t size, *, bint pio=False):
        """Collect guest writes to [addr, addr + size) in a ring instead of exiting.

        KVM_REGISTER_COALESCED_MMIO, api.rst 4.116.
        """
        self.coalesced_zone(KVM_REGISTER_COALESCED_MMIO, addr, size, pio)

    def unregister_coalesced_mmio(self, uint64_t addr, uint32_t size, *, bint pio=False):
        """Undo register_coalesced_mmio(), also for zones inside.

        KVM_UNREGISTER_COALESCED_MMIO, api.rst 4.116.
        """
        self.coalesced_zone(KVM_UNREGISTER_COALESCED_MMIO, addr, size, pio)
