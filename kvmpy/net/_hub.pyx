# SPDX-License-Identifier: Apache-2.0
"""A switch, or a relay of two ports (C, without the GIL); `Switch`, `StreamSocket` and `Pcap` are its faces."""
import os

from kvmpy.errors import StateError

from libc.errno cimport errno
from libc.stdint cimport uint8_t, uint32_t, uint64_t

cdef extern from "net/hub.h" nogil:
    enum: PORTS, MAX_FRAME
    cdef enum port_kind:
        PORT_VNET, PORT_PLAIN, PORT_STREAM
    cdef struct port_counts:
        uint64_t rx_frames, rx_bytes, rx_malformed, rx_spoofed, tx_frames, tx_bytes, tx_dropped, flood_dropped
    cdef struct capture:
        int error
        uint64_t frames, lost
    cdef struct hub:
        int news
        capture capture
    hub *hub_new(bint relay, uint32_t flood_rate)
    void hub_free(hub *)
    void hub_run(hub *)
    void hub_stop(hub *)
    int hub_add(hub *, port_kind, int, unsigned, const uint8_t *)
    int hub_plug(hub *, int, int)
    void hub_unplug(hub *, int)
    void hub_remove(hub *, int)
    void hub_takes(hub *, int, unsigned)
    int hub_capture(hub *, int, uint32_t)
    bint hub_state(hub *, int, port_counts *, int *)

VNET, PLAIN, STREAM = PORT_VNET, PORT_PLAIN, PORT_STREAM
LARGEST = MAX_FRAME


cdef int check(int error) except -1:
    if error:
        raise OSError(error, os.strerror(error))
    return 0


cdef class Hub:
    """relay: two ports, what comes in at one goes out at the other. flood_rate: broadcasts per second and port.

    Descriptors of ports are non-blocking and stay the caller's; the hub has duplicates of them.
    """

    cdef hub *h

    def __init__(self, *, bint relay=False, uint32_t flood_rate=10000):
        if self.h != NULL:
            raise StateError("this hub exists already")
        self.h = hub_new(relay, flood_rate)
        if self.h == NULL:
            raise OSError(errno, os.strerror(errno))

    cdef hub *get(self) except NULL:
        if self.h == NULL:
            raise StateError("the network is closed")
        return self.h

    cdef hub *at(self, int port) except NULL:
        if not 0 <= port < PORTS:
            raise ValueError(f"no port {port}")
        return self.get()

    def run(self):
        """Serve until `stop()`; without the GIL."""
        cdef hub *h = self.get()
        with nogil:
            hub_run(h)

    def stop(self):
        """Make `run` return; from any thread."""
        if self.h != NULL:
            hub_stop(self.h)

    def close(self):
        """Release everything; only when `run` has returned."""
        cdef hub *h = self.h
        self.h = NULL
        if h != NULL:
            with nogil:
                hub_free(h)

    def __dealloc__(self):
        if self.h != NULL:
            hub_free(self.h)

    @property
    def news(self):
        """An eventfd that is readable when a port was unplugged."""
        return self.get().news

    def add(self, int kind, int fd=-1, unsigned takes=0, bytes mac=None):
        """A new port of kind VNET, PLAIN or STREAM; its number. mac: the only sender behind it. Raises OSError."""
        cdef hub *h = self.get()
        cdef const uint8_t *address = NULL
        cdef int number
        if mac is not None:
            if len(mac) != 6:
                raise ValueError("a MAC address has 6 bytes")
            address = mac
        with nogil:
            number = hub_add(h, <port_kind>kind, fd, takes, address)
        if number < 0:
            check(-number)
        return number

    def plug(self, int port, int fd):
        """Connect a port that is unplugged. Raises OSError."""
        cdef hub *h = self.at(port)
        cdef int error
        with nogil:
            error = hub_plug(h, port, fd)
        check(error)

    def unplug(self, int port):
        """Disconnect a port."""
        cdef hub *h = self.at(port)
        with nogil:
            hub_unplug(h, port)

    def remove(self, int port):
        """Disconnect a port and give its number back."""
        cdef hub *h = self.at(port)
        with nogil:
            hub_remove(h, port)

    def takes(self, int port, unsigned offloads):
        """The TUN_F_* that the receiver behind a port takes from now on."""
        cdef hub *h = self.at(port)
        with nogil:
            hub_takes(h, port, offloads)

    def capture(self, int fd, uint32_t snaplen):
        """Write a pcap file to `fd`, which stays the caller's, at most `snaplen` bytes of a frame. Raises OSError."""
        cdef hub *h = self.get()
        cdef int error
        if not 14 <= snaplen <= MAX_FRAME:
            raise ValueError(f"at least 14 and at most {MAX_FRAME} bytes of a frame are captured, not {snaplen}")
        with nogil:
            error = hub_capture(h, fd, snaplen)
        check(error)

    @property
    def captured(self):
        """(frames written, frames lost, errno that ended it or 0)."""
        cdef hub *h = self.get()
        return h.capture.frames, h.capture.lost, h.capture.error

    def state(self, int port):
        """(is it plugged in, the errno that unplugged it or 0, counters by name)."""
        cdef hub *h = self.at(port)
        cdef port_counts counts
        cdef int error
        cdef bint plugged
        with nogil:
            plugged = hub_state(h, port, &counts, &error)
        return plugged, error, dict(counts)
