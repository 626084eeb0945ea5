/* One interface, one address, one neighbour: nothing is discovered, announced or asked for. */
#include "guest.h"
#include <errno.h>
#include <fcntl.h>
#include <linux/if_addr.h>
#include <linux/neighbour.h>
#include <linux/netlink.h>
#include <linux/rtnetlink.h>
#include <net/if.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

struct message {
  struct nlmsghdr head;
  uint8_t bytes[256];
};

static void set(const char *path, const char *value);
static struct message start_message(uint16_t type, const void *fixed, size_t length);
static void add_attribute(struct message *message, uint16_t type, const void *value, size_t length);
static void send_message(int fd, struct message *message, const char *what);

void configure_network(const struct config *config) {
  int fd = socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, NETLINK_ROUTE);
  if (fd == -1) fatal("NETWORK_FAILED", "netlink: %s", strerror(errno));
  int loopback = (int)if_nametoindex("lo"), eth0 = (int)if_nametoindex("eth0");
  if (eth0 == 0) fatal("NETWORK_FAILED", "there is no interface eth0");
  set("/proc/sys/net/ipv6/conf/eth0/accept_ra", "0");
  set("/proc/sys/net/ipv6/conf/eth0/autoconf", "0");
  set("/proc/sys/net/ipv6/conf/eth0/router_solicitations", "0");
  set("/proc/sys/net/ipv6/conf/eth0/accept_redirects", "0");
  set("/proc/sys/net/ipv6/conf/eth0/addr_gen_mode", "1"); /* no link-local address: the cell's own is the only one */
  set("/proc/sys/net/ipv4/ip_unprivileged_port_start", "0"); /* as Docker does: any user may listen on port 80 */

  struct ifinfomsg up = {.ifi_index = loopback, .ifi_flags = IFF_UP, .ifi_change = IFF_UP};
  struct message message = start_message(RTM_NEWLINK, &up, sizeof up);
  send_message(fd, &message, "lo up");

  up.ifi_index = eth0;
  message = start_message(RTM_NEWLINK, &up, sizeof up);
  add_attribute(&message, IFLA_MTU, &config->mtu, sizeof config->mtu);
  send_message(fd, &message, "eth0 up");

  struct ifaddrmsg address = {.ifa_family = AF_INET6, .ifa_prefixlen = 128, .ifa_flags = IFA_F_NODAD, .ifa_index = (unsigned)eth0};
  message = start_message(RTM_NEWADDR, &address, sizeof address);
  add_attribute(&message, IFA_LOCAL, config->address, 16);
  send_message(fd, &message, "the cell's address");

  struct ndmsg neighbour = {.ndm_family = AF_INET6, .ndm_ifindex = eth0, .ndm_state = NUD_PERMANENT};
  message = start_message(RTM_NEWNEIGH, &neighbour, sizeof neighbour);
  add_attribute(&message, NDA_DST, config->gateway, 16);
  add_attribute(&message, NDA_LLADDR, config->gateway_mac, 6);
  send_message(fd, &message, "the gateway's link address");

  struct rtmsg route = {.rtm_family = AF_INET6, .rtm_dst_len = 128, .rtm_table = RT_TABLE_MAIN, .rtm_protocol = RTPROT_STATIC,
                        .rtm_scope = RT_SCOPE_LINK, .rtm_type = RTN_UNICAST};
  message = start_message(RTM_NEWROUTE, &route, sizeof route);
  add_attribute(&message, RTA_DST, config->gateway, 16);
  add_attribute(&message, RTA_OIF, &eth0, sizeof eth0);
  send_message(fd, &message, "the route to the gateway");
  close(fd);
}

static void set(const char *path, const char *value) {
  int fd = open(path, O_WRONLY | O_CLOEXEC);
  if (fd == -1 || write(fd, value, strlen(value)) == -1) fatal("NETWORK_FAILED", "%s: %s", path, strerror(errno));
  close(fd);
}

static struct message start_message(uint16_t type, const void *fixed, size_t length) {
  uint16_t make = type == RTM_NEWLINK ? 0 : NLM_F_CREATE | NLM_F_REPLACE; /* links are there already */
  struct message message = {.head = {.nlmsg_type = type, .nlmsg_flags = (uint16_t)(NLM_F_REQUEST | NLM_F_ACK | make)}};
  memcpy(message.bytes, fixed, length);
  message.head.nlmsg_len = (uint32_t)NLMSG_LENGTH(length);
  return message;
}

static void add_attribute(struct message *message, uint16_t type, const void *value, size_t length) {
  struct rtattr head = {.rta_type = type, .rta_len = (uint16_t)RTA_LENGTH(length)};
  uint8_t *at = (uint8_t *)message + NLMSG_ALIGN(message->head.nlmsg_len);
  memcpy(at, &head, sizeof head);
  memcpy(at + RTA_LENGTH(0), value, length);
  message->head.nlmsg_len = NLMSG_ALIGN(message->head.nlmsg_len) + (uint32_t)RTA_ALIGN(head.rta_len);
}

static void send_message(int fd, struct message *message, const char *what) {
  struct {
    struct nlmsghdr head;
    struct nlmsgerr error;
    uint8_t rest[512];
  } answer;
  if (send(fd, message, message->head.nlmsg_len, 0) == -1 || recv(fd, &answer, sizeof answer, 0) == -1)
    fatal("NETWORK_FAILED", "%s: %s", what, strerror(errno));
  if (answer.head.nlmsg_type == NLMSG_ERROR && answer.error.error != 0)
    fatal("NETWORK_FAILED", "%s: %s", what, strerror(-answer.error.error));
}
