/* SPDX-License-Identifier: Apache-2.0
 *
 * User-mode network: a gateway made of one thread and ordinary sockets. Frames of the guest come and go on `port`;
 * the far ends of its connections are sockets of the host. docs/networks.md tells the whole; here the structures.
 *
 * Everything runs in the thread of stack_run, under `lock`, which other threads take to change the configuration.
 * Objects that die while events are handed out are freed only after the last of them: stack_reap.
 */
#ifndef KVMPY_NET_USER_H
#define KVMPY_NET_USER_H

#include "../wire.h"

#include <netinet/in.h>
#include <pthread.h>
#include <sys/epoll.h>
#include <sys/un.h>

#define NS 1000000000ull
#define MS 1000000ull

/* Bounds. What a guest can make us hold is their sum; see docs/threats.md. */
#define HASH 4096          /* buckets of flows, a power of two */
#define NEIGHBOURS 64      /* guests on one network */
#define RULES 256
#define PINS 1024          /* addresses that names resolved to */
#define FORWARDS 64        /* addresses on the network that lead to sockets of the host */
#define RESOLVERS 3
#define REASSEMBLIES 8     /* datagrams whose fragments are being collected */
#define RING (1u << 19)    /* bytes of a TCP buffer, a power of two */
#define SCALE 4            /* our TCP window scale: 64 KiB << 4 covers RING */
#define RANGES 16          /* pieces of a TCP stream behind holes */
#define BLOCKS 4           /* of them in one segment */
#define DECISIONS 1024     /* log entries that wait to be read */
#define NAME 256           /* of a host, with its end */
#define BATCH 64           /* frames, before others get their turn */

struct stack;
struct flow;

struct addr { /* IPv6, or IPv4 as ::ffff:a.b.c.d */
    uint8_t b[16];
};

struct endpoint {
    struct addr ip;
    uint16_t port; /* or the identifier of echo requests */
};

struct source { /* something in epoll */
    int fd;
    void (*ready)(struct stack *, struct source *, uint32_t events);
};

struct timer {
    uint64_t due;
    int at; /* place in the heap; -1: not set */
    void (*fire)(struct stack *, struct timer *);
};

/* -- policy.c: what a guest may reach */

enum { ALLOW = 1, DENY = 0 };
enum reason { BY_DEFAULT, BY_RULE, BY_FORWARD, BY_KIND, BY_LIMIT, BY_HOST };

struct rule {
    uint8_t verdict, protocols; /* 1 tcp, 2 udp, 4 icmp */
    struct addr net;
    uint8_t bits; /* of the prefix, of 128 */
    uint16_t low, high;
    char name[NAME]; /* instead of a net: a host, or ".domain" for everything below it; lower case */
};

struct pin { /* an address that a name of a rule resolved to */
    struct addr ip;
    uint16_t rule;
    uint64_t until; /* 0: for ever */
};

struct decision {
    uint64_t time; /* CLOCK_REALTIME, ns */
    uint8_t verdict, protocol, reason, inbound;
    int16_t rule;
    struct endpoint guest, far;
    char name[NAME]; /* asked of the DNS */
};

struct target { /* where a socket is to be connected to */
    int family;
    socklen_t size;
    union {
        struct sockaddr any;
        struct sockaddr_in in4;
        struct sockaddr_in6 in6;
        struct sockaddr_un local;
    };
};

struct forward { /* guest -> host: an endpoint of the network that is a socket of the host */
    uint8_t protocol;
    struct endpoint at;
    struct target to;
};

/* Where a new flow of the guest goes; logs. False: denied. */
bool policy_route(struct stack *, uint8_t protocol, const struct endpoint *guest, const struct endpoint *far,
                  struct target *to, bool *dns);
/* Is a name to be resolved? `rule` is the index of the rule of this name, or -1. */
bool policy_name(struct stack *, const char *name, int *rule);
void policy_pin(struct stack *, int rule, const struct addr *, uint64_t seconds); /* 0: for ever */
void policy_pin_name(struct stack *, const char *name, const struct addr *, uint64_t seconds);
void policy_log(struct stack *, const struct decision *);
bool addr_is4(const struct addr *);
bool addr_same(const struct addr *, const struct addr *);
struct addr addr_from4(const uint8_t bytes[4]);
struct target target_of(const struct endpoint *);
bool endpoint_of(const struct sockaddr *, struct endpoint *);

/* -- flows */

struct ring {
    uint8_t *data; /* NULL: empty */
    uint32_t head, used;
};

struct range { /* of sequence numbers; never empty */
    uint32_t at, end;
};

struct ranges { /* which neither overlap nor touch */
    uint8_t count;
    struct range of[RANGES];
};

enum tcp_state {
    T_CONNECT,  /* the guest's SYN is here, the host's socket connects */
    T_SYN_RCVD, /* ... has connected, our SYN-ACK is on its way */
    T_SYN_SENT, /* a forward: our SYN is on its way */
    T_OPEN,     /* and all states of closing, by the flags below */
    T_WAIT,     /* TIME-WAIT: no socket any more */
};

struct tcp {
    enum tcp_state state;
    /* to the guest (RFC 9293, SND.*) */
    uint32_t una, nxt, wnd, wl1, wl2, cwnd, ssthresh;
    uint32_t recover; /* after a loss: all that was on its way then ends here; else una */
    uint32_t again, lost; /* from `again` to `lost` all but what the guest has is to be sent again; else una */
    uint32_t resent; /* nxt, when something was sent again last */
    struct ranges held; /* what the guest has behind holes */
    bool fast;       /* the loss was seen without the timer */
    uint16_t mss;
    uint8_t shift;   /* the guest's window scale */
    bool scaled;
    bool sack;       /* both say what they have behind holes */
    uint8_t dup, tries;
    uint64_t rto, srtt, rttvar, deadline, timed_at;
    uint32_t timed;  /* the segment whose time is taken ends here; if timed_at */
    /* from the guest (RCV.*) */
    uint32_t rcv, told; /* told: the right edge of the window that the guest knows */
    struct ring out, in;
    struct ranges early; /* data behind holes, in `in` at their place already */
    uint32_t fin;    /* if fin_known: the number of a FIN that came, perhaps behind a hole */
    bool can_read, can_write, hangup;
    bool eof;        /* the host's side ended: after `out` comes our FIN */
    bool last_ack;   /* the guest closed first: our FIN is the last word */
    bool fin_acked, fin_known, guest_fin, shut, ack_due, listed, blocked;
    uint64_t heard;  /* of the guest */
};

struct flow {
    struct source source; /* fd -1: none */
    struct timer timer;
    struct flow *chain;        /* hash */
    struct flow *older, *newer; /* datagrams by use */
    struct flow *next_due, *next_dead, *next_blocked;
    struct endpoint guest, far; /* far: as the guest sees it */
    uint8_t mac[6];
    uint8_t protocol;
    bool dead, dns, raw, answered;
    struct listener *listener;  /* datagrams of a forward go through its socket ... */
    struct target client;       /* ... to there */
    struct tcp tcp;
};

struct listener { /* host -> guest */
    struct source source;
    struct listener *next, *next_dead;
    uint8_t protocol;
    struct endpoint guest;
    struct timer timer; /* no descriptors left: not before this time */
};

struct neighbour {
    struct addr ip;
    uint8_t mac[6];
    uint64_t seen;
};

struct lease { /* the address config.first plus the place in the table */
    uint8_t mac[6];
    uint64_t seen; /* 0: free */
};

struct reassembly {
    uint8_t *data; /* the datagram behind its IP header; NULL: free */
    uint64_t until;
    uint8_t src[4], dst[4], protocol;
    uint16_t id;
    uint32_t got, size; /* size 0: the last fragment is still to come */
};

struct counts {
    uint64_t frames_in, bytes_in, frames_out, bytes_out, malformed, ignored, blocked, dropped;
    uint64_t tcp_opened, tcp_refused, tcp_retransmitted, tcp_out_of_order, udp_opened, udp_evicted, icmp_opened;
    uint64_t dns_queries, dns_refused, allowed, denied, unlogged, no_descriptors, no_buffers;
};

struct config {
    struct addr network, gateway, dns, first; /* first: address that DHCP gives out first */
    uint8_t bits; /* of the IPv4 network, of 32 */
    uint8_t mac[6];
    uint16_t mtu;
    uint32_t max_tcp, max_udp, max_icmp, max_rings;
    bool loopback;   /* the gateway's ports are the host's 127.0.0.1 */
    uint8_t default_verdict;
    bool filter_names; /* names are resolved only if the policy allows them */
    char domain[NAME], hostname[64];
    bool six;
    struct addr prefix6, gateway6, dns6; /* a /64 */
};

struct stack {
    struct config config;
    int epoll, wake, news; /* eventfds: news for whoever reads decisions */
    struct source port, waker;
    bool port_waits;  /* EPOLLOUT asked for */
    unsigned takes;   /* TAKES_* of the guest; atomic */
    bool stopped, gone; /* gone: the other end of the port is closed */
    pthread_mutex_t lock;
    uint64_t now;
    uint64_t key;
    struct flow *table[HASH];
    struct flow *oldest, *newest;
    struct flow *due, *blocked, *dead;
    struct listener *listeners, *dead_listeners;
    uint32_t tcps, udps, icmps, rings;
    struct timer advertiser; /* of the IPv6 router */
    struct ring spare[16];
    unsigned spares;
    struct timer **heap;
    int timers, heap_size;
    struct neighbour neighbours[NEIGHBOURS];
    struct lease leases[NEIGHBOURS];
    struct reassembly reassemblies[REASSEMBLIES];
    struct rule rules[RULES];
    int rule_count;
    struct pin pins[PINS];
    int pin_count;
    struct forward forwards[FORWARDS];
    int forward_count;
    struct target resolvers[RESOLVERS];
    int resolver_count, resolver;
    struct decision log[DECISIONS];
    unsigned log_head, log_used;
    pthread_mutex_t log_lock;
    uint16_t ip_id, ephemeral;
    uint64_t last_error; /* ICMP errors are limited: when the last one went */
    unsigned error_tokens;
    struct counts counts;
    uint8_t frame[VNET + MAX_FRAME];
    uint8_t reply[VNET + MAX_FRAME];
};

/* -- stack.c */
struct stack *stack_new(const struct config *, int port);
void stack_free(struct stack *);
void stack_run(struct stack *);
void stack_stop(struct stack *);
void stack_step(struct stack *, int milliseconds); /* wait for events once and serve them */
void stack_input(struct stack *, uint8_t *frame, size_t size); /* frame: VNET bytes before it */
bool stack_watch(struct stack *, struct source *, uint32_t events, bool again);
bool stack_send(struct stack *, struct iovec *iov, int count); /* iov[0] begins with VNET; false: later */
uint64_t stack_clock(void);
void timer_set(struct stack *, struct timer *, uint64_t due);
void timer_clear(struct stack *, struct timer *);

/* -- flow.c */
struct flow *flow_find(struct stack *, uint8_t protocol, const struct endpoint *guest, const struct endpoint *far);
struct flow *flow_new(struct stack *, uint8_t protocol, const struct endpoint *guest, const struct endpoint *far);
void flow_free(struct stack *, struct flow *); /* with its socket and buffers */
void flow_touch(struct stack *, struct flow *); /* a datagram flow was used */
int flow_socket(struct stack *, int family, int type, int protocol); /* non-blocking; -1: errno, counted */
bool ring_get(struct stack *, struct ring *);
void ring_put(struct stack *, struct ring *);
int ring_free_iov(const struct ring *, struct iovec iov[2]);
int ring_used_iov(const struct ring *, uint32_t skip, uint32_t size, struct iovec iov[2]);
void ring_put_at(struct ring *, uint32_t offset, const uint8_t *data, uint32_t size); /* behind what is used */
bool ring_append(struct ring *, const uint8_t *data, uint32_t size); /* size fits */
void ring_drop(struct ring *, uint32_t size);

/* -- forward.c: called by other threads; they take the lock. 0 or an errno */
int stack_listen(struct stack *, int fd, uint8_t protocol, const struct endpoint *guest); /* takes the fd */
int stack_unlisten(struct stack *, int fd);
int stack_forward(struct stack *, const struct forward *);
int stack_set_rules(struct stack *, const struct rule *, int count, uint8_t default_verdict, bool filter_names);
int stack_pin(struct stack *, int rule, const struct addr *);
int stack_set_resolvers(struct stack *, const struct target *, int count);
int stack_decisions(struct stack *, struct decision *, int most);
void stack_counts(struct stack *, struct counts *, uint32_t flows[3]);

/* -- ip.c: one packet of the guest, parsed and within bounds */
struct packet {
    const uint8_t *ether;
    const uint8_t *data; /* behind the IP header */
    uint32_t size;
    struct addr src, dst;
    uint8_t protocol, ttl;
    bool summed;         /* the checksum of TCP and UDP is not to be looked at */
    bool broadcast;
    const uint8_t *ip;   /* its header, for ICMP errors */
    uint32_t ip_size;
};

void ip4_input(struct stack *, const uint8_t *frame, size_t size, bool summed);
void ip_dispatch(struct stack *, struct packet *);
/* Headers for `size` bytes of `protocol` behind them into `at` (VNET + ETHER + 40 bytes at most); how many. */
size_t ip_header(struct stack *, uint8_t *at, const uint8_t mac[6], const struct addr *src, const struct addr *dst,
                 uint8_t protocol, size_t size);
uint64_t ip_pseudo(const struct addr *src, const struct addr *dst, uint8_t protocol, size_t size);
/* A datagram to a guest, in fragments if need be. data: room for VNET + ETHER + 40 bytes before it. */
void ip_send(struct stack *, const uint8_t mac[6], const struct addr *src, const struct addr *dst, uint8_t protocol,
             uint8_t *data, size_t size);
const uint8_t *neighbour_mac(struct stack *, const struct addr *); /* NULL: unknown, and asked for */
void neighbour_learn(struct stack *, const struct addr *, const uint8_t mac[6]);
bool on_network(const struct stack *, const struct addr *);
bool is_ours(const struct stack *, const struct addr *); /* an address that we answer for */

/* -- arp.c, ip6.c */
void arp_input(struct stack *, const uint8_t *frame, size_t size);
void arp_ask(struct stack *, const struct addr *);
void ip6_input(struct stack *, const uint8_t *frame, size_t size, bool summed);
void ip6_ask(struct stack *, const struct addr *);
void icmp6_input(struct stack *, struct packet *);
void ip6_advertise(struct stack *, struct timer *);

/* -- icmp.c */
void icmp_input(struct stack *, struct packet *);
void echo_outwards(struct stack *, struct packet *, uint16_t id);
enum unreachable { NO_NET, NO_HOST, NO_PORT, PROHIBITED, TTL_EXCEEDED };
void icmp_error(struct stack *, const struct packet *, enum unreachable);
void icmp_error_of(struct stack *, const struct flow *, enum unreachable); /* without the packet at hand */

/* -- dhcp.c */
void dhcp_input(struct stack *, struct packet *, const uint8_t *data, size_t size);

/* -- dns.c */
/* May this question go out? If not, the answer is sent. */
bool dns_question(struct stack *, struct packet *, const struct endpoint *guest, const uint8_t *data, size_t size);
void dns_answer(struct stack *, const uint8_t *data, size_t size);
bool dns_servfail(struct stack *, struct packet *, const struct endpoint *guest, const uint8_t *data, size_t size);

/* -- udp.c */
void udp_input(struct stack *, struct packet *);
void udp_reply(struct stack *, const uint8_t mac[6], const struct endpoint *from, const struct endpoint *to,
               uint8_t *data, size_t size); /* data: room for all headers before it */
void udp_listener_ready(struct stack *, struct source *, uint32_t events);

/* -- tcp_*.c */
void tcp_input(struct stack *, struct packet *);
void tcp_flush(struct stack *);                  /* acknowledgements that are due after a batch */
void tcp_unblocked(struct stack *);              /* the port takes frames again */
void tcp_listener_ready(struct stack *, struct source *, uint32_t events);
void tcp_listener_again(struct stack *, struct timer *);
void tcp_host_ready(struct stack *, struct source *, uint32_t events);
uint32_t tcp_to_host(struct stack *, struct flow *, const uint8_t *data, uint32_t size);
void tcp_from_host(struct stack *, struct flow *);
void tcp_keep_early(struct stack *, struct flow *, uint32_t seq, const uint8_t *data, uint32_t size);
void tcp_take_early(struct stack *, struct flow *); /* a hole may be filled */
void tcp_host_done(struct stack *, struct flow *); /* the guest's FIN: pass it on when the buffer is empty */
void tcp_output(struct stack *, struct flow *);
void tcp_begin(struct stack *, struct flow *); /* chooses our first sequence number */
bool tcp_segment(struct stack *, struct flow *, uint8_t flags, uint32_t seq, uint32_t offset, uint32_t size);
void tcp_reset(struct stack *, struct packet *, const struct endpoint *guest, const struct endpoint *far);
void tcp_abort(struct stack *, struct flow *, bool guest, bool host); /* RST to these sides, then free */
void tcp_timer(struct stack *, struct timer *);
void tcp_arm(struct stack *, struct flow *, uint64_t due);
void tcp_connected(struct stack *, struct flow *);
void tcp_finished(struct stack *, struct flow *); /* all four ends shut? */
uint32_t tcp_window(const struct flow *);
uint32_t tcp_offered(const struct tcp *); /* of it, what the guest knows */
uint32_t tcp_largest(struct stack *, const struct flow *); /* how much may go in one segment */
void tcp_due(struct stack *, struct flow *);
void tcp_block(struct stack *, struct flow *);

/* -- tcp_loss.c */
bool ranges_add(struct ranges *, uint32_t at, uint32_t end); /* false: no room for one more */
uint32_t ranges_reach(struct ranges *, uint32_t seq); /* forgets what begins up to there; how far that goes beyond */
bool tcp_held(struct tcp *, const uint8_t *blocks, int count); /* the guest has these; is one of them new? */
void tcp_advance(struct tcp *, uint32_t ack);
void tcp_suspect(struct stack *, struct tcp *, uint32_t most); /* is something lost, by all that the guest has said? */
void tcp_all_lost(struct tcp *); /* the timer's view */
uint32_t tcp_flight(const struct tcp *); /* how much is on its way */
uint32_t tcp_hole(struct tcp *); /* moves `again` to the next lost byte; how many are lost there */

enum { FIN = 1, SYN = 2, RST = 4, PSH = 8, ACK = 16 };

static inline bool seq_lt(uint32_t a, uint32_t b)
{
    return (int32_t)(a - b) < 0;
}

static inline bool seq_le(uint32_t a, uint32_t b)
{
    return (int32_t)(a - b) <= 0;
}

#endif
