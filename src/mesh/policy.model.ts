import { ACK, FIN, RST, SYN } from "./frame.fixture.ts";
import type { PolicyEnds, Verdict } from "./policy.ts";
import { parseAddress } from "./address.ts";
import { macBytes } from "./link.ts";

/**
 * For the tests: the policy again, written from its statement and not from the C: one connection table, no time.
 * Whatever frames a property test thinks of, the programs must give the same verdict as this.
 */

export type Side = "cell" | "gateway";

interface Connection {
  /** By the side that sent the FIN: what acknowledges it, and whether that was seen. */
  readonly fins: Map<Side, { acknowledgedBy: number; acknowledged: boolean }>;
}

export class PolicyModel {
  readonly connections = new Map<string, Connection>();
  ports: ReadonlySet<number>;
  private readonly ends: PolicyEnds;

  constructor(ends: PolicyEnds, ports: ReadonlySet<number>) {
    this.ends = ends;
    this.ports = ports;
  }

  judge(sender: Side, frame: Buffer): Verdict {
    if (frame.readUInt16BE(12) !== 0x86dd) return "notIpv6";
    const packet = frame.subarray(14);
    if (packet.length < 40 || packet.readUInt8(0) >> 4 !== 6 || packet.readUInt16BE(4) !== packet.length - 40) return "malformed";
    const segment = packet.subarray(40);
    const verdict = this.judgeProtocol(packet.readUInt8(6), segment) ?? this.judgeEnds(sender, frame) ?? this.judgeSegment(segment);
    return verdict ?? this.judgeConnection(sender, segment);
  }

  private judgeProtocol(nextHeader: number, body: Buffer): Verdict | undefined {
    if (nextHeader === 44) return "fragment";
    if ([0, 43, 50, 51, 60, 135, 139, 140].includes(nextHeader)) return "extensionHeader";
    if (nextHeader === 58) {
      const type = body[0];
      if (type === undefined) return "malformed";
      if (type === 134) return "routerAdvertisement";
      if (type === 137) return "redirect";
      return [133, 135, 136].includes(type) ? "neighbourDiscovery" : "icmp";
    }
    if (nextHeader !== 6) return "notTcp";
    return body.length < 20 ? "malformed" : undefined;
  }

  private judgeEnds(sender: Side, frame: Buffer): Verdict | undefined {
    const cell = { mac: macBytes(this.ends.mac), address: parseAddress(this.ends.address) };
    const gateway = { mac: macBytes(this.ends.gatewayMac), address: parseAddress(this.ends.gateway) };
    const [from, to] = sender === "cell" ? [cell, gateway] : [gateway, cell];
    if (!from.mac.equals(frame.subarray(6, 12)) || !from.address.equals(frame.subarray(22, 38))) return "spoofedSource";
    if (!to.mac.equals(frame.subarray(0, 6)) || !to.address.equals(frame.subarray(38, 54))) return "wrongDestination";
    return undefined;
  }

  private judgeSegment(segment: Buffer): Verdict | undefined {
    const headerBytes = (segment.readUInt8(12) >> 4) * 4;
    const flags = segment.readUInt8(13);
    if (headerBytes < 20 || headerBytes > segment.length) return "malformed";
    if ((flags & SYN) !== 0 && (flags & (FIN | RST)) !== 0) return "malformed";
    return (flags & (SYN | ACK | RST)) === 0 ? "malformed" : undefined;
  }

  private judgeConnection(sender: Side, segment: Buffer): Verdict {
    const flags = segment.readUInt8(13);
    const [sourcePort, destinationPort] = [segment.readUInt16BE(0), segment.readUInt16BE(2)];
    const [cellPort, remotePort] = sender === "cell" ? [sourcePort, destinationPort] : [destinationPort, sourcePort];
    const handshake = flags & (SYN | ACK);
    if (sender === "cell" ? handshake === SYN : handshake === (SYN | ACK)) return "connectionFromCell";
    if (!this.ports.has(cellPort)) return "portNotAllowed";
    const key = `${remotePort} ${cellPort}`;
    if ((flags & SYN) !== 0 && sender === "gateway") {
      this.connections.set(key, { fins: new Map() });
      return "passed";
    }
    const connection = this.connections.get(key);
    if (connection === undefined) return "noConnection";
    if ((flags & RST) !== 0 || this.isOver(connection, sender, segment)) this.connections.delete(key);
    return "passed";
  }

  private isOver({ fins }: Connection, sender: Side, segment: Buffer): boolean {
    const theirs = fins.get(sender === "cell" ? "gateway" : "cell");
    if (theirs !== undefined && segment.readUInt32BE(8) === theirs.acknowledgedBy) theirs.acknowledged = true;
    if ((segment.readUInt8(13) & FIN) !== 0) {
      const payloadBytes = segment.length - (segment.readUInt8(12) >> 4) * 4;
      const acknowledgedBy = (segment.readUInt32BE(4) + payloadBytes + 1) % 2 ** 32;
      fins.set(sender, { acknowledgedBy, acknowledged: fins.get(sender)?.acknowledged ?? false });
    }
    return fins.size === 2 && [...fins.values()].every((fin) => fin.acknowledged);
  }
}
