/* SPDX-License-Identifier: Apache-2.0
 *
 * ARP (RFC 826): the gateway's addresses, and who has an address of the network.
 */
#include "user.h"

#define SIZE 28
static const uint8_t EVERYBODY[6] = {0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF};

static void send_arp(struct stack *s, const uint8_t to[6], uint16_t operation, const uint8_t sender[4],
                     const uint8_t target_mac[6], const uint8_t target[4])
{
    uint8_t frame[VNET + ETHER + SIZE] = {0}, *f = frame + VNET, *arp = f + ETHER;
    memcpy(f, to, 6);
    memcpy(f + 6, s->config.mac, 6);
    put16(f + 12, ETHER_ARP);
    put16(arp, 1); /* Ethernet */
    put16(arp + 2, ETHER_IP4);
    arp[4] = 6;
    arp[5] = 4;
    put16(arp + 6, operation);
    memcpy(arp + 8, s->config.mac, 6);
    memcpy(arp + 14, sender, 4);
    if (target_mac)
        memcpy(arp + 18, target_mac, 6);
    memcpy(arp + 24, target, 4);
    if (!stack_send(s, &(struct iovec){frame, sizeof(frame)}, 1))
        s->counts.dropped++; /* it will be asked again */
}

void arp_ask(struct stack *s, const struct addr *ip)
{
    send_arp(s, EVERYBODY, 1, s->config.gateway.b + 12, NULL, ip->b + 12);
}

void arp_input(struct stack *s, const uint8_t *frame, size_t size)
{
    const uint8_t *arp = frame + ETHER;
    if (size < ETHER + SIZE || get16(arp) != 1 || get16(arp + 2) != ETHER_IP4 || arp[4] != 6 || arp[5] != 4) {
        s->counts.malformed++;
        return;
    }
    struct addr sender = addr_from4(arp + 14), target = addr_from4(arp + 24);
    const bool group = arp[8] & 1 || memcmp(arp + 8, frame + 6, 6);
    if (!group && get32(arp + 14) && on_network(s, &sender) && !is_ours(s, &sender))
        neighbour_learn(s, &sender, arp + 8);
    if (get16(arp + 6) == 1 && is_ours(s, &target))
        send_arp(s, frame + 6, 2, arp + 24, arp + 8, arp + 14);
}
