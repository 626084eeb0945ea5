/* What cell.bpf.c and policy.ts agree on. Numbers are stable: policy.ts reads maps by them, and a test compares the two. */
#pragma once

#include <linux/types.h>

/* Index of a counter is direction * VERDICTS + verdict. */
enum direction {
	FROM_CELL = 0,
	TO_CELL = 1,
};

enum verdict {
	PASSED = 0,
	NOT_IPV6 = 1,              /* ARP, IPv4, VLAN tags and all else */
	MALFORMED = 2,             /* lengths or flags that no honest stack sends */
	FRAGMENT = 3,
	EXTENSION_HEADER = 4,      /* MLD arrives here: RFC 3810 puts it behind a hop-by-hop header */
	ROUTER_ADVERTISEMENT = 5,
	REDIRECT = 6,
	NEIGHBOUR_DISCOVERY = 7,   /* solicitations and neighbour advertisements: both sides have permanent entries */
	ICMP = 8,
	NOT_TCP = 9,
	SPOOFED_SOURCE = 10,
	WRONG_DESTINATION = 11,
	CONNECTION_FROM_CELL = 12, /* the cell tried to open a connection, or was answered as if it had */
	PORT_NOT_ALLOWED = 13,
	NO_CONNECTION = 14,        /* belongs to no connection that was opened towards the cell */
	TOO_MANY_CONNECTIONS = 15,
	VERDICTS = 16,
};

#define MAX_PORTS 64
#define MAX_CONNECTIONS 4096

/* RFC 5382 section 5: at least 2 hours 4 minutes for an established connection, 4 minutes for an opening or closing one. */
#define ESTABLISHED_TIMEOUT_NS (124ULL * 60 * 1000000000)
#define TRANSITORY_TIMEOUT_NS (4ULL * 60 * 1000000000)
#define SWEEP_INTERVAL_NS 1000000000ULL

/* Written once, before the program is loaded. MAC addresses are followed by two zero bytes. */
struct cell_config {
	__u64 cell[2];
	__u64 gateway[2];
	__u64 cell_mac;
	__u64 gateway_mac;
};

/* Ports and addresses in network byte order everywhere. */
struct connection_key {
	__u32 remote[4];
	__be16 remote_port;
	__be16 cell_port;
};

/* Each flag is a byte of its own: both directions write without locking and never undo the other's. Arrays by direction. */
struct connection {
	__u64 seen_ns;
	__u32 fin_end[2]; /* the sequence number that acknowledges the FIN */
	__u8 fin[2];
	__u8 fin_acked[2];
	__u8 established;
	__u8 padding[3];
};

struct counter {
	__u64 packets;
	__u64 bytes;
};
