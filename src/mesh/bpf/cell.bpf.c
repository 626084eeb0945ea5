/*
 * The policy of one cell, on both directions of its tap. What is not explicitly allowed is dropped and counted:
 *
 *   to_cell    TCP from the gateway's address to the cell's, to an allowed port; a SYN opens a connection
 *   from_cell  TCP from the cell to the gateway, on a connection that was opened towards it; nothing else
 *
 * Each cell has its own copy of the programs and maps; they live exactly as long as the tap they hang on.
 */
#include <linux/bpf.h>
#include <linux/if_ether.h>
#include <linux/in.h>
#include <linux/ipv6.h>
#include <linux/pkt_cls.h>
#include <linux/tcp.h>

#include <bpf/bpf_endian.h>
#include <bpf/bpf_helpers.h>

#include "cell.h"

const volatile struct cell_config config = {};

struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_PORTS);
	__type(key, __be16);
	__type(value, __u8);
} ports SEC(".maps");

/* Never evicts: a full table refuses new connections and keeps the old ones. */
struct {
	__uint(type, BPF_MAP_TYPE_HASH);
	__uint(map_flags, BPF_F_NO_PREALLOC);
	__uint(max_entries, MAX_CONNECTIONS);
	__type(key, struct connection_key);
	__type(value, struct connection);
} connections SEC(".maps");

struct {
	__uint(type, BPF_MAP_TYPE_PERCPU_ARRAY);
	__uint(max_entries, 2 * VERDICTS);
	__type(key, __u32);
	__type(value, struct counter);
} counters SEC(".maps");

__u64 swept_ns;

struct bpf_map;

struct packet {
	struct ethhdr eth;
	struct ipv6hdr ip;
	struct tcphdr tcp;
};

static int decide(struct __sk_buff *skb, enum direction direction);
static enum verdict parse(struct __sk_buff *skb, struct packet *packet);
static enum verdict check_next_header(struct __sk_buff *skb, __u8 next_header);
static enum verdict check_tcp(const struct packet *packet);
static enum verdict check_source(const struct packet *packet, enum direction direction);
static enum verdict check_destination(const struct packet *packet, enum direction direction);
static enum verdict open_connection(const struct connection_key *key);
static enum verdict follow_connection(const struct connection_key *key, const struct packet *packet, enum direction direction);

SEC("tc")
int from_cell(struct __sk_buff *skb)
{
	return decide(skb, FROM_CELL);
}

SEC("tc")
int to_cell(struct __sk_buff *skb)
{
	return decide(skb, TO_CELL);
}

static __always_inline enum verdict judge(struct __sk_buff *skb, enum direction direction)
{
	struct packet packet;
	struct connection_key key = {};
	enum verdict verdict = parse(skb, &packet);

	if (verdict == PASSED)
		verdict = check_source(&packet, direction);
	if (verdict == PASSED)
		verdict = check_destination(&packet, direction);
	if (verdict == PASSED)
		verdict = check_tcp(&packet);
	if (verdict != PASSED)
		return verdict;

	__builtin_memcpy(key.remote, direction == FROM_CELL ? &packet.ip.daddr : &packet.ip.saddr, sizeof(key.remote));
	key.remote_port = direction == FROM_CELL ? packet.tcp.dest : packet.tcp.source;
	key.cell_port = direction == FROM_CELL ? packet.tcp.source : packet.tcp.dest;

	/* A SYN alone opens, and only towards the cell; a SYN with ACK answers, and only comes from it. */
	if (packet.tcp.syn && packet.tcp.ack != (direction == FROM_CELL))
		return CONNECTION_FROM_CELL;
	if (!bpf_map_lookup_elem(&ports, &key.cell_port))
		return PORT_NOT_ALLOWED;
	if (packet.tcp.syn && direction == TO_CELL)
		return open_connection(&key);
	return follow_connection(&key, &packet, direction);
}

static __always_inline int decide(struct __sk_buff *skb, enum direction direction)
{
	enum verdict verdict = judge(skb, direction);
	__u32 index = direction * VERDICTS + verdict;
	struct counter *counter = bpf_map_lookup_elem(&counters, &index);

	if (!counter)
		return TC_ACT_SHOT;
	counter->packets++;
	counter->bytes += skb->len;
	return verdict == PASSED ? TC_ACT_OK : TC_ACT_SHOT;
}

/* Passes a whole, unfragmented TCP segment right behind its IPv6 header; copies its headers. */
static __always_inline enum verdict parse(struct __sk_buff *skb, struct packet *packet)
{
	enum verdict verdict;

	/* The kernel takes a VLAN tag off before this program sees the frame. */
	if (skb->vlan_present)
		return NOT_IPV6;
	if (bpf_skb_load_bytes(skb, 0, &packet->eth, sizeof(packet->eth)))
		return MALFORMED;
	if (packet->eth.h_proto != bpf_htons(ETH_P_IPV6))
		return NOT_IPV6;
	if (bpf_skb_load_bytes(skb, sizeof(packet->eth), &packet->ip, sizeof(packet->ip)))
		return MALFORMED;
	if (packet->ip.version != 6)
		return MALFORMED;
	if (skb->len != sizeof(packet->eth) + sizeof(packet->ip) + bpf_ntohs(packet->ip.payload_len))
		return MALFORMED;
	verdict = check_next_header(skb, packet->ip.nexthdr);
	if (verdict != PASSED)
		return verdict;
	if (bpf_skb_load_bytes(skb, sizeof(packet->eth) + sizeof(packet->ip), &packet->tcp, sizeof(packet->tcp)))
		return MALFORMED;
	return PASSED;
}

static __always_inline enum verdict check_next_header(struct __sk_buff *skb, __u8 next_header)
{
	__u8 type;

	switch (next_header) {
	case IPPROTO_TCP:
		return PASSED;
	case IPPROTO_FRAGMENT:
		return FRAGMENT;
	case IPPROTO_HOPOPTS:
	case IPPROTO_ROUTING:
	case IPPROTO_ESP:
	case IPPROTO_AH:
	case IPPROTO_DSTOPTS:
	case IPPROTO_MH:
	case 139: /* Host Identity Protocol, RFC 7401 */
	case 140: /* Shim6, RFC 5533 */
		return EXTENSION_HEADER;
	case IPPROTO_ICMPV6:
		break;
	default:
		return NOT_TCP;
	}
	if (bpf_skb_load_bytes(skb, sizeof(struct ethhdr) + sizeof(struct ipv6hdr), &type, sizeof(type)))
		return MALFORMED;
	switch (type) {
	case 134:
		return ROUTER_ADVERTISEMENT;
	case 137:
		return REDIRECT;
	case 133: /* router solicitation */
	case 135: /* neighbour solicitation */
	case 136: /* neighbour advertisement */
		return NEIGHBOUR_DISCOVERY;
	default:
		return ICMP;
	}
}

static __always_inline int is_address(const struct in6_addr *address, const volatile __u64 expected[2])
{
	__u64 words[2];

	__builtin_memcpy(words, address, sizeof(words));
	return words[0] == expected[0] && words[1] == expected[1];
}

static __always_inline int is_mac(const __u8 mac[ETH_ALEN], __u64 expected)
{
	__u64 word = 0;

	__builtin_memcpy(&word, mac, ETH_ALEN);
	return word == expected;
}

static __always_inline enum verdict check_source(const struct packet *packet, enum direction direction)
{
	int ok = direction == FROM_CELL ? is_mac(packet->eth.h_source, config.cell_mac) && is_address(&packet->ip.saddr, config.cell)
					: is_mac(packet->eth.h_source, config.gateway_mac) && is_address(&packet->ip.saddr, config.gateway);

	return ok ? PASSED : SPOOFED_SOURCE;
}

static __always_inline enum verdict check_destination(const struct packet *packet, enum direction direction)
{
	int ok = direction == FROM_CELL ? is_mac(packet->eth.h_dest, config.gateway_mac) && is_address(&packet->ip.daddr, config.gateway)
					: is_mac(packet->eth.h_dest, config.cell_mac) && is_address(&packet->ip.daddr, config.cell);

	return ok ? PASSED : WRONG_DESTINATION;
}

static __always_inline enum verdict check_tcp(const struct packet *packet)
{
	const struct tcphdr *tcp = &packet->tcp;

	if (tcp->doff < 5 || tcp->doff * 4 > bpf_ntohs(packet->ip.payload_len))
		return MALFORMED;
	if (tcp->syn && (tcp->fin || tcp->rst))
		return MALFORMED;
	if (!tcp->syn && !tcp->ack && !tcp->rst)
		return MALFORMED;
	return PASSED;
}

static __always_inline int is_expired(const struct connection *connection, __u64 now_ns)
{
	int transitory = !connection->established || connection->fin[FROM_CELL] || connection->fin[TO_CELL];

	return now_ns - connection->seen_ns > (transitory ? TRANSITORY_TIMEOUT_NS : ESTABLISHED_TIMEOUT_NS);
}

static long expire(struct bpf_map *map, const struct connection_key *key, struct connection *connection, __u64 *now_ns)
{
	if (is_expired(connection, *now_ns))
		bpf_map_delete_elem(map, key);
	return 0;
}

static __always_inline enum verdict open_connection(const struct connection_key *key)
{
	__u64 now_ns = bpf_ktime_get_ns();
	struct connection connection = {.seen_ns = now_ns};

	if (bpf_map_update_elem(&connections, key, &connection, BPF_ANY) == 0)
		return PASSED;
	/* Full: clear out what has expired, at most once a second so that a flood does not buy CPU time. */
	if (now_ns - swept_ns < SWEEP_INTERVAL_NS)
		return TOO_MANY_CONNECTIONS;
	swept_ns = now_ns;
	bpf_for_each_map_elem(&connections, expire, &now_ns, 0);
	return bpf_map_update_elem(&connections, key, &connection, BPF_ANY) == 0 ? PASSED : TOO_MANY_CONNECTIONS;
}

/* A connection ends with an RST, with both FINs acknowledged, or by its age. The packet that ends it still passes. */
static __always_inline enum verdict follow_connection(const struct connection_key *key, const struct packet *packet,
						      enum direction direction)
{
	const enum direction other = direction == FROM_CELL ? TO_CELL : FROM_CELL;
	const struct tcphdr *tcp = &packet->tcp;
	struct connection *connection = bpf_map_lookup_elem(&connections, key);
	__u64 now_ns = bpf_ktime_get_ns();

	if (!connection)
		return NO_CONNECTION;
	if (is_expired(connection, now_ns)) {
		bpf_map_delete_elem(&connections, key);
		return NO_CONNECTION;
	}
	if (tcp->rst) {
		bpf_map_delete_elem(&connections, key);
		return PASSED;
	}
	connection->seen_ns = now_ns;
	if (direction == TO_CELL)
		connection->established = 1;
	if (connection->fin[other] && bpf_ntohl(tcp->ack_seq) == connection->fin_end[other])
		connection->fin_acked[other] = 1;
	if (tcp->fin) {
		connection->fin_end[direction] = bpf_ntohl(tcp->seq) + bpf_ntohs(packet->ip.payload_len) - tcp->doff * 4 + 1;
		connection->fin[direction] = 1;
	}
	if (connection->fin_acked[FROM_CELL] && connection->fin_acked[TO_CELL])
		bpf_map_delete_elem(&connections, key);
	return PASSED;
}

/* Calls no helper reserved for GPL programs. */
char license_text[] SEC("license") = "Apache-2.0";
