import { attachedProgram, attachTraffic, withBpfObject, withProgram } from "../base/bpf.ts";
import { ForgeError } from "../base/errors.ts";
import { formatAddress, parseAddress } from "./address.ts";
import { bpfObjectPath } from "./bpf/build.ts";
import { macBytes } from "./link.ts";

/**
 * The policy of a cell, as the eBPF programs on its tap enforce it (bpf/cell.bpf.c). Everything here runs inside the
 * cell's network namespace and names the tap by its index there.
 */

export const maxPorts = 64;

/** By the number that the programs count them under (enum verdict in bpf/cell.h). */
export const verdicts = [
  "passed",
  "notIpv6",
  "malformed",
  "fragment",
  "extensionHeader",
  "routerAdvertisement",
  "redirect",
  "neighbourDiscovery",
  "icmp",
  "notTcp",
  "spoofedSource",
  "wrongDestination",
  "connectionFromCell",
  "portNotAllowed",
  "noConnection",
  "tooManyConnections",
] as const;
export type Verdict = (typeof verdicts)[number];
export type DropReason = Exclude<Verdict, "passed">;

export interface Counter {
  readonly packets: number;
  readonly bytes: number;
}

export interface DirectionCounters {
  readonly passed: Counter;
  readonly dropped: Readonly<Record<DropReason, Counter>>;
}

export interface CellCounters {
  readonly fromCell: DirectionCounters;
  readonly toCell: DirectionCounters;
}

export interface PolicyEnds {
  readonly address: string;
  readonly gateway: string;
  readonly mac: string;
  readonly gatewayMac: string;
}

/** Loads the cell's own copy of the programs, with no port allowed, and attaches them to both directions of its tap. */
export function police(interfaceIndex: number, ends: PolicyEnds): void {
  withBpfObject(bpfObjectPath(), encodeConfig(ends), (programFd) => {
    attachTraffic(interfaceIndex, "ingress", programFd("from_cell"));
    attachTraffic(interfaceIndex, "egress", programFd("to_cell"));
  });
}

export function isPoliced(interfaceIndex: number): boolean {
  return attachedProgram(interfaceIndex, "ingress") !== undefined && attachedProgram(interfaceIndex, "egress") !== undefined;
}

/** The addresses that the programs were loaded with. */
export function policedAddresses(interfaceIndex: number): { address: string; gateway: string } {
  return withProgram(requireProgram(interfaceIndex), (program) => {
    const config = program.map("rodata").get(Buffer.alloc(4));
    if (config === undefined) throw new ForgeError("INTERNAL", "the cell's eBPF program has lost its configuration");
    return { address: formatAddress(config.subarray(0, 16)), gateway: formatAddress(config.subarray(16, 32)) };
  });
}

/**
 * Replaces the ports that may be connected to. What leaves the set is cut first, open connections included; a port in
 * both sets is never interrupted; at no moment is a port open that is in neither.
 */
export function setPorts(interfaceIndex: number, ports: readonly number[]): void {
  if (ports.length > maxPorts || !ports.every((port) => Number.isInteger(port) && port >= 1 && port <= 65_535)) {
    throw new ForgeError("INVALID_INPUT", `a cell has at most ${maxPorts} ports, numbers from 1 to 65535`);
  }
  withProgram(requireProgram(interfaceIndex), (program) => {
    const map = program.map("ports");
    for (const key of map.keys()) if (!ports.includes(key.readUInt16BE(0))) map.delete(key);
    for (const port of ports) map.set(portKey(port), Buffer.from([1]));
  });
}

/** What passed and what was dropped, and why, since the cell was attached. */
export function countersOf(interfaceIndex: number): CellCounters {
  return withProgram(requireProgram(interfaceIndex), (program) => {
    const read = (index: number): Counter => {
      const key = Buffer.alloc(4);
      key.writeUInt32LE(index);
      return sumCpus(program.map("counters").get(key) ?? Buffer.alloc(0));
    };
    return { fromCell: directionCounters(0, read), toCell: directionCounters(verdicts.length, read) };
  });
}

/** struct cell_config */
export function encodeConfig(ends: PolicyEnds): Buffer {
  const config = Buffer.alloc(48);
  parseAddress(ends.address).copy(config, 0);
  parseAddress(ends.gateway).copy(config, 16);
  macBytes(ends.mac).copy(config, 32);
  macBytes(ends.gatewayMac).copy(config, 40);
  return config;
}

function portKey(port: number): Buffer {
  const key = Buffer.alloc(2);
  key.writeUInt16BE(port);
  return key;
}

function directionCounters(first: number, read: (index: number) => Counter): DirectionCounters {
  const [passed, ...reasons] = verdicts;
  const dropped = Object.fromEntries(reasons.map((reason, index) => [reason, read(first + 1 + index)])) as Record<DropReason, Counter>;
  return { [passed]: read(first), dropped };
}

/** struct counter of each CPU in a row. */
function sumCpus(values: Buffer): Counter {
  let packets = 0n;
  let bytes = 0n;
  for (let offset = 0; offset < values.length; offset += 16) {
    packets += values.readBigUInt64LE(offset);
    bytes += values.readBigUInt64LE(offset + 8);
  }
  return { packets: Number(packets), bytes: Number(bytes) };
}

function requireProgram(interfaceIndex: number): number {
  const id = attachedProgram(interfaceIndex, "ingress");
  if (id === undefined) throw new ForgeError("INTERNAL", "the cell's tap has no policy");
  return id;
}
