# SPDX-License-Identifier: Apache-2.0
from libc.stdint cimport uint16_t, uint32_t, uint64_t

from kvmpy.block._disk cimport disk, iovec

cdef extern from "virtio/queue.h" nogil:
    enum: VQ_MAX_SIZE, VQ_EVENT_IDX, VQ_INDIRECT, VQ_PACKED
    cdef struct vq_region:
        uint64_t gpa, size
        unsigned char *hva
        bint readonly
    cdef struct vq_memory:
        size_t count
        vq_region *regions
    cdef struct vq_range:
        uint64_t gpa, size
    cdef struct vq_chain:
        uint16_t head
        uint32_t reads, writes, room
        uint64_t read_size, write_size, written
        iovec *iov
        uint64_t *gpa
    cdef struct vq:
        uint16_t size
        bint event_idx, indirect, packed
        uint64_t desc_gpa, avail_gpa, used_gpa
        uint32_t in_flight_count
        const char *fault
        uint64_t fault_value
        uint32_t journal_count
        vq_range *journal
        uint64_t chains, interrupts, wait
        vq_chain scratch
    void vq_init(vq *)
    void vq_free(vq *)
    int vq_configure(vq *, const vq_memory *, uint32_t, uint64_t, uint64_t, uint64_t, unsigned)
    int vq_remap(vq *, const vq_memory *)
    void vq_disable(vq *)
    void vq_save(const vq *, uint16_t *, uint16_t *)
    int vq_restore(vq *, uint16_t, uint16_t)
    int vq_fault(vq *, const char *, uint64_t)
    int vq_pop(vq *, vq_chain *)
    void vq_unpop(vq *, uint16_t)
    bint vq_push(vq *, uint16_t, uint64_t)
    void vq_publish(vq *)
    bint vq_wants_interrupt(vq *)
    void vq_no_kicks(vq *)
    bint vq_want_kicks(vq *)
    size_t vq_read(const vq_chain *, uint64_t, void *, size_t)
    void vq_written(vq *, vq_chain *, uint64_t, uint64_t)
    int vq_slice(const iovec *, uint32_t, uint64_t, uint64_t, iovec *, int)
    size_t vq_write(vq *, vq_chain *, uint64_t, const void *, size_t)

cdef extern from "virtio/limit.h" nogil:
    cdef struct rate:
        uint64_t per_second, burst
    cdef struct rate_limit:
        rate bytes
        rate ops
        uint64_t throttled
    void limit_init(rate_limit *)
    void limit_set(rate_limit *, uint64_t, uint64_t, uint64_t, uint64_t)
    uint64_t limit_take(rate_limit *, uint64_t)

cdef extern from "virtio/serve.h" nogil:
    enum serve_result:
        SERVE_IDLE
        SERVE_MORE
        SERVE_BLOCKED
        SERVE_GONE
        SERVE_FAULT
        SERVE_LIMITED
    cdef struct blk_counts:
        uint64_t reads, read_bytes, writes, written_bytes, flushes, discards, zeroes, errors, unsupported
    cdef struct blk_server:
        disk *disk
        bint readonly, flush, discard, write_zeroes
        int writeback
        rate_limit *limit
        char *serial
        int last_error
        blk_counts counts
    serve_result blk_serve(vq *, blk_server *)
    enum: NET_HEADER
    cdef struct net_counts:
        uint64_t rx_frames, rx_bytes, rx_dropped, tx_frames, tx_bytes, tx_dropped, malformed
    cdef struct net_server:
        int fd
        bint vnet_header, mergeable, csum, tso4, tso6, ecn, ufo
        rate_limit *transmit_limit
        rate_limit *receive_limit
        int error
        size_t pending
        net_counts counts
    serve_result net_transmit(vq *, net_server *)
    serve_result net_receive(vq *, net_server *)
    serve_result rng_serve(vq *, uint64_t *)


cdef class Regions:
    cdef vq_memory table
    cdef readonly tuple regions  # of GuestMemory, to see whether it has changed
    cdef list holds


cdef class Queue:
    cdef vq q
    cdef Regions memory
    cdef object guest           # GuestMemory
    cdef uint64_t generation    # of the configuration; chains of an older one are void
    cdef int busy
    cdef readonly int index
    cdef readonly uint32_t max_size
    cdef int begin(self) except -1
    cdef int tell(self) except -1
    cdef bint logged(self)


cdef class Chain:
    cdef vq_chain chain
    cdef Queue queue
    cdef Regions memory
    cdef uint64_t generation
    cdef bint done
    cdef object transfer(self, int fd, uint64_t position, uint64_t offset, uint64_t size, bint out)
