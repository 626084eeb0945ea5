import { parseAddress } from "./address.ts";
import { macBytes } from "./link.ts";

/** For the tests: Ethernet frames, right by default and wrong where asked. */

export interface FrameOptions {
  readonly sourceMac: string;
  readonly destinationMac: string;
  readonly etherType?: number;
  readonly version?: number;
  readonly source: string;
  readonly destination: string;
  readonly nextHeader?: number;
  /** Instead of the true length of what follows the IPv6 header. */
  readonly payloadLength?: number;
  /** Instead of a TCP segment. */
  readonly body?: Buffer;
  readonly tcp?: TcpOptions;
}

export interface TcpOptions {
  readonly sourcePort: number;
  readonly destinationPort: number;
  readonly flags: number;
  readonly sequence?: number;
  readonly acknowledgement?: number;
  readonly headerWords?: number;
  readonly payloadBytes?: number;
}

export const FIN = 1;
export const SYN = 2;
export const RST = 4;
export const ACK = 16;

export function frame(options: FrameOptions): Buffer {
  const body = options.body ?? (options.tcp === undefined ? Buffer.alloc(0) : tcpSegment(options.tcp));
  const header = Buffer.alloc(54);
  macBytes(options.destinationMac).copy(header, 0);
  macBytes(options.sourceMac).copy(header, 6);
  header.writeUInt16BE(options.etherType ?? 0x86dd, 12);
  header[14] = (options.version ?? 6) << 4;
  header.writeUInt16BE(options.payloadLength ?? body.length, 18);
  header[20] = options.nextHeader ?? 6;
  header[21] = 64;
  parseAddress(options.source).copy(header, 22);
  parseAddress(options.destination).copy(header, 38);
  return Buffer.concat([header, body]);
}

function tcpSegment(options: TcpOptions): Buffer {
  const segment = Buffer.alloc(20 + (options.payloadBytes ?? 0));
  segment.writeUInt16BE(options.sourcePort, 0);
  segment.writeUInt16BE(options.destinationPort, 2);
  segment.writeUInt32BE(options.sequence ?? 0, 4);
  segment.writeUInt32BE(options.acknowledgement ?? 0, 8);
  segment[12] = (options.headerWords ?? 5) << 4;
  segment[13] = options.flags;
  return segment;
}
