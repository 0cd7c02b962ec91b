# SPDX-License-Identifier: Apache-2.0
# cython: auto_pickle=False, autotestdict=False
"""A piece of mapped host memory: mmap(2), the buffer protocol, copies and single loads and stores.

Why not `mmap.mmap`: it cannot choose an aligned address (huge pages need host and guest address equal modulo
2 MiB), cannot put zero pages over a part, holds the GIL in long copies and has no atomic access.

Lifetime: whoever has a buffer of a Mapping, or is inside one of its methods, pins it; `close()` refuses with
BufferError while there are pins. The count is atomic, so this holds for threads without a GIL too.
"""

from cpython.buffer cimport (
    PyBUF_SIMPLE, PyBUF_WRITABLE, PyBuffer_FillInfo, PyBuffer_Release, PyObject_GetBuffer,
)
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.exc cimport PyErr_SetFromErrno
from libc.stdint cimport int64_t, uint64_t, uintptr_t
from libc.string cimport memcpy, memmove, memset

from kvmpy.errors import StateError

cdef extern from "<sys/mman.h>" nogil:
    void *mmap(void *address, size_t size, int prot, int flags, int fd, int64_t offset)
    int munmap(void *address, size_t size)
    int madvise(void *address, size_t size, int advice)
    int msync(void *address, size_t size, int flags)
    void *MAP_FAILED
    int PROT_NONE, PROT_READ, PROT_WRITE
    int MAP_SHARED, MAP_PRIVATE, MAP_ANONYMOUS, MAP_FIXED, MAP_NORESERVE, MAP_HUGETLB
    int MS_SYNC

cdef extern from *:
    """
    #include <string.h>
    #include <unistd.h>
    #include <fcntl.h>
    #include <stdint.h>
    void *memmem(const void *haystack, size_t length, const void *needle, size_t size);
    #define KVMPY_MAP_HUGE_SHIFT 26 /* MAP_HUGE_SHIFT, <linux/mman.h> */

    /* An aligned 1, 2, 4 or 8 byte access is one instruction, so a vCPU that runs meanwhile sees all of it or
     * nothing; anything else is copied. */
    static inline uint64_t kvmpy_load(const unsigned char *p, size_t size)
    {
        uint64_t value = 0;
        if (((uintptr_t)p & (size - 1)) == 0) {
            switch (size) {
            case 1: return __atomic_load_n(p, __ATOMIC_ACQUIRE);
            case 2: return __atomic_load_n((const uint16_t *)p, __ATOMIC_ACQUIRE);
            case 4: return __atomic_load_n((const uint32_t *)p, __ATOMIC_ACQUIRE);
            case 8: return __atomic_load_n((const uint64_t *)p, __ATOMIC_ACQUIRE);
            }
        }
        memcpy(&value, p, size);
        return value;
    }

    static inline void kvmpy_store(unsigned char *p, size_t size, uint64_t value)
    {
        if (((uintptr_t)p & (size - 1)) == 0) {
            switch (size) {
            case 1: __atomic_store_n(p, (uint8_t)value, __ATOMIC_RELEASE); return;
            case 2: __atomic_store_n((uint16_t *)p, (uint16_t)value, __ATOMIC_RELEASE); return;
            case 4: __atomic_store_n((uint32_t *)p, (uint32_t)value, __ATOMIC_RELEASE); return;
            case 8: __atomic_store_n((uint64_t *)p, value, __ATOMIC_RELEASE); return;
            }
        }
        memcpy(p, &value, size);
    }

    /* The number of pins, or -1 when the memory is unmapped (or about to be). */
    static inline int kvmpy_pin(Py_ssize_t *pins)
    {
        Py_ssize_t now = __atomic_load_n(pins, __ATOMIC_RELAXED);
        while (now >= 0)
            if (__atomic_compare_exchange_n(pins, &now, now + 1, 1, __ATOMIC_ACQUIRE, __ATOMIC_RELAXED))
                return 1;
        return 0;
    }

    static inline void kvmpy_unpin(Py_ssize_t *pins)
    {
        __atomic_fetch_sub(pins, 1, __ATOMIC_RELEASE);
    }

    /* No pins from now on; returns 0 when there are some. */
    static inline int kvmpy_retire(Py_ssize_t *pins)
    {
        Py_ssize_t none = 0;
        return __atomic_compare_exchange_n(pins, &none, -1, 0, __ATOMIC_ACQ_REL, __ATOMIC_RELAXED) || none < 0;
    }
    """
    int kvmpy_pin(Py_ssize_t *pins) nogil
    void kvmpy_unpin(Py_ssize_t *pins) nogil
    int kvmpy_retire(Py_ssize_t *pins) nogil
    void *memmem(const void *haystack, size_t length, const void *needle, size_t size) nogil
    uint64_t kvmpy_load(const unsigned char *p, size_t size) nogil
    void kvmpy_store(unsigned char *p, size_t size, uint64_t value) nogil
    int KVMPY_MAP_HUGE_SHIFT

# Copies from here on let other Python threads run.
cdef enum:
    LONG_COPY = 64 * 1024


cdef class Mapping:
    """`size` bytes of host memory, page aligned.

    size: bytes. fd: what to map, -1 for zeroed anonymous memory (the caller keeps and closes it); offset: where
    in it. shared: writes reach the file and other mappings. readonly: the host cannot write either.
    hugetlb_shift: 21 or 30 to take pages of that size from the hugetlb pool, which are reserved here.
    align: of the address, a power of two. Raises OSError as mmap(2) fails.
    """

    cdef unsigned char *base
    cdef size_t length          # what the user sees
    cdef void *reserved         # what was mapped, with the slack of the alignment
    cdef size_t reserved_length
    cdef Py_ssize_t pins        # -1: closed
    cdef bint read_only
    cdef object __weakref__

    def __cinit__(self, Py_ssize_t size, *, int fd=-1, int64_t offset=0, bint shared=False, bint readonly=False,
                  int hugetlb_shift=0, size_t align=4096):
        cdef int prot = PROT_READ if readonly else PROT_READ | PROT_WRITE
        cdef int flags = MAP_SHARED if shared else MAP_PRIVATE
        cdef uintptr_t start
        cdef void *place
        if size <= 0:
            raise ValueError(f"memory size must be positive, not {size}")
        if align & (align - 1) or align < 4096:
            raise ValueError(f"alignment must be a power of two of at least 4096, not {align}")
        if fd < 0:
            flags |= MAP_ANONYMOUS
        if hugetlb_shift:
            # Reserved pages: running out is ENOMEM here, not SIGBUS in the middle of a guest.
            if fd < 0:
                flags |= MAP_HUGETLB | (hugetlb_shift << KVMPY_MAP_HUGE_SHIFT)
            align = max(align, <size_t>1 << hugetlb_shift)
        else:
            flags |= MAP_NORESERVE
        # First only addresses, enough of them to find an aligned place inside. What stays around the
        # memory is inaccessible, so an overrun in C faults instead of hitting a neighbour.
        cdef size_t total = <size_t>size + align
        place = mmap(NULL, total, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0)
        if place == MAP_FAILED:
            PyErr_SetFromErrno(OSError)
        start = (<uintptr_t>place + align - 1) & ~<uintptr_t>(align - 1)
        if mmap(<void *>start, size, prot, flags | MAP_FIXED, fd, offset) == MAP_FAILED:
            try:
                PyErr_SetFromErrno(OSError)
            finally:
                munmap(place, total)
        self.reserved = place
        self.reserved_length = total
        self.base = <unsigned char *>start
        self.length = size
        self.read_only = readonly

    def __dealloc__(self):
        if self.reserved != NULL:
            munmap(self.reserved, self.reserved_length)

    # -- lifetime

    def close(self):
        """Unmap the memory; again is no error. Raises BufferError while a view of it exists."""
        if not kvmpy_retire(&self.pins):
            raise BufferError(f"{self.views} view(s) of this memory still exist: release them before close()")
        cdef void *place = self.reserved
        self.reserved = NULL
        if place != NULL:
            munmap(place, self.reserved_length)

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.close()

    @property
    def closed(self):
        """True after `close()`."""
        return self.pins < 0

    @property
    def views(self):
        """How many buffers of this memory are out (memory regions hold one each)."""
        return max(self.pins, 0)

    @property
    def address(self):
        """The host virtual address (HVA) of the first byte. Only for who also keeps a view."""
        self.pin(0, 0)
        self.unpin()
        return <uintptr_t>self.base

    @property
    def size(self):
        """Bytes; 0 when closed."""
        return 0 if self.pins < 0 else self.length

    @property
    def readonly(self):
        """True when the host may only read it."""
        return bool(self.read_only)

    def __len__(self):
        return 0 if self.pins < 0 else self.length

    def __getbuffer__(self, Py_buffer *buffer, int flags):
        self.pin(0, 0)
        try:
            PyBuffer_FillInfo(buffer, self, self.base, self.length, self.read_only, flags)
        except BaseException:
            self.unpin()
            raise

    def __releasebuffer__(self, Py_buffer *buffer):
        self.unpin()

    def __buffer__(self, int flags, /):
        """PEP 688: what the two above are called in Python (by itself since 3.12)."""
        return memoryview(self)

    cdef inline int pin(self, size_t offset, size_t size) except -1:
        """Keep it mapped until unpin(); [offset, offset + size) is inside."""
        if not kvmpy_pin(&self.pins):
            raise StateError("this memory is closed")
        if offset > self.length or size > self.length - offset:
            kvmpy_unpin(&self.pins)
            raise IndexError(f"[{offset:#_x}, {offset + size:#_x}) is outside memory of {self.length:#_x} bytes")
        return 0

    cdef inline int pin_for_write(self, size_t offset, size_t size) except -1:
        if self.read_only:
            raise TypeError("this memory is read-only")
        return self.pin(offset, size)

    cdef inline void unpin(self) noexcept:
        kvmpy_unpin(&self.pins)

    # -- access by offset

    def read(self, size_t offset, size_t size):
        """A copy of `size` bytes from `offset`."""
        self.pin(offset, size)
        try:
            out = PyBytes_FromStringAndSize(NULL, size)
            copy(PyBytes_AS_STRING(out), self.base + offset, size)
        finally:
            self.unpin()
        return out

    def readinto(self, size_t offset, buffer):
        """Copy from `offset` until `buffer` is full."""
        cdef Py_buffer target
        PyObject_GetBuffer(buffer, &target, PyBUF_WRITABLE)
        try:
            self.pin(offset, target.len)
            copy(target.buf, self.base + offset, target.len)
            self.unpin()
        finally:
            PyBuffer_Release(&target)

    def write(self, size_t offset, data):
        """Copy `data` (anything with a buffer) to `offset`."""
        cdef Py_buffer source
        PyObject_GetBuffer(data, &source, PyBUF_SIMPLE)
        try:
            self.pin_for_write(offset, source.len)
            copy(self.base + offset, source.buf, source.len)
            self.unpin()
        finally:
            PyBuffer_Release(&source)

    def fill(self, size_t offset, size_t size, unsigned char byte=0):
        """Set `size` bytes from `offset` to `byte`."""
        self.pin_for_write(offset, size)
        with nogil:
            memset(self.base + offset, byte, size)
        self.unpin()

    def load(self, size_t offset, size_t size):
        """The little-endian number of `size` (1 to 8) bytes at `offset`; one atomic load when naturally aligned."""
        if size - 1 > 7:
            raise ValueError(f"a number has 1 to 8 bytes, not {size}")
        self.pin(offset, size)
        cdef uint64_t value = kvmpy_load(self.base + offset, size)
        self.unpin()
        return value

    def store(self, size_t offset, size_t size, uint64_t value):
        """Store a number of `size` (1 to 8) bytes; one atomic store when naturally aligned."""
        if size - 1 > 7:
            raise ValueError(f"a number has 1 to 8 bytes, not {size}")
        if size < 8 and value >> (8 * size):
            raise OverflowError(f"{value:#_x} does not fit in {size} byte(s)")
        self.pin_for_write(offset, size)
        kvmpy_store(self.base + offset, size, value)
        self.unpin()

    def find(self, needle, size_t start, size_t end):
        """The offset of the first `needle` (a buffer, not empty) that lies wholly in [start, end), or -1."""
        cdef Py_buffer pattern
        cdef void *hit
        if start > end:
            return -1
        PyObject_GetBuffer(needle, &pattern, PyBUF_SIMPLE)
        try:
            self.pin(start, end - start)
            with nogil:
                hit = memmem(self.base + start, end - start, pattern.buf, pattern.len)
            self.unpin()
        finally:
            PyBuffer_Release(&pattern)
        return -1 if hit == NULL else <unsigned char *>hit - self.base

    # -- the kernel's view of it

    def advise(self, int advice, size_t offset=0, size=None):
        """madvise(2) on a page-aligned range (default: all of it). Raises OSError."""
        cdef size_t count = self.length - offset if size is None else size
        cdef int failed
        self.pin(offset, count)
        with nogil:
            failed = madvise(self.base + offset, count, advice)
        self.unpin()
        if failed:
            PyErr_SetFromErrno(OSError)

    def sync(self, size_t offset=0, size=None):
        """msync(2): wait until a page-aligned range has reached its file. Raises OSError."""
        cdef size_t count = self.length - offset if size is None else size
        cdef int failed
        self.pin(offset, count)
        with nogil:
            failed = msync(self.base + offset, count, MS_SYNC)
        self.unpin()
        if failed:
            PyErr_SetFromErrno(OSError)

    def detach(self, size_t offset, size_t size):
        """Put fresh zero pages over a page-aligned range: what was below is given back to the host.

        Only this mapping changes; a file below it keeps its bytes. Raises OSError.
        """
        self.pin_for_write(offset, size)
        cdef void *place = mmap(self.base + offset, size, PROT_READ | PROT_WRITE,
                                MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED, -1, 0)
        self.unpin()
        if place == MAP_FAILED:
            PyErr_SetFromErrno(OSError)


cdef void copy(void *target, const void *source, size_t size) noexcept:
    # memmove: both sides may be views of one memory.
    if size < LONG_COPY:
        memmove(target, source, size)
    else:
        with nogil:
            memmove(target, source, size)
