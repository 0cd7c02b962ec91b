# SPDX-License-Identifier: Apache-2.0
"""The user-mode network's gateway (C, without the GIL) as an object: `kvmpy.net.UserNet` is its face."""
import os
import socket

from kvmpy.errors import StateError

from libc.errno cimport errno
from libc.stdint cimport int16_t, uint8_t, uint16_t, uint32_t, uint64_t
from libc.string cimport memcpy, memset

cdef extern from "net/user/user.h" nogil:
    enum: RULES, NAME, RESOLVERS
    cdef struct addr:
        uint8_t b[16]
    cdef struct endpoint:
        addr ip
        uint16_t port
    cdef struct rule:
        uint8_t verdict, protocols
        addr net
        uint8_t bits
        uint16_t low, high
        char name[256]
    cdef struct decision:
        uint64_t time
        uint8_t verdict, protocol, reason, inbound
        int16_t rule
        endpoint guest, far
        char name[256]
    cdef struct target:
        int family
        unsigned size
    cdef struct forward:
        uint8_t protocol
        endpoint at
        target to
    cdef struct counts:
        uint64_t frames_in, bytes_in, frames_out, bytes_out, malformed, ignored, blocked, dropped
        uint64_t tcp_opened, tcp_refused, tcp_retransmitted, tcp_out_of_order, udp_opened, udp_evicted, icmp_opened
        uint64_t dns_queries, dns_refused, allowed, denied, unlogged, no_descriptors, no_buffers
    cdef struct config:
        addr network, gateway, dns, first
        uint8_t bits
        uint8_t mac[6]
        uint16_t mtu
        uint32_t max_tcp, max_udp, max_icmp, max_rings
        bint loopback
        uint8_t default_verdict
        bint filter_names
        char domain[256]
        char hostname[64]
        bint six
        addr prefix6, gateway6, dns6
    cdef struct stack:
        int news
        unsigned takes
    stack *stack_new(const config *, int)
    void stack_free(stack *)
    void stack_run(stack *)
    void stack_stop(stack *)
    int stack_listen(stack *, int, uint8_t, const endpoint *)
    int stack_unlisten(stack *, int)
    int stack_forward(stack *, const forward *)
    int stack_set_rules(stack *, const rule *, int, uint8_t, bint)
    int stack_pin(stack *, int, const addr *)
    int stack_set_resolvers(stack *, const target *, int)
    int stack_decisions(stack *, decision *, int)
    void stack_counts(stack *, counts *, uint32_t *)
    target target_of(const endpoint *)

cdef extern from * nogil:
    """
    #define KVMPY_STORE(p, v) __atomic_store_n((p), (v), __ATOMIC_RELAXED)
    static int local_target(struct target *t, const char *path, size_t size)
    {
        memset(t, 0, sizeof(*t));
        if (size >= sizeof(t->local.sun_path))
            return 0;
        t->family = t->local.sun_family = AF_UNIX;
        memcpy(t->local.sun_path, path, size);
        t->size = sizeof(t->local);
        return 1;
    }
    """
    void KVMPY_STORE(unsigned *, unsigned)
    int local_target(target *, const char *, size_t)


cdef addr to_addr(ip):
    """An address of `ipaddress`."""
    cdef addr a
    packed = ip.packed if ip.version == 6 else bytes(10) + b"\xff\xff" + ip.packed
    memcpy(a.b, <const char *>packed, 16)
    return a


cdef from_addr(const addr *a):
    raw = (<const char *>a.b)[:16]
    if raw[:12] == bytes(10) + b"\xff\xff":
        return socket.inet_ntop(socket.AF_INET, raw[12:])
    return socket.inet_ntop(socket.AF_INET6, raw)


cdef endpoint to_endpoint(where):
    cdef endpoint e
    e.ip = to_addr(where[0])
    e.port = where[1]
    return e


cdef int check(int error) except -1:
    if error:
        raise OSError(error, os.strerror(error))
    return 0


cdef class UserStack:
    """A gateway on `port`, a descriptor of frames with the virtio header, which stays the caller's.

    Addresses are those of `ipaddress`, endpoints pairs of an address and a port. Raises OSError.
    """

    cdef stack *s
    cdef object running

    def __init__(self, int port, *, network, gateway, dns, first, bytes mac not None, int mtu, prefix6, gateway6, dns6,
                 bint ipv6, bint host_loopback, int max_tcp, int max_udp, int max_icmp, int max_buffers,
                 str domain not None, str hostname not None):
        cdef config c
        if self.s != NULL:
            raise StateError("this network exists already")
        memset(&c, 0, sizeof(c))
        c.network, c.bits = to_addr(network.network_address), network.prefixlen
        c.gateway, c.dns, c.first = to_addr(gateway), to_addr(dns), to_addr(first)
        c.prefix6, c.gateway6, c.dns6 = to_addr(prefix6.network_address), to_addr(gateway6), to_addr(dns6)
        c.six = ipv6
        memcpy(c.mac, <const char *>mac, 6)
        c.mtu = mtu
        c.max_tcp, c.max_udp, c.max_icmp, c.max_rings = max_tcp, max_udp, max_icmp, max_buffers
        c.loopback = host_loopback
        c.default_verdict = 1
        name, host = domain.encode("ascii"), hostname.encode("ascii")
        if len(name) > 254 or len(host) > 63:
            raise ValueError("a domain has at most 254 characters, a host name 63")
        memcpy(c.domain, <const char *>name, len(name))
        memcpy(c.hostname, <const char *>host, len(host))
        with nogil:
            self.s = stack_new(&c, port)
        if self.s == NULL:
            raise OSError(errno, os.strerror(errno))

    cdef stack *get(self) except NULL:
        if self.s == NULL:
            raise StateError("the network is closed")
        return self.s

    def run(self):
        """Serve until `stop()`; without the GIL."""
        cdef stack *s = self.get()
        with nogil:
            stack_run(s)

    def stop(self):
        """Make `run` return; from any thread."""
        if self.s != NULL:
            stack_stop(self.s)

    def close(self):
        """Release everything; only when `run` has returned."""
        cdef stack *s = self.s
        self.s = NULL
        if s != NULL:
            with nogil:
                stack_free(s)

    def __dealloc__(self):
        if self.s != NULL:
            stack_free(self.s)

    @property
    def news(self):
        """An eventfd that is readable when there are decisions."""
        return self.get().news

    def takes(self, unsigned offloads):
        """The TUN_F_* that the guest takes from now on."""
        KVMPY_STORE(&self.get().takes, offloads)

    def listen(self, int fd, int protocol, guest):
        """Connections (or datagrams) to the socket `fd` go to the endpoint `guest`; the descriptor is taken over."""
        cdef endpoint e = to_endpoint(guest)
        cdef stack *s = self.get()
        cdef int error
        with nogil:
            error = stack_listen(s, fd, protocol, &e)
        check(error)

    def unlisten(self, int fd):
        """Close a socket given to `listen`."""
        cdef stack *s = self.get()
        cdef int error
        with nogil:
            error = stack_unlisten(s, fd)
        check(error)

    def forward(self, int protocol, at, to):
        """The guest's connections to endpoint `at` go to `to`: an endpoint, or bytes, the path of a Unix socket."""
        cdef forward f
        cdef endpoint e
        memset(&f, 0, sizeof(f))
        f.protocol, f.at = protocol, to_endpoint(at)
        if isinstance(to, bytes):
            if not local_target(&f.to, <const char *>to, len(to)):
                raise ValueError(f"the path of a Unix socket has at most 107 bytes: {os.fsdecode(to)}")
        else:
            e = to_endpoint(to)
            f.to = target_of(&e)
        check(stack_forward(self.get(), &f))

    def set_rules(self, rules, bint allow, bint filter_names):
        """rules: (allow, protocols, network or None, name or None, low, high); then what holds when none fits."""
        cdef rule r[RULES]
        cdef int i
        if len(rules) > RULES:
            raise ValueError(f"a policy has at most {RULES} rules")
        memset(r, 0, sizeof(r))
        for i, (verdict, protocols, network, name, low, high) in enumerate(rules):
            r[i].verdict, r[i].protocols, r[i].low, r[i].high = verdict, protocols, low, high
            if name is not None:
                text = name.encode("ascii")
                if not 1 <= len(text) <= 254:
                    raise ValueError(f"a host name has 1 to 254 characters: {name!r}")
                memcpy(r[i].name, <const char *>text, len(text))
            else:
                r[i].net = to_addr(network.network_address)
                r[i].bits = network.prefixlen + (96 if network.version == 4 else 0)
        check(stack_set_rules(self.get(), r, len(rules), allow, filter_names))

    def pin(self, int rule, ip):
        """The name of rule number `rule` has this address."""
        cdef addr a = to_addr(ip)
        check(stack_pin(self.get(), rule, &a))

    def set_resolvers(self, servers):
        """The DNS servers to ask, endpoints; the first three are taken."""
        cdef target t[RESOLVERS]
        cdef endpoint e
        cdef int count = 0
        for where in servers[:RESOLVERS]:
            e = to_endpoint(where)
            t[count] = target_of(&e)
            count += 1
        check(stack_set_resolvers(self.get(), t, count))

    def decisions(self):
        """What was decided since the last call: (time, allowed, protocol, reason, inbound, rule, guest, far, name)."""
        cdef decision d[32]
        cdef int count, i
        found = []
        while True:
            count = stack_decisions(self.get(), d, 32)
            for i in range(count):
                found.append((
                    d[i].time / 1e9, bool(d[i].verdict), d[i].protocol, d[i].reason, bool(d[i].inbound), d[i].rule,
                    (from_addr(&d[i].guest.ip), d[i].guest.port), (from_addr(&d[i].far.ip), d[i].far.port),
                    (<bytes>d[i].name).decode("ascii", "replace"),
                ))
            if count < 32:
                return found

    @property
    def counts(self):
        """Counters by name."""
        cdef counts c
        cdef uint32_t flows[3]
        cdef stack *s = self.get()
        with nogil:
            stack_counts(s, &c, flows)
        return {**c, "tcp_flows": flows[0], "udp_flows": flows[1], "icmp_flows": flows[2]}
