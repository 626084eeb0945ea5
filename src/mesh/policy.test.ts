import { readFileSync } from "node:fs";
import { join } from "node:path";
import fc from "fast-check";
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { attachedProgram, type BpfProgram, testRun, withProgram } from "../base/bpf.ts";
import { inNetns, interfaceIndex } from "../base/linux.ts";
import { gatewayMac, parseAddress } from "./address.ts";
import { updatePolicy, readCounters } from "./attach.ts";
import { buildBpf } from "./bpf/build.ts";
import { ACK, FIN, frame, type FrameOptions, RST, SYN, type TcpOptions } from "./frame.fixture.ts";
import { attachTestCell, type TestCell } from "./guest.fixture.ts";
import { maxPorts, type PolicyEnds, type Verdict, verdicts } from "./policy.ts";
import { PolicyModel, type Side } from "./policy.model.ts";

let cell: TestCell;
let ends: PolicyEnds;
let programIds: Record<Side, number>;

beforeAll(async () => {
  await buildBpf();
  cell = attachTestCell([80, 443]);
  const { address, gateway, guestMac, netnsPath } = cell.attachment;
  ends = { address, gateway, mac: guestMac, gatewayMac };
  programIds = inNetns(netnsPath, () => {
    const index = interfaceIndex("tap0")!;
    return { cell: attachedProgram(index, "ingress")!, gateway: attachedProgram(index, "egress")! };
  });
});
afterAll(async () => await cell[Symbol.asyncDispose]());
beforeEach(() => reset());

test("the names of verdicts are those of the C header", () => {
  const header = readFileSync(join(import.meta.dirname, "bpf/cell.h"), "utf8");
  const names = [...header.matchAll(/^\t([A-Z0-9_]+) = (\d+),/gm)].filter(([, name]) => !/^(FROM_CELL|TO_CELL|VERDICTS)$/.test(name!));
  const camel = (name: string): string => name.toLowerCase().replace(/_([a-z0-9])/g, (_, letter: string) => letter.toUpperCase());
  expect(names.map(([, name, number]) => [Number(number), camel(name!)])).toEqual([...verdicts.entries()]);
  expect(header).toContain(`#define MAX_PORTS ${maxPorts}\n`);
  expect(header).toContain(`VERDICTS = ${verdicts.length},`);
});

describe("from the cell", () => {
  const stranger = "2001:db8::1";
  const segment: TcpOptions = { sourcePort: 80, destinationPort: 5000, flags: ACK };
  const icmp = (type: number): Partial<FrameOptions> => ({ nextHeader: 58, body: Buffer.from([type, 0, 0, 0, 0, 0, 0, 0]) });
  const cases: [string, Verdict, Partial<FrameOptions>][] = [
    ["a router advertisement", "routerAdvertisement", { ...icmp(134), source: "fe80::1", destination: "ff02::1" }],
    ["a router advertisement in its own name", "routerAdvertisement", icmp(134)],
    ["a router solicitation", "neighbourDiscovery", icmp(133)],
    ["a neighbour solicitation", "neighbourDiscovery", icmp(135)],
    ["a neighbour advertisement", "neighbourDiscovery", icmp(136)],
    ["a redirect", "redirect", icmp(137)],
    ["an echo request", "icmp", icmp(128)],
    ["a packet too big", "icmp", icmp(2)],
    [
      "an MLDv2 report behind its hop-by-hop header",
      "extensionHeader",
      { nextHeader: 0, body: Buffer.from([58, 0, 5, 2, 0, 0, 1, 0, 143, 0, 0, 0]) },
    ],
    ["a routing header", "extensionHeader", { nextHeader: 43, body: Buffer.alloc(24) }],
    ["destination options", "extensionHeader", { nextHeader: 60, body: Buffer.alloc(24) }],
    ["a fragment", "fragment", { nextHeader: 44, body: Buffer.alloc(28) }],
    ["DNS over UDP", "notTcp", { nextHeader: 17, body: Buffer.alloc(20) }],
    ["IPv4", "notIpv6", { etherType: 0x0800 }],
    ["ARP", "notIpv6", { etherType: 0x0806 }],
    ["a VLAN tag", "notIpv6", { etherType: 0x8100 }],
    ["another source address", "spoofedSource", { source: stranger }],
    ["the gateway's source address", "spoofedSource", { source: "::1" }],
    ["another source MAC", "spoofedSource", { sourceMac: "02:f0:00:00:00:09" }],
    ["another destination", "wrongDestination", { destination: stranger }],
    ["another destination MAC", "wrongDestination", { destinationMac: "33:33:00:00:00:01" }],
    ["a wrong version", "malformed", { version: 4 }],
    ["a length beyond the frame", "malformed", { payloadLength: 400 }],
    ["bytes behind the packet", "malformed", { payloadLength: 8 }],
    ["a TCP header cut short", "malformed", { body: Buffer.alloc(19) }],
    ["a TCP header shorter than TCP's", "malformed", { tcp: { ...segment, headerWords: 4 } }],
    ["TCP options beyond the packet", "malformed", { tcp: { ...segment, headerWords: 6 } }],
    ["no TCP flags at all", "malformed", { tcp: { ...segment, flags: 0 } }],
    ["SYN with FIN", "malformed", { tcp: { ...segment, flags: SYN | FIN } }],
    ["SYN with RST", "malformed", { tcp: { ...segment, flags: SYN | RST | ACK } }],
    ["a connection of its own", "connectionFromCell", { tcp: { ...segment, sourcePort: 40000, destinationPort: 22, flags: SYN } }],
    ["a connection of its own from an allowed port", "connectionFromCell", { tcp: { ...segment, flags: SYN } }],
    ["a port that is not allowed", "portNotAllowed", { tcp: { ...segment, sourcePort: 22 } }],
    ["no connection", "noConnection", {}],
    ["an answer to nobody", "noConnection", { tcp: { ...segment, flags: SYN | ACK } }],
    ["a reset to nobody", "noConnection", { tcp: { ...segment, flags: RST } }],
  ];
  test.each(cases)("%s is dropped as %s", (_name, verdict, wrong) => {
    expect(send("cell", packet("cell", segment, wrong))).toBe(verdict);
  });
});

describe("towards the cell", () => {
  const open: TcpOptions = { sourcePort: 5000, destinationPort: 80, flags: SYN };
  const cases: [string, Verdict, Partial<FrameOptions>][] = [
    ["a port that is not allowed", "portNotAllowed", { tcp: { ...open, destinationPort: 22 } }],
    ["another source than the gateway", "spoofedSource", { source: "2001:db8::1" }],
    ["another destination", "wrongDestination", { destination: "2001:db8::1" }],
    ["neighbour discovery", "neighbourDiscovery", { nextHeader: 58, body: Buffer.from([135, 0, 0, 0]) }],
    ["UDP", "notTcp", { nextHeader: 17 }],
    ["an answer to a connection of the cell's", "connectionFromCell", { tcp: { ...open, flags: SYN | ACK } }],
    ["no connection", "noConnection", { tcp: { ...open, flags: ACK } }],
  ];
  test.each(cases)("%s is dropped as %s", (_name, verdict, wrong) => {
    expect(send("gateway", packet("gateway", open, wrong))).toBe(verdict);
  });
});

describe("a connection", () => {
  test("passes both ways from SYN to the acknowledgement of both FINs, and not after", () => {
    expect(exchange("gateway", SYN, 100, 0)).toBe("passed");
    expect(exchange("cell", SYN | ACK, 500, 101)).toBe("passed");
    expect(exchange("gateway", ACK, 101, 501, 10)).toBe("passed");
    expect(exchange("gateway", FIN | ACK, 111, 501, 5)).toBe("passed");
    expect(exchange("cell", ACK, 501, 117, 20)).toBe("passed");
    expect(exchange("gateway", ACK, 117, 521)).toBe("passed");
    expect(exchange("cell", FIN | ACK, 521, 117)).toBe("passed");
    expect(connectionCount()).toBe(1);
    expect(exchange("gateway", ACK, 117, 522)).toBe("passed");
    expect(connectionCount()).toBe(0);
    expect(exchange("cell", ACK, 522, 117)).toBe("noConnection");
  });

  test.each(["cell", "gateway"] as const)("ends with an RST of the %s, which still passes", (side) => {
    exchange("gateway", SYN, 0, 0);
    expect(exchange(side, RST, 0, 0)).toBe("passed");
    expect(exchange("cell", ACK, 0, 0)).toBe("noConnection");
  });

  test("is cut when its port leaves the policy, and lives on when it stays", () => {
    exchange("gateway", SYN, 0, 0);
    updatePolicy(cell.attachment.cellId, [80, 8080], cell.stateDir);
    expect(exchange("cell", ACK, 0, 0)).toBe("passed");
    updatePolicy(cell.attachment.cellId, [443], cell.stateDir);
    expect(exchange("cell", ACK, 0, 0)).toBe("portNotAllowed");
    expect(exchange("gateway", ACK, 0, 0)).toBe("portNotAllowed");
  });

  test.each([
    ["opening", 3.9, false, 0, "passed"],
    ["opening", 4.1, false, 0, "noConnection"],
    ["established", 123.9, true, 0, "passed"],
    ["established", 124.1, true, 0, "noConnection"],
    ["closing", 3.9, true, 1, "passed"],
    ["closing", 4.1, true, 1, "noConnection"],
  ] as const)("that is %s and idle for %s minutes", (_state, minutes, established, fin, verdict) => {
    withProgram(programIds.cell, (program) => insert(program, 5000, minutes, { established, fin: fin === 1 }));
    expect(exchange("cell", ACK, 0, 0)).toBe(verdict);
    expect(connectionCount()).toBe(verdict === "passed" ? 1 : 0);
  });

  test("is never evicted: a full table refuses new ones until old ones have expired", () => {
    const opening = (port: number): Verdict => send("gateway", packet("gateway", { sourcePort: port, destinationPort: 80, flags: SYN }));
    withProgram(programIds.gateway, (program) => {
      for (let port = 1; port <= 4096; port++) insert(program, port, 1, { established: true, fin: false });
      program.map("bss").set(Buffer.alloc(4), Buffer.alloc(8));
      expect(opening(5000)).toBe("tooManyConnections");
      for (let port = 1; port <= 100; port++) insert(program, port, 130, { established: true, fin: false });
      expect(opening(5000)).toBe("tooManyConnections"); // swept less than a second ago
      program.map("bss").set(Buffer.alloc(4), Buffer.alloc(8));
      expect(opening(5000)).toBe("passed");
      expect(connectionCount()).toBe(4096 - 100 + 1);
      expect(send("cell", packet("cell", { sourcePort: 80, destinationPort: 4096, flags: ACK }))).toBe("passed");
    });
  });
});

describe("any sequence of frames", () => {
  const side = fc.constantFrom<Side>("cell", "gateway");
  const wrong = fc.record({
    sourceMac: rarelyWrong(fc.constantFrom("02:f0:00:00:00:02", "ff:ff:ff:ff:ff:ff")),
    destinationMac: rarelyWrong(fc.constantFrom("33:33:00:00:00:01", "ff:ff:ff:ff:ff:ff")),
    etherType: rarelyWrong(fc.constantFrom(0x0800, 0x0806, 0x8100, 0x88a8)),
    version: rarelyWrong(fc.constantFrom(0, 4, 7)),
    source: rarelyWrong(fc.constantFrom("::", "fe80::1", "2001:db8::1")),
    destination: rarelyWrong(fc.constantFrom("ff02::1", "::1", "2001:db8::1")),
    nextHeader: rarelyWrong(fc.oneof(fc.integer({ min: 0, max: 255 }), fc.constantFrom(0, 17, 43, 44, 58))),
    payloadLength: rarelyWrong(fc.integer({ min: 0, max: 65_535 })),
    body: rarelyWrong(fc.uint8Array({ maxLength: 60 }).map((bytes) => Buffer.from(bytes))),
  });
  const tcp = fc.record({
    cellPort: fc.constantFrom(80, 80, 80, 80, 80, 80, 443, 22),
    remotePort: fc.constantFrom(5000, 5000, 5000, 5000, 5001),
    flags: fc.oneof(fc.constantFrom(SYN, SYN | ACK, ACK, ACK, FIN | ACK, FIN | ACK, RST), fc.integer({ min: 0, max: 255 })),
    // Few numbers, so that acknowledgements often meet the FIN they are for.
    sequence: fc.constantFrom(0, 0, 0, 0xffffffff),
    acknowledgement: fc.constantFrom(0, 1, 1, 1, 2),
    payloadBytes: fc.constantFrom(0, 0, 0, 1),
    headerWords: fc.constantFrom(5, 5, 5, 5, 5, 5, 4, 6, 15),
  });
  const crafted = fc.tuple(side, tcp, wrong).map(([sender, { cellPort, remotePort, ...segment }, mistakes]) => {
    const [sourcePort, destinationPort] = sender === "cell" ? [cellPort, remotePort] : [remotePort, cellPort];
    const present = Object.fromEntries(Object.entries(mistakes).filter(([, value]) => value !== undefined));
    return { sender, segment: { ...segment, sourcePort, destinationPort }, mistakes: present };
  });
  const noise = fc
    .tuple(side, fc.uint8Array({ minLength: 14, maxLength: 120 }))
    .map(([sender, bytes]) => ({ sender, bytes: Buffer.from(bytes) }));
  const step = fc.oneof(
    { weight: 12, arbitrary: crafted },
    { weight: 1, arbitrary: noise },
    { weight: 1, arbitrary: fc.subarray([22, 80, 443]).map((ports) => ({ ports })) },
  );

  test("is judged as the model judges it, and leaves the same connections", { timeout: 60_000 }, () => {
    fc.assert(
      fc.property(fc.array(step, { minLength: 1, maxLength: 40 }), (steps) => {
        reset();
        const model = new PolicyModel(ends, new Set([80, 443]));
        for (const each of steps) {
          if ("ports" in each) {
            updatePolicy(cell.attachment.cellId, each.ports, cell.stateDir);
            model.ports = new Set(each.ports);
            continue;
          }
          const bytes = "bytes" in each ? each.bytes : packet(each.sender, each.segment, each.mistakes);
          expect(send(each.sender, bytes)).toBe(model.judge(each.sender, bytes));
        }
        expect(connectionKeys()).toEqual([...model.connections.keys()].toSorted());
      }),
      { numRuns: 300 },
    );
  });
});

function rarelyWrong<T>(value: fc.Arbitrary<T>): fc.Arbitrary<T | undefined> {
  return fc.oneof({ weight: 19, arbitrary: fc.constant(undefined) }, { weight: 1, arbitrary: value });
}

function packet(sender: Side, tcp: TcpOptions, wrong: Partial<FrameOptions> = {}): Buffer {
  const [source, destination] = sender === "cell" ? [ends.address, ends.gateway] : [ends.gateway, ends.address];
  const [sourceMac, destinationMac] = sender === "cell" ? [ends.mac, ends.gatewayMac] : [ends.gatewayMac, ends.mac];
  return frame({ source, destination, sourceMac, destinationMac, tcp, ...wrong });
}

/** One segment between the gateway's port 5000 and the cell's port 80. */
function exchange(sender: Side, flags: number, sequence: number, acknowledgement: number, payloadBytes = 0): Verdict {
  const [sourcePort, destinationPort] = sender === "cell" ? [80, 5000] : [5000, 80];
  return send(sender, packet(sender, { sourcePort, destinationPort, flags, sequence, acknowledgement, payloadBytes }));
}

/** Runs the program of the direction on a frame; the verdict is the counter that moved, and must agree with pass or drop. */
function send(sender: Side, bytes: Buffer): Verdict {
  const TC_ACT_OK = 0;
  const before = counts(sender);
  const { verdict: action } = withProgram(programIds[sender], (program) => testRun(program.fd, bytes));
  const moved = [...counts(sender).entries()].filter(([index, count]) => count !== before[index]);
  expect(moved).toHaveLength(1);
  const [index] = moved[0]!;
  expect(action === TC_ACT_OK).toBe(index === 0);
  return verdicts[index]!;
}

function counts(sender: Side): number[] {
  const counters = readCounters(cell.attachment.cellId, cell.stateDir)[sender === "cell" ? "fromCell" : "toCell"];
  return [counters.passed, ...Object.values(counters.dropped)].map((counter) => counter.packets);
}

function reset(): void {
  updatePolicy(cell.attachment.cellId, [80, 443], cell.stateDir);
  withProgram(programIds.cell, (program) => {
    const connections = program.map("connections");
    for (const key of connections.keys()) connections.delete(key);
  });
}

function connectionKeys(): string[] {
  const keys = withProgram(programIds.cell, (program) => program.map("connections").keys());
  return keys.map((key) => `${key.readUInt16BE(16)} ${key.readUInt16BE(18)}`).toSorted();
}

function connectionCount(): number {
  return connectionKeys().length;
}

/** A connection of the gateway's port with the cell's port 80, last seen some minutes ago. */
function insert(program: BpfProgram, remotePort: number, minutesAgo: number, state: { established: boolean; fin: boolean }): void {
  const key = Buffer.alloc(20);
  parseAddress(ends.gateway).copy(key, 0);
  key.writeUInt16BE(remotePort, 16);
  key.writeUInt16BE(80, 18);
  const value = Buffer.alloc(24);
  value.writeBigUInt64LE(BigInt.asUintN(64, process.hrtime.bigint() - BigInt(Math.round(minutesAgo * 60e9))), 0);
  value[16] = state.fin ? 1 : 0;
  value[20] = state.established ? 1 : 0;
  program.map("connections").set(key, value);
}
