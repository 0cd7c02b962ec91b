# SPDX-License-Identifier: Apache-2.0
# cython: auto_pickle=False, autotestdict=False
"""Virtqueues as Python objects over queue.c, and the devices whose data path is C (serve_*.c).

One thread at a time works on a `Queue`: the worker of its device while that runs, else whoever stopped it. The ring
walk and the C devices run without the GIL.
"""

import logging

from kvmpy.errors import GuestMemoryError, StateError

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from cpython.buffer cimport PyBUF_SIMPLE, PyBuffer_Release, PyObject_GetBuffer
from libc.stdlib cimport calloc, free
from libc.stdint cimport int64_t, uintptr_t
from libc.errno cimport EINTR, EINVAL, errno
from libc.string cimport memcpy, memset, strerror

from kvmpy.block._disk cimport CoreDisk
from kvmpy.block._python import as_core

cdef extern from "<sys/uio.h>" nogil:
    ssize_t preadv(int, const iovec *, int, int64_t)
    ssize_t pwritev(int, const iovec *, int, int64_t)

cdef enum:
    IOV_MOST = 1024  # IOV_MAX of Linux

log = logging.getLogger("kvmpy.virtio")

IDLE, MORE, BLOCKED, GONE, FAULT = SERVE_IDLE, SERVE_MORE, SERVE_BLOCKED, SERVE_GONE, SERVE_FAULT
LIMITED = SERVE_LIMITED
MAX_READ = 1 << 20  # what Chain.read takes at once: a chain may have 4 GiB


cdef class Regions:
    """Guest memory at one moment, for C. It holds views, so nothing is unmapped while it lives."""

    def __cinit__(self, tuple regions):
        cdef size_t i
        self.holds = []
        self.regions = regions
        self.table.regions = <vq_region *>calloc(len(regions) + 1, sizeof(vq_region))
        if self.table.regions == NULL:
            raise MemoryError
        for i in range(len(regions)):
            region = regions[i]
            self.holds.append(memoryview(region.ram))
            self.table.regions[i].gpa = region.gpa
            self.table.regions[i].size = region.size
            self.table.regions[i].hva = <unsigned char *><uintptr_t>region.address
            self.table.regions[i].readonly = region.readonly
        self.table.count = len(regions)

    def __dealloc__(self):
        free(self.table.regions)


cdef class Queue:
    """The device's side of one virtqueue (virtio 1.2, 2.7 and 2.8).

    index: its number in the device. max_size: entries, a power of two up to 32768.
    """

    def __cinit__(self, int index, uint32_t max_size):
        vq_init(&self.q)
        if not 1 <= max_size <= VQ_MAX_SIZE or max_size & (max_size - 1):
            raise ValueError(f"a queue has a power of two of entries up to {VQ_MAX_SIZE}, not {max_size}")
        self.index = index
        self.max_size = max_size

    def __dealloc__(self):
        vq_free(&self.q)

    # -- configuration, by the transport

    def configure(self, guest, uint32_t size, uint64_t desc, uint64_t avail, uint64_t used, *,
                  bint event_idx=False, bint indirect=False, bint packed=False):
        """Take rings at guest addresses `desc`, `avail`, `used` into use; False (see `fault`) when they cannot be.

        guest: the GuestMemory. size: entries. event_idx, indirect, packed: the negotiated features. Packed: `desc` is
        the ring, `avail` and `used` the driver's and the device's event suppression (2.8.10).
        """
        self.disable()
        if size > self.max_size:
            vq_fault(&self.q, b"the queue size is larger than QueueSizeMax", size)
            return False
        cdef Regions memory = Regions(guest.regions)
        cdef unsigned flags = event_idx * VQ_EVENT_IDX | indirect * VQ_INDIRECT | packed * VQ_PACKED
        cdef int result = vq_configure(&self.q, &memory.table, size, desc, avail, used, flags)
        if result == -12:  # ENOMEM
            raise MemoryError
        self.guest, self.memory = guest, memory
        return result == 0

    def disable(self):
        """Forget the rings and every request that was taken from them."""
        if self.busy:
            raise StateError(f"queue {self.index} is being served")
        vq_disable(&self.q)
        self.generation += 1
        self.guest = self.memory = None

    def refresh(self):
        """Look at guest memory anew if regions were added or removed; False when the rings are gone."""
        if self.q.size == 0 or self.guest.regions is self.memory.regions:
            return self.q.fault == NULL
        cdef Regions memory = Regions(self.guest.regions)
        cdef int result = vq_remap(&self.q, &memory.table)
        self.memory = memory
        return result == 0

    @property
    def ready(self):
        """Is it in use?"""
        return self.q.size != 0 and self.q.fault == NULL

    @property
    def size(self):
        """Entries; 0 when it is not in use."""
        return self.q.size

    @property
    def fault(self):
        """What the driver did wrong, or None."""
        if self.q.fault == NULL:
            return None
        return f"{self.q.fault.decode()}: {self.q.fault_value:#x}"

    def fail(self, str reason, uint64_t value=0):
        """The driver broke the device's protocol: the queue gives nothing more. reason: one of a few texts."""
        cdef bytes text = _keep(reason)
        vq_fault(&self.q, <const char *>text, value)

    @property
    def in_flight(self):
        """Requests taken and not given back."""
        return self.q.in_flight_count

    @property
    def stats(self):
        """(requests taken, interrupts asked for) since it was made."""
        return self.q.chains, self.q.interrupts

    @property
    def wait(self):
        """Seconds until the rate limit lets the next request through, when `serve` said LIMITED."""
        return self.q.wait / 1e9

    def save(self):
        """Where the device is in the rings, 16 bits each: next entry to take, next to give. Nothing may be staged.

        Packed: indices with the wrap counter in bit 15.
        """
        cdef uint16_t next_avail, next_used
        vq_save(&self.q, &next_avail, &next_used)
        return next_avail, next_used

    def restore(self, uint16_t next_avail, uint16_t next_used):
        """Go on where `save` was. Raises ValueError for places that the ring does not have."""
        if vq_restore(&self.q, next_avail, next_used):
            raise ValueError(f"queue {self.index} of {self.size} entries cannot be at {next_avail:#x}, {next_used:#x}")

    # -- requests

    cdef int begin(self) except -1:
        if self.q.size != 0 and self.guest.regions is not self.memory.regions:
            self.refresh()
        return 0

    def pop(self):
        """The next request, a Chain, or None: there is none, or the driver broke the rules (`fault`)."""
        self.begin()
        cdef int got
        with nogil:
            got = vq_pop(&self.q, &self.q.scratch)
        if got <= 0:
            return None
        try:
            return Chain(self)
        except MemoryError:
            vq_unpop(&self.q, self.q.scratch.head)
            raise

    def unpop(self, Chain chain not None):
        """Give back the request that was taken last: it comes again."""
        if chain.queue is self and chain.generation == self.generation and not chain.done:
            chain.done = True
            vq_unpop(&self.q, chain.chain.head)

    def push(self, Chain chain not None):
        """The request is done: its used element says what `chain.write` wrote. A void or repeated one is ignored."""
        if chain.queue is not self:
            raise ValueError(f"this request is not one of queue {self.index}")
        if chain.generation == self.generation and not chain.done:
            chain.done = True
            vq_push(&self.q, chain.chain.head, chain.chain.written)

    def complete(self):
        """Show the driver what was pushed; does it want an interrupt?"""
        if self.guest is None:
            return False
        # The software CPU must forget translated code before the driver learns of new bytes; dirty marks must come
        # after the last write, and logging may begin at any moment: so the marks are looked at last.
        if self.guest.watcher is not None:
            self.tell()
        vq_publish(&self.q)
        self.tell()
        return vq_wants_interrupt(&self.q)

    cdef bint logged(self):
        """Are dirty pages of any region logged?"""
        for region in self.memory.regions:
            if region.log_dirty:
                return True
        return False

    cdef int tell(self) except -1:
        """Tell guest memory of the ranges that were written."""
        cdef uint32_t i
        cdef uint64_t low, high
        if self.q.journal_count and not self.logged():
            tell = self.guest.watcher  # each range lies in one region, or was joined over neighbours: the engine takes both
            if tell is not None:
                for i in range(self.q.journal_count):
                    tell(self.q.journal[i].gpa, self.q.journal[i].size)
        elif self.q.journal_count:
            for i in range(self.q.journal_count):
                try:
                    self.guest.wrote(self.q.journal[i].gpa, self.q.journal[i].size)
                except GuestMemoryError:
                    # A joined range goes over a hole, or a region was removed: tell of the parts that are there.
                    for region in self.guest.regions:
                        low = max(self.q.journal[i].gpa, region.gpa)
                        high = min(self.q.journal[i].gpa + self.q.journal[i].size, region.end)
                        if low < high and not region.readonly:
                            self.guest.wrote(low, high - low)
        self.q.journal_count = 0
        return 0

    def no_kicks(self):
        """Ask the driver not to kick (2.7.10); a hint."""
        vq_no_kicks(&self.q)

    def want_kicks(self):
        """Ask for kicks again; True when requests came meanwhile."""
        if self.guest is None:
            return False
        self.begin()
        cdef bint more = vq_want_kicks(&self.q)
        self.tell()
        return more

    def serve_rng(self):
        """Fill buffers with entropy; (result, bytes)."""
        cdef serve_result result
        cdef uint64_t count = 0
        self.begin()
        self.busy += 1
        with nogil:
            result = rng_serve(&self.q, &count)
        self.busy -= 1
        return <int>result, count


cdef dict _texts = {}


cdef bytes _keep(str reason):
    # Faults are pointers to static text; those that Python gives are kept for ever, so there may be only a few.
    text = _texts.get(reason)
    if text is None:
        if len(_texts) >= 256:
            return _texts.setdefault("a broken request", b"a broken request")
        text = _texts.setdefault(reason, reason.encode())
    return text


cdef class Chain:
    """A request: a readable part and a writable part, checked and bounded, seen as two runs of bytes.

    What lies in them may change at any moment: read once, check the copy.
    """

    def __cinit__(self, Queue queue):
        cdef vq_chain *found = &queue.q.scratch
        cdef size_t count = found.reads + found.writes
        self.queue = queue
        self.memory = queue.memory
        self.generation = queue.generation
        self.chain = found[0]
        self.chain.iov = <iovec *>calloc(count + 1, sizeof(iovec))
        self.chain.gpa = <uint64_t *>calloc(count + 1, sizeof(uint64_t))
        if self.chain.iov == NULL or self.chain.gpa == NULL:
            raise MemoryError
        memcpy(self.chain.iov, found.iov, count * sizeof(iovec))
        memcpy(self.chain.gpa, found.gpa, count * sizeof(uint64_t))

    def __dealloc__(self):
        free(self.chain.iov)
        free(self.chain.gpa)

    @property
    def head(self):
        """The index of its first descriptor."""
        return self.chain.head

    @property
    def readable(self):
        """Bytes that the device may read."""
        return self.chain.read_size

    @property
    def writable(self):
        """Bytes that the device may write."""
        return self.chain.write_size

    @property
    def written(self):
        """Bytes from the start of the writable part that were written: the length that the driver is told."""
        return self.chain.written

    def ranges(self):
        """[(guest address, size), ...] of the writable part."""
        return [(self.chain.gpa[i], self.chain.iov[i].iov_len)
                for i in range(self.chain.reads, self.chain.reads + self.chain.writes)]

    def read(self, uint64_t offset=0, size=None):
        """A copy of the readable part from `offset`, at most `size` bytes and at most 1 MiB."""
        cdef uint64_t left = self.chain.read_size - offset if offset < self.chain.read_size else 0
        cdef size_t count = min(left, MAX_READ if size is None else min(size, MAX_READ))
        data = PyBytes_FromStringAndSize(NULL, count)
        vq_read(&self.chain, offset, PyBytes_AS_STRING(data), count)
        return data

    def write(self, data, uint64_t offset=0):
        """Copy `data` to `offset` of the writable part; returns how many bytes fitted."""
        cdef Py_buffer source
        cdef size_t count
        if self.generation != self.queue.generation or self.done:
            return 0
        PyObject_GetBuffer(data, &source, PyBUF_SIMPLE)
        count = vq_write(&self.queue.q, &self.chain, offset, source.buf, source.len)
        PyBuffer_Release(&source)
        return count

    def read_file(self, int fd, uint64_t position, uint64_t offset, uint64_t size):
        """Fill bytes [offset, offset + size) of the writable part from a file's `position`; how many: less at its end.

        Raises OSError. preadv(2), without the GIL and without a copy.
        """
        return self.transfer(fd, position, offset, size, False)

    def write_file(self, int fd, uint64_t position, uint64_t offset, uint64_t size):
        """Write bytes [offset, offset + size) of the readable part to a file's `position`; how many. Raises OSError."""
        return self.transfer(fd, position, offset, size, True)

    cdef object transfer(self, int fd, uint64_t position, uint64_t offset, uint64_t size, bint out):
        cdef iovec pieces[IOV_MOST]
        cdef uint64_t room = self.chain.read_size if out else self.chain.write_size, done = 0
        cdef uint32_t skip = 0 if out else self.chain.reads
        cdef uint32_t count = self.chain.reads if out else self.chain.writes
        cdef int n, error = 0
        cdef ssize_t moved
        if self.generation != self.queue.generation or self.done:
            return 0
        if offset > room or size > room - offset:
            raise ValueError(f"bytes [{offset:#x}, {offset + size:#x}) of a part of {room:#x} bytes")
        self.queue.busy += 1
        with nogil:
            while done < size:
                n = vq_slice(self.chain.iov + skip, count, offset + done, size - done, pieces, IOV_MOST)
                if n < 0:
                    error = EINVAL
                    break
                moved = pwritev(fd, pieces, n, position + done) if out else preadv(fd, pieces, n, position + done)
                if moved < 0 and errno == EINTR:
                    continue
                if moved <= 0:
                    error = errno if moved < 0 else 0
                    break
                done += moved
            if not out:
                vq_written(&self.queue.q, &self.chain, offset, done)
        self.queue.busy -= 1
        if error and not done:
            raise OSError(error, strerror(error).decode())
        return done

    def __repr__(self):
        return f"<Chain {self.head}: {self.readable} readable, {self.writable} writable bytes>"


cdef class Limiter:
    """A rate limit (limit.h) that the queues of a device share; without rates it limits nothing."""

    cdef rate_limit limit

    def __cinit__(self):
        limit_init(&self.limit)

    def set(self, uint64_t bytes=0, uint64_t byte_burst=0, uint64_t ops=0, uint64_t op_burst=0):
        """Rates per second (0: none) and bursts (0: what a tenth of a second allows); from any thread."""
        limit_set(&self.limit, bytes, byte_burst, ops, op_burst)

    def take(self, uint64_t bytes):
        """May a request of so many bytes begin now? Seconds until it may; 0: it may, and is counted."""
        return limit_take(&self.limit, bytes) / 1e9

    @property
    def throttled(self):
        """Requests that had to wait."""
        return self.limit.throttled


cdef class BlkServer:
    """The data path of a block device (5.2.6) over a disk of `kvmpy.block`; keeps the disk from being closed."""

    cdef blk_server server
    cdef CoreDisk core
    cdef readonly object disk
    cdef readonly Limiter limiter

    def __init__(self, disk, bytes serial=b""):
        """disk: a kvmpy.block Disk. serial: at most 20 bytes."""
        if len(serial) > 20:
            raise ValueError(f"a serial number has at most 20 bytes, not {len(serial)}")
        if self.core is not None:
            raise StateError("already in use")
        memset(&self.server, 0, sizeof(self.server))
        memcpy(self.server.serial, <const char *>serial, len(serial))
        core = as_core(disk)
        self.disk = disk
        size = disk.size  # raises when it is closed
        self.core = core
        self.core.acquire()
        self.server.disk = self.core.ptr
        self.limiter = Limiter()
        self.server.limit = &self.limiter.limit

    def close(self):
        """Let go of the disk."""
        if self.core is not None:
            self.server.disk = NULL
            self.core.release()
            self.core = None

    def __dealloc__(self):
        if self.core is not None:
            self.core.release()

    def negotiated(self, *, bint readonly, bint flush, bint discard, bint write_zeroes, bint writeback):
        """What the driver accepted."""
        self.server.readonly, self.server.flush = readonly, flush
        self.server.discard, self.server.write_zeroes = discard, write_zeroes
        self.server.writeback = writeback

    @property
    def writeback(self):
        """False: every write is on disk before it completes (5.2.6.2)."""
        return bool(self.server.writeback)

    @writeback.setter
    def writeback(self, bint value):
        self.server.writeback = value

    def take_error(self):
        """The errno of the last request that failed on the host since the last call, or 0."""
        cdef int error = self.server.last_error
        self.server.last_error = 0
        return error

    @property
    def counts(self):
        """Counters by name."""
        return dict(self.server.counts)

    def serve(self, Queue queue not None):
        """Work off a batch; one of IDLE, MORE, FAULT, LIMITED."""
        cdef serve_result result
        if self.core is None:
            raise StateError("the disk was let go")
        queue.begin()
        queue.busy += 1
        with nogil:
            result = blk_serve(&queue.q, &self.server)
        queue.busy -= 1
        return <int>result


cdef class NetServer:
    """The data path of a network device (5.1.6) over a descriptor with one frame per read and write."""

    cdef net_server server
    cdef Limiter to_guest, from_guest

    def __init__(self, int fd, *, bint vnet_header=False, Limiter receive=None, Limiter transmit=None):
        """fd: non-blocking, stays the caller's. vnet_header: frames on it carry struct virtio_net_hdr (12 bytes).

        receive, transmit: limits for the two directions.
        """
        memset(&self.server, 0, sizeof(self.server))
        self.to_guest, self.from_guest = receive, transmit
        if receive is not None:
            self.server.receive_limit = &receive.limit
        if transmit is not None:
            self.server.transmit_limit = &transmit.limit
        self.server.fd = fd
        self.server.vnet_header = vnet_header

    def negotiated(self, *, bint mergeable, bint csum, bint tso4, bint tso6, bint ecn, bint ufo):
        """What the driver accepted: of receive buffers, and what its own packets may ask for."""
        self.server.mergeable, self.server.csum = mergeable, csum
        self.server.tso4, self.server.tso6, self.server.ecn, self.server.ufo = tso4, tso6, ecn, ufo
        self.server.pending = 0

    @property
    def pending(self):
        """Is there a received frame that waits for buffers?"""
        return self.server.pending != 0

    @property
    def error(self):
        """Why the back end ended, an errno; 0 for end of file."""
        return self.server.error

    @property
    def counts(self):
        """Counters by name."""
        return dict(self.server.counts)

    def transmit(self, Queue queue not None):
        """Send a batch of the driver's packets; IDLE, MORE, BLOCKED, LIMITED, GONE or FAULT."""
        cdef serve_result result
        queue.begin()
        queue.busy += 1
        with nogil:
            result = net_transmit(&queue.q, &self.server)
        queue.busy -= 1
        return <int>result

    def receive(self, Queue queue not None):
        """Give a batch of received packets to the driver; IDLE: it has no buffers, BLOCKED: no packets."""
        cdef serve_result result
        queue.begin()
        queue.busy += 1
        with nogil:
            result = net_receive(&queue.q, &self.server)
        queue.busy -= 1
        return <int>result
