import { parseAddress } from "./address.ts";

/** rtnetlink requests (rtnetlink(7), linux/rtnetlink.h, if_link.h, if_addr.h, neighbour.h) for a cell's tap. IPv6 only. */

const AF_INET6 = 10;
const hostLength = 128;

/** What to set before the device goes up: its MAC and MTU, and that it makes no link-local address of its own. */
export function configureLink(index: number, link: { mac: string; mtu: number }): Buffer {
  const IFLA_ADDRESS = 1;
  const IFLA_MTU = 4;
  const IFLA_INET6_ADDR_GEN_MODE = 8;
  const IFLA_AF_SPEC = 26;
  const IN6_ADDR_GEN_MODE_NONE = 1;
  const addressMode = attribute(AF_INET6, attribute(IFLA_INET6_ADDR_GEN_MODE, Buffer.from([IN6_ADDR_GEN_MODE_NONE])));
  return request(
    RTM_NEWLINK,
    linkHeader(index, 0),
    attribute(IFLA_ADDRESS, macBytes(link.mac)),
    attribute(IFLA_MTU, uint32(link.mtu)),
    attribute(IFLA_AF_SPEC, addressMode),
  );
}

export function raiseLink(index: number): Buffer {
  const IFF_UP = 1;
  return request(RTM_NEWLINK, linkHeader(index, IFF_UP));
}

export function deleteLink(index: number): Buffer {
  return request(RTM_DELLINK, linkHeader(index, 0));
}

/** A /128 that is usable at once: nobody else is on the link to detect as a duplicate. */
export function addAddress(index: number, address: string): Buffer {
  const IFA_LOCAL = 2;
  const IFA_F_NODAD = 2;
  const header = Buffer.from([AF_INET6, hostLength, IFA_F_NODAD, 0, 0, 0, 0, 0]);
  header.writeUInt32LE(index, 4);
  return request(RTM_NEWADDR, header, attribute(IFA_LOCAL, parseAddress(address)));
}

/** A neighbour that needs no discovery. */
export function addNeighbour(index: number, address: string, mac: string): Buffer {
  const NDA_DST = 1;
  const NDA_LLADDR = 2;
  const NUD_PERMANENT = 0x80;
  const header = Buffer.alloc(12);
  header[0] = AF_INET6;
  header.writeInt32LE(index, 4);
  header.writeUInt16LE(NUD_PERMANENT, 8);
  return request(RTM_NEWNEIGH, header, attribute(NDA_DST, parseAddress(address)), attribute(NDA_LLADDR, macBytes(mac)));
}

/** A route to one host on the link. */
export function addHostRoute(index: number, destination: string, source: string): Buffer {
  const RTA_DST = 1;
  const RTA_OIF = 4;
  const RTA_PREFSRC = 7;
  const RT_TABLE_MAIN = 254;
  const RTPROT_STATIC = 4;
  const RTN_UNICAST = 1;
  const header = Buffer.from([AF_INET6, hostLength, 0, 0, RT_TABLE_MAIN, RTPROT_STATIC, 0, RTN_UNICAST, 0, 0, 0, 0]);
  return request(
    RTM_NEWROUTE,
    header,
    attribute(RTA_DST, parseAddress(destination)),
    attribute(RTA_OIF, uint32(index)),
    attribute(RTA_PREFSRC, parseAddress(source)),
  );
}

export function macBytes(mac: string): Buffer {
  return Buffer.from(mac.replaceAll(":", ""), "hex");
}

const RTM_NEWLINK = 16;
const RTM_DELLINK = 17;
const RTM_NEWADDR = 20;
const RTM_NEWROUTE = 24;
const RTM_NEWNEIGH = 28;

function request(type: number, ...parts: readonly Buffer[]): Buffer {
  const NLM_F_REQUEST = 0x1;
  const NLM_F_ACK = 0x4;
  const NLM_F_EXCL = 0x200;
  const NLM_F_CREATE = 0x400;
  const creates = type === RTM_NEWLINK || type === RTM_DELLINK ? 0 : NLM_F_CREATE | NLM_F_EXCL;
  const header = Buffer.alloc(16);
  const message = Buffer.concat([header, ...parts]);
  message.writeUInt32LE(message.length, 0);
  message.writeUInt16LE(type, 4);
  message.writeUInt16LE(NLM_F_REQUEST | NLM_F_ACK | creates, 6);
  return message;
}

/** struct ifinfomsg; `raise` is the set of flags to set. */
function linkHeader(index: number, raise: number): Buffer {
  const header = Buffer.alloc(16);
  header.writeInt32LE(index, 4);
  header.writeUInt32LE(raise, 8);
  header.writeUInt32LE(raise, 12);
  return header;
}

/** struct rtattr and its value, padded to 4 bytes. */
function attribute(type: number, value: Buffer): Buffer {
  const bytes = Buffer.alloc((4 + value.length + 3) & ~3);
  bytes.writeUInt16LE(4 + value.length, 0);
  bytes.writeUInt16LE(type, 2);
  value.copy(bytes, 4);
  return bytes;
}

function uint32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(value);
  return bytes;
}
