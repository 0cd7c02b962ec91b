# SPDX-License-Identifier: Apache-2.0
# cython: auto_pickle=False, autotestdict=False, nonecheck=True
"""The kernel's structures as Python objects.

Each class is a C buffer with the kernel's own layout (struct_tables.h) and the kernel's own field names as
attributes. A nested structure or array is a view of its parent: `sregs.cs.base = 0` writes into `sregs`.
"""

cimport cython
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.mem cimport PyMem_Calloc, PyMem_Free
from libc.stdint cimport int8_t, int16_t, int32_t, int64_t, uint8_t, uint16_t, uint32_t, uint64_t, uintptr_t
from libc.string cimport memcmp, memcpy

cdef extern from "struct_tables.h" nogil:
    enum: FIELD_UINT, FIELD_INT, FIELD_BYTES, FIELD_STRUCT, FIELD_UINTS, FIELD_STRUCTS, FIELD_BYTESTRINGS
    struct kvmpy_field:
        const char *name
        uint16_t offset, size, item
        uint8_t kind, alias
        const char *type
    struct kvmpy_layout:
        const char *name
        const char *origin
        size_t size
        int tail
        const kvmpy_field *fields
        size_t count
    enum: KVMPY_LAYOUT_COUNT
    enum: KVM_IRQ_ROUTING_IRQCHIP, KVM_IRQ_ROUTING_MSI, KVM_IRQ_ROUTING_HV_SINT, KVM_IRQ_ROUTING_XEN_EVTCHN
    enum: KVM_MSI_VALID_DEVID
    const kvmpy_layout kvmpy_layouts[1]


@cython.final
cdef class Layout:
    """What a structure class is made of: `name`, `origin` (the C name), `size` in bytes, `fields` by name."""

    def __repr__(self):
        return f"<Layout of {self.name}: {self.origin}, {self.size} bytes>"


cdef inline object load(const char *at, size_t size, bint signed):
    if size == 8:
        return (<const int64_t *> at)[0] if signed else (<const uint64_t *> at)[0]
    if size == 4:
        return (<const int32_t *> at)[0] if signed else (<const uint32_t *> at)[0]
    if size == 2:
        return (<const int16_t *> at)[0] if signed else (<const uint16_t *> at)[0]
    return (<const int8_t *> at)[0] if signed else (<const uint8_t *> at)[0]


cdef int store(char *at, size_t size, bint signed, object value, object where) except -1:
    cdef uint64_t bits
    cdef int64_t number
    if not isinstance(value, int):
        value = value.__index__() if hasattr(value, "__index__") else value
        if not isinstance(value, int):
            raise TypeError(f"{where}: an int is needed, not {type(value).__name__}")
    try:
        if signed:
            number = value
            if size < 8 and not -(1 << (8 * size - 1)) <= number < (1 << (8 * size - 1)):
                raise OverflowError
            bits = <uint64_t> number
        else:
            bits = value
            if size < 8 and bits >> (8 * size):
                raise OverflowError
    except OverflowError:
        raise ValueError(f"{where}: {value:#x} does not fit in {8 * size} bits") from None
    memcpy(at, &bits, size)  # little-endian, like everything here
    return 0


cdef class Field:
    """An attribute of a structure: where it is (`offset`, `size` in bytes) and whether it names other fields' bytes."""

    cdef readonly str name
    cdef readonly size_t offset
    cdef readonly size_t size
    cdef readonly bint alias      # a union member: the same bytes as another field
    cdef size_t item
    cdef object type              # class of nested structures

    def __repr__(self):
        return f"<{type(self).__name__} {self.name} at {self.offset:#x}, {self.size} bytes>"

    def __get__(self, Struct obj, owner):
        if obj is None:
            return self
        self.check(obj)
        return self.get(obj)

    def __set__(self, Struct obj not None, value):
        self.check(obj)
        self.set(obj, value)

    cdef inline int check(self, Struct obj) except -1:
        """A field of one class must not be used to reach beyond a structure of another."""
        if self.offset + self.size > obj.size:
            raise TypeError(f"{self.name} is not a field of {type(obj).__name__}")
        return 0

    cdef object get(self, Struct obj):
        raise NotImplementedError

    cdef int set(self, Struct obj, object value) except -1:
        raise NotImplementedError

    cdef object plain(self, Struct obj):
        """The value as ints, bytes, lists and dicts."""
        return self.get(obj)


@cython.final
cdef class IntField(Field):
    """An integer."""

    cdef bint signed

    def __get__(self, Struct obj, owner):
        if obj is None:
            return self
        self.check(obj)
        return load(obj.pointer + self.offset, self.size, self.signed)

    def __set__(self, Struct obj not None, value):
        self.check(obj)
        store(obj.pointer + self.offset, self.size, self.signed, value, self.name)

    cdef object get(self, Struct obj):
        return load(obj.pointer + self.offset, self.size, self.signed)

    cdef int set(self, Struct obj, object value) except -1:
        return store(obj.pointer + self.offset, self.size, self.signed, value, self.name)


@cython.final
cdef class BytesField(Field):
    """A string of bytes of fixed length."""

    cdef object get(self, Struct obj):
        return PyBytes_FromStringAndSize(obj.pointer + self.offset, self.size)

    cdef int set(self, Struct obj, object value) except -1:
        return store_bytes(obj.pointer + self.offset, self.size, value, self.name)


cdef int store_bytes(char *at, size_t size, object value, object where) except -1:
    cdef const unsigned char[::1] data = value
    if <size_t> data.shape[0] != size:
        raise ValueError(f"{where}: {size} bytes are needed, not {data.shape[0]}")
    if size:
        memcpy(at, &data[0], size)
    return 0


@cython.final
cdef class StructField(Field):
    """A nested structure; reading gives a view of it, writing copies into it."""

    cdef object get(self, Struct obj):
        return view(self.type, obj, self.offset)

    cdef int set(self, Struct obj, object value) except -1:
        return assign(<Struct> view(self.type, obj, self.offset), value, self.name)

    cdef object plain(self, Struct obj):
        return (<Struct> self.get(obj)).to_dict()


@cython.final
cdef class ArrayField(Field):
    """An array; reading gives a view of it, writing replaces all its items."""

    cdef int kind

    cdef object get(self, Struct obj):
        cdef Array array = Array.__new__(Array)
        array.parent = obj
        array.field = self
        array.count = self.size // self.item
        return array

    cdef int set(self, Struct obj, object value) except -1:
        (<Array> self.get(obj)).replace(list(value))
        return 0

    cdef object plain(self, Struct obj):
        cdef list items = list(self.get(obj))
        return [(<Struct> x).to_dict() for x in items] if self.kind == FIELD_STRUCTS else items


@cython.final
cdef class Array:
    """An array inside a structure, as a sequence of fixed length whose items can be replaced."""

    cdef Struct parent
    cdef ArrayField field
    cdef Py_ssize_t count

    def __init__(self):
        raise TypeError("arrays are made by the structure that holds them")

    def __len__(self):
        return self.count

    cdef char *at(self, Py_ssize_t index) except NULL:
        if index < 0:
            index += self.count
        if not 0 <= index < self.count:
            raise IndexError(f"{self.field.name}[{index}]: there are {self.count} items")
        return self.parent.pointer + self.field.offset + index * self.field.item

    def __getitem__(self, index):
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self.count))]
        cdef char *at = self.at(index)
        if self.field.kind == FIELD_UINTS:
            return load(at, self.field.item, False)
        if self.field.kind == FIELD_BYTESTRINGS:
            return PyBytes_FromStringAndSize(at, self.field.item)
        return view(self.field.type, self.parent, at - self.parent.pointer)

    def __setitem__(self, index, value):
        cdef char *at = self.at(index)
        where = f"{self.field.name}[{index}]"
        if self.field.kind == FIELD_UINTS:
            store(at, self.field.item, False, value, where)
        elif self.field.kind == FIELD_BYTESTRINGS:
            store_bytes(at, self.field.item, value, where)
        else:
            assign(<Struct> self[index], value, where)

    cdef int replace(self, list values) except -1:
        cdef Py_ssize_t i
        if len(values) != self.count:
            raise ValueError(f"{self.field.name}: {self.count} items are needed, not {len(values)}")
        for i in range(self.count):
            self[i] = values[i]
        return 0

    def __iter__(self):
        return iter([self[i] for i in range(self.count)])

    def __eq__(self, other):
        if not isinstance(other, (Array, list, tuple)):
            return NotImplemented
        return list(self) == list(other)

    __hash__ = None

    def __repr__(self):
        if self.field.kind == FIELD_UINTS:
            return "[" + ", ".join(f"{x:#x}" for x in self) + "]"
        return repr(list(self))


cdef object VIEW = object()  # known to this file only: a structure without memory must not get out


cdef object view(object cls, Struct parent, size_t offset):
    cdef Struct made = cls.__new__(cls, VIEW)
    made.pointer = parent.pointer + offset
    made.parent = parent
    return made


cdef int assign(Struct target, object value, str what) except -1:
    if isinstance(value, dict):
        value = type(target).from_dict(value)
    if not isinstance(value, type(target)):
        raise TypeError(f"{what}: a {type(target).__name__} is needed, not {type(value).__name__}")
    if (<Struct> value).size != target.size:
        raise ValueError(f"{what}: {target.size} bytes are needed, not {(<Struct> value).size}")
    memcpy(target.pointer, (<Struct> value).pointer, target.size)
    return 0


cdef class Struct:
    """Base of the structure classes: zeroed at first, then filled from keyword arguments by field name."""

    layout = None  # a Layout in each class

    def __cinit__(self, *args, **fields):
        cdef Layout layout = type(self).layout
        if layout is None:
            raise TypeError("Struct is only the base of the structure classes")
        self.shape = layout
        self.size = layout.size
        if args and args[0] is VIEW:
            return  # view() sets the pointer
        self.pointer = <char *> PyMem_Calloc(1, self.size)
        if self.pointer == NULL:
            raise MemoryError

    def __dealloc__(self):
        if self.parent is None:
            PyMem_Free(self.pointer)

    def __init__(self, **fields):
        for name, value in fields.items():
            if name == "tail" and self.shape.tail:
                set_tail(self, value)
                continue
            field = self.shape.fields.get(name)
            if field is None:
                raise TypeError(f"{self.shape.name} has no field {name!r}")
            (<Field> field).set(self, value)

    def __bytes__(self):
        return PyBytes_FromStringAndSize(self.pointer, self.size)

    def __len__(self):
        """Size in bytes."""
        return self.size

    def __eq__(self, other):
        if type(other) is not type(self):
            return NotImplemented
        cdef Struct that = other
        return self.size == that.size and memcmp(self.pointer, that.pointer, self.size) == 0

    __hash__ = None

    def __repr__(self):
        parts = []
        for name, field in self.shape.fields.items():
            if (<Field> field).alias:
                continue
            value = (<Field> field).get(self)
            parts.append(f"{name}={value:#x}" if isinstance(value, int) else f"{name}={value!r}")
        return f"{self.shape.name}({', '.join(parts)})"

    def copy(self):
        """An independent copy, also of a view."""
        return type(self).from_bytes(bytes(self))

    @classmethod
    def from_bytes(cls, data):
        """The structure with the kernel's layout in `data`, which must have its size (or more, if it has a tail)."""
        cdef const unsigned char[::1] source = data
        cdef Struct made = cls()
        cdef size_t size = source.shape[0]
        if size != made.size:
            if not made.shape.tail or size < made.size:
                raise ValueError(f"{made.shape.name}: {made.size} bytes are needed, not {size}")
            resize(made, size)
        memcpy(made.pointer, &source[0], size)
        return made

    def to_dict(self):
        """The fields by name as plain ints, bytes, lists and dicts, for snapshots."""
        cdef dict plain = {}
        for name, field in self.shape.fields.items():
            if not (<Field> field).alias:
                plain[name] = (<Field> field).plain(self)
        if self.shape.tail:
            plain["tail"] = self.tail
        return plain

    @classmethod
    def from_dict(cls, state):
        """The structure that to_dict() described; unknown or missing names and wrong values are ValueError."""
        cdef Struct made = cls()
        if not isinstance(state, dict):
            raise ValueError(f"{made.shape.name}: a dict is needed, not {type(state).__name__}")
        names = {n for n, f in made.shape.fields.items() if not (<Field> f).alias}
        if made.shape.tail:
            names.add("tail")
        if names != set(state):
            wrong = ", ".join(sorted(map(str, names ^ set(state))))
            raise ValueError(f"{made.shape.name}: missing or unknown fields: {wrong}")
        for name, value in state.items():
            try:
                if name == "tail" and made.shape.tail:
                    set_tail(made, value)
                else:
                    (<Field> made.shape.fields[name]).set(made, value)
            except TypeError as wrong:
                raise ValueError(f"{made.shape.name}: {wrong}") from None
        return made

    @property
    def tail(self):
        """What follows the fixed part, as bytes (Xsave, NestedState); given when the structure is made."""
        if not self.shape.tail:
            raise AttributeError(f"{self.shape.name} has no tail")
        return PyBytes_FromStringAndSize(self.pointer + self.shape.size, self.size - self.shape.size)

    def __reduce__(self):
        return type(self).from_bytes, (bytes(self),)


cdef int resize(Struct made, size_t size) except -1:
    """Give a structure with a tail its size, before anybody else has seen it."""
    cdef char *room = <char *> PyMem_Calloc(1, size)
    if room == NULL:
        raise MemoryError
    memcpy(room, made.pointer, min(size, made.size))
    PyMem_Free(made.pointer)
    made.pointer = room
    made.size = size
    return 0


cdef int set_tail(Struct made, object value) except -1:
    cdef bytes data = bytes(memoryview(value))
    resize(made, made.shape.size + PyBytes_GET_SIZE(data))
    memcpy(made.pointer + made.shape.size, PyBytes_AS_STRING(data), PyBytes_GET_SIZE(data))
    return 0


cdef Field make_field(const kvmpy_field *row, dict classes):
    cdef Field field
    cdef IntField number
    cdef ArrayField array
    if row.kind in (FIELD_UINT, FIELD_INT):
        number = IntField.__new__(IntField)
        number.signed = row.kind == FIELD_INT
        field = number
    elif row.kind == FIELD_BYTES:
        field = BytesField.__new__(BytesField)
    elif row.kind == FIELD_STRUCT:
        field = StructField.__new__(StructField)
    else:
        array = ArrayField.__new__(ArrayField)
        array.kind = row.kind
        field = array
    field.name = row.name.decode()
    field.offset, field.size, field.item, field.alias = row.offset, row.size, row.item, row.alias
    if row.type != NULL:
        field.type = classes[row.type.decode()]
    return field


cdef int build(dict into) except -1:
    """Make the classes from the tables."""
    cdef const kvmpy_layout *row
    cdef Layout layout
    cdef size_t i, j
    cdef Field field
    for i in range(KVMPY_LAYOUT_COUNT):
        row = &kvmpy_layouts[i]
        layout = Layout.__new__(Layout)
        layout.name, layout.origin = row.name.decode(), row.origin.decode()
        layout.size, layout.tail, layout.fields = row.size, row.tail, {}
        members = {"__slots__": (), "__module__": __name__, "layout": layout, "__doc__": f"{layout.origin}."}
        for j in range(row.count):
            field = make_field(&row.fields[j], into)
            layout.fields[field.name] = members[field.name] = field
        members["__match_args__"] = tuple(layout.fields)
        into[layout.name] = type(Struct)(layout.name, (Struct,), members)
    return 0


cdef dict classes = {}
build(classes)
globals().update(classes)


cdef object route(object gsi, int type, str part, dict values):
    entry = classes["IrqRoutingEntry"](gsi=gsi, type=type)
    target = getattr(entry, part)
    for name, value in values.items():
        setattr(target, name, value)
    return entry


def route_irqchip(gsi, irqchip, pin):
    """A route of Vm.set_gsi_routing(): `gsi` to `pin` of KVM_IRQCHIP_PIC_MASTER, _PIC_SLAVE or _IOAPIC."""
    return route(gsi, KVM_IRQ_ROUTING_IRQCHIP, "irqchip", {"irqchip": irqchip, "pin": pin})


def route_msi(gsi, address, data, devid=None):
    """A route of Vm.set_gsi_routing(): `gsi` to a message `data` written to `address`."""
    message = {"address_lo": address & 0xFFFF_FFFF, "address_hi": address >> 32, "data": data, "devid": devid or 0}
    entry = route(gsi, KVM_IRQ_ROUTING_MSI, "msi", message)
    entry.flags = KVM_MSI_VALID_DEVID if devid is not None else 0
    return entry


def route_hv_sint(gsi, vcpu, sint):
    """A route of Vm.set_gsi_routing(): `gsi` to Hyper-V synthetic interrupt `sint` of `vcpu`."""
    return route(gsi, KVM_IRQ_ROUTING_HV_SINT, "hv_sint", {"vcpu": vcpu, "sint": sint})


def route_xen_evtchn(gsi, port, vcpu, priority=0xFFFF_FFFF):
    """A route of Vm.set_gsi_routing(): `gsi` to Xen event channel `port` of `vcpu`; the default priority is 2-level."""
    return route(gsi, KVM_IRQ_ROUTING_XEN_EVTCHN, "xen_evtchn", {"port": port, "vcpu": vcpu, "priority": priority})
