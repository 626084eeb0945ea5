import { execFile, spawn } from "node:child_process";
import { once } from "node:events";
import {
  closeSync,
  existsSync,
  mkdirSync,
  mkdtempSync,
  readdirSync,
  readFileSync,
  readlinkSync,
  rmSync,
  writeFileSync,
  writeSync,
} from "node:fs";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { promisify } from "node:util";
import { afterAll, afterEach, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { createNetns, inNetns, interfaceIndex, openTap, removeNetns } from "../base/linux.ts";
import { cellAddress, gatewayAddress, newCellIdentifier, newInstallationPrefix } from "./address.ts";
import { attach, type AttachOptions, detach, listAttachments, readCounters, recover, updatePolicy } from "./attach.ts";
import { buildBpf } from "./bpf/build.ts";
import { ACK, frame, type FrameOptions, SYN } from "./frame.fixture.ts";
import { attachTestCell, type TestCell } from "./guest.fixture.ts";
import type { Counter, DropReason } from "./policy.ts";

let stateDir: string;
let namespaceBefore: string;

beforeAll(async () => {
  await buildBpf();
});
beforeEach(() => {
  stateDir = mkdtempSync(join(tmpdir(), "forge-attach-"));
  namespaceBefore = currentNamespace();
});
afterEach(() => {
  for (const cellId of listAttachments(stateDir)) detach(cellId, stateDir);
  expectNothingLeft();
  rmSync(stateDir, { recursive: true });
});

describe("an attached cell's namespace", () => {
  test("holds one quiet tap and nothing else", async () => {
    const { netnsPath } = attach(optionsOf("cell_quiet"));
    const [lo, tap = {}, ...others] = await ipJson(netnsPath, ["address"]);
    expect(others).toEqual([]);
    expect(lo).toMatchObject({ ifname: "lo", flags: ["LOOPBACK"], addr_info: [] });
    expect(tap).toMatchObject({ ifname: "tap0", address: "02:f0:00:00:00:01", mtu: 1420, flags: expect.arrayContaining(["UP"]) });
    expect(tap["addr_info"]).toMatchObject([{ local: optionsOf("cell_quiet").gateway, prefixlen: 128, scope: "global" }]);
    const destinations = (await ipJson(netnsPath, ["-6", "route"])).map((route) => route["dst"]);
    expect(new Set(destinations)).toEqual(new Set([gatewayAddress(prefix), address]));
    expect(await ipJson(netnsPath, ["-4", "route"])).toEqual([]);
    for (const name of ["accept_ra", "forwarding", "accept_redirects", "autoconf"]) {
      expect([name, inNetns(netnsPath, () => readFileSync(`/proc/sys/net/ipv6/conf/tap0/${name}`, "utf8"))]).toEqual([name, "0\n"]);
    }
  });

  test("lets nothing out that the host's side sends of itself", () => {
    attach(optionsOf("cell_mute"));
    expect(readCounters("cell_mute", stateDir).toCell.passed.packets).toBe(0);
  });
});

describe("a hostile guest", () => {
  let cell: TestCell;
  let tap: number;
  let before: Record<DropReason, Counter>;
  beforeAll(() => {
    cell = attachTestCell([80]);
    tap = cell.attachment.openTap();
  });
  beforeEach(() => {
    before = dropsOf(cell);
  });
  afterAll(async () => {
    closeSync(tap);
    await cell[Symbol.asyncDispose]();
  });

  const icmp = (type: number): Partial<FrameOptions> => ({
    nextHeader: 58,
    body: Buffer.from([type, 0, 0, 0, 64, 0, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0]),
  });
  const syn = { sourcePort: 40_000, destinationPort: 7443, flags: SYN };
  const attacks: [string, DropReason, Partial<FrameOptions>][] = [
    [
      "a router advertisement",
      "routerAdvertisement",
      { ...icmp(134), source: "fe80::1", destination: "ff02::1", destinationMac: "33:33:00:00:00:01" },
    ],
    ["a redirect", "redirect", icmp(137)],
    ["a neighbour advertisement for the gateway", "neighbourDiscovery", icmp(136)],
    ["a ping of the gateway", "icmp", icmp(128)],
    ["a connection to the gateway", "connectionFromCell", { tcp: syn }],
    ["a connection to the outside", "wrongDestination", { tcp: syn, destination: "2001:db8::1" }],
    ["a spoofed source", "spoofedSource", { tcp: { ...syn, flags: ACK }, source: "2001:db8::1" }],
    ["a spoofed MAC", "spoofedSource", { tcp: { ...syn, flags: ACK }, sourceMac: "02:f0:12:34:56:78" }],
    ["a DNS question to the gateway", "notTcp", { nextHeader: 17, body: Buffer.alloc(40) }],
    ["a DNS question to the outside", "notTcp", { nextHeader: 17, body: Buffer.alloc(40), destination: "2001:db8::53" }],
    ["a fragment", "fragment", { nextHeader: 44, body: Buffer.alloc(40) }],
    ["an extension header", "extensionHeader", { nextHeader: 60, body: Buffer.alloc(40) }],
    ["ARP", "notIpv6", { etherType: 0x0806 }],
    ["IPv4", "notIpv6", { etherType: 0x0800, version: 4 }],
    ["a segment of no connection", "noConnection", { tcp: { sourcePort: 80, destinationPort: 40_000, flags: ACK } }],
  ];
  test.each(attacks)("does not get %s past the tap", (_name, reason, wrong) => {
    inject(tap, craft(cell, wrong));
    expectStopped(cell, before, { [reason]: 1 });
  });

  test("does not get a right packet inside a VLAN tag past the tap", () => {
    const bytes = craft(cell, { tcp: { sourcePort: 80, destinationPort: 40_000, flags: ACK } });
    inject(tap, Buffer.concat([bytes.subarray(0, 12), Buffer.from([0x81, 0x00, 0x00, 0x05]), bytes.subarray(12)]));
    expectStopped(cell, before, { notIpv6: 1 });
  });

  test("does not get its whole vocabulary past the tap, sent 100 times over", () => {
    const expected: Partial<Record<DropReason, number>> = {};
    for (const [, reason, wrong] of attacks) {
      for (let round = 0; round < 100; round++) inject(tap, craft(cell, wrong));
      expected[reason] = (expected[reason] ?? 0) + 100;
    }
    expectStopped(cell, before, expected);
  });
});

describe("a policy", () => {
  test("is refused with too many or impossible ports, and the old one stays", () => {
    expect(() => attach({ ...optionsOf("cell_p"), allow: { ports: [0] } })).toThrow(expect.objectContaining({ code: "INVALID_INPUT" }));
    expect(listAttachments(stateDir)).toEqual([]);
    attach(optionsOf("cell_p"));
    const tooMany = Array.from({ length: 65 }, (_, index) => index + 1);
    expect(() => updatePolicy("cell_p", tooMany, stateDir)).toThrow(expect.objectContaining({ code: "INVALID_INPUT" }));
    expect(() => updatePolicy("cell_q", [80], stateDir)).toThrow(expect.objectContaining({ code: "NOT_FOUND" }));
  });
});

describe("attach and detach", () => {
  test("refuse a second attachment and a name that leaves the folder", () => {
    attach(optionsOf("cell_a"));
    expect(() => attach(optionsOf("cell_a"))).toThrow(expect.objectContaining({ code: "CONFLICT" }));
    expect(listAttachments(stateDir)).toEqual(["cell_a"]);
    expect(() => attach(optionsOf("../cell"))).toThrow(expect.objectContaining({ code: "INVALID_INPUT" }));
  });

  test("fail closed: without the compiled policy nothing is left", () => {
    const before = process.env["FORGE_BUILD_DIR"];
    process.env["FORGE_BUILD_DIR"] = stateDir;
    try {
      expect(() => attach(optionsOf("cell_a"))).toThrow(/bpf_object__open_file failed: ENOENT/);
    } finally {
      if (before === undefined) delete process.env["FORGE_BUILD_DIR"];
      else process.env["FORGE_BUILD_DIR"] = before;
    }
    expect(listAttachments(stateDir)).toEqual([]);
  });

  test("cut off a VMM that still holds the tap, are idempotent, and never make a tap without policy", () => {
    const attachment = attach(optionsOf("cell_a"));
    const tap = attachment.openTap();
    try {
      expect(() => attachment.openTap()).toThrow(/EBUSY/);
      detach("cell_a", stateDir);
      detach("cell_a", stateDir);
      expect(() => writeSync(tap, Buffer.alloc(64))).toThrow();
      expect(() => attachment.openTap()).toThrow();
    } finally {
      closeSync(tap);
    }
    const again = attach(optionsOf("cell_a"));
    closeSync(again.openTap());
    expect(readdirSync(stateDir)).toEqual(["netns"]);
    detach("cell_a", stateDir);
    expect(readdirSync(stateDir)).toEqual([]);
  });

  test("leave nothing behind after many rounds", () => {
    const files = readdirSync("/proc/self/fd").length;
    for (let round = 0; round < 20; round++) {
      attach(optionsOf(`cell_${round % 3}`));
      readCounters(`cell_${round % 3}`, stateDir);
      detach(`cell_${round % 3}`, stateDir);
    }
    expect(readdirSync(stateDir)).toEqual([]);
    expect(readdirSync("/proc/self/fd").length).toBe(files);
  });
});

describe("after a kill of the agent", () => {
  test("whole attachments are found again as they were, and still policed", async () => {
    const options = optionsOf("cell_kept");
    const program = `
      import { attach } from ${JSON.stringify(join(import.meta.dirname, "attach.ts"))};
      attach(JSON.parse(process.argv[1]));
      process.kill(process.pid, "SIGKILL");`;
    const child = spawn(process.execPath, ["--input-type=module-typescript", "-e", program, JSON.stringify(options)], { stdio: "inherit" });
    expect((await once(child, "exit"))[1]).toBe("SIGKILL");
    const [attachment, ...others] = recover(stateDir);
    expect(others).toEqual([]);
    expect(attachment).toMatchObject({ cellId: "cell_kept", address: options.address, gateway: options.gateway });
    const tap = attachment!.openTap();
    writeSync(tap, Buffer.concat([Buffer.alloc(10), Buffer.alloc(64)]));
    closeSync(tap);
    expect(readCounters("cell_kept", stateDir).fromCell.dropped.notIpv6.packets).toBe(1);
  });

  test("half-made attachments are undone", () => {
    mkdirSync(join(stateDir, "netns"));
    writeFileSync(join(stateDir, "netns/cell_file"), "");
    createNetns(join(stateDir, "netns/cell_empty"), () => undefined);
    createNetns(join(stateDir, "netns/cell_unpoliced"), () => closeSync(openTap("tap0", { persist: true })));
    attach(optionsOf("cell_whole"));
    expect(recover(stateDir).map(({ cellId }) => cellId)).toEqual(["cell_whole"]);
    expect(listAttachments(stateDir)).toEqual(["cell_whole"]);
    expect(existsSync(join(stateDir, "netns/cell_unpoliced"))).toBe(false);
  });
});

test("the way back from a namespace holds when the body throws", () => {
  const path = join(stateDir, "somewhere");
  createNetns(path, () => undefined);
  expect(() =>
    inNetns(path, () => {
      expect(currentNamespace()).not.toBe(namespaceBefore);
      throw new Error("in there");
    }),
  ).toThrow("in there");
  expect(currentNamespace()).toBe(namespaceBefore);
  expect(inNetns(path, () => interfaceIndex("tap0"))).toBeUndefined();
  removeNetns(path);
});

const prefix = newInstallationPrefix();
const address = cellAddress(prefix, 1, newCellIdentifier());

function optionsOf(cellId: string): AttachOptions {
  return { cellId, address, gateway: gatewayAddress(prefix), allow: { ports: [80] }, stateDir };
}

/** A frame that a guest sends, right but for what is asked. */
function craft({ attachment }: TestCell, wrong: Partial<FrameOptions>): Buffer {
  const { address: source, gateway: destination, guestMac: sourceMac, gatewayMac: destinationMac } = attachment;
  return frame({ source, destination, sourceMac, destinationMac, ...wrong });
}

/** Sends a frame as the VMM does: behind an empty virtio-net header. */
function inject(tap: number, bytes: Buffer): void {
  writeSync(tap, Buffer.concat([Buffer.alloc(10), bytes]));
}

function expectStopped(cell: TestCell, before: Record<DropReason, Counter>, expected: Partial<Record<DropReason, number>>): void {
  const counted = Object.entries(dropsOf(cell)).map(
    ([reason, { packets }]) => [reason, packets - before[reason as DropReason].packets] as const,
  );
  expect(Object.fromEntries(counted.filter(([, packets]) => packets > 0))).toEqual(expected);
  expect(readCounters(cell.attachment.cellId, cell.stateDir).fromCell.passed.packets).toBe(0);
  expect(receivedByStack(cell)).toBe(0);
}

function dropsOf(cell: TestCell): Record<DropReason, Counter> {
  return readCounters(cell.attachment.cellId, cell.stateDir).fromCell.dropped;
}

/** IPv6 packets that reached the network stack behind the tap. */
function receivedByStack({ attachment }: TestCell): number {
  const statistics = inNetns(attachment.netnsPath, () => readFileSync("/proc/thread-self/net/snmp6", "utf8"));
  return Number(/^Ip6InReceives\s+(\d+)$/m.exec(statistics)?.[1]);
}

async function ipJson(netnsPath: string, args: readonly string[]): Promise<Record<string, unknown>[]> {
  const { stdout } = await promisify(execFile)("nsenter", [`--net=${netnsPath}`, "ip", "-json", ...args]);
  return JSON.parse(stdout || "[]") as Record<string, unknown>[];
}

function expectNothingLeft(): void {
  expect(currentNamespace()).toBe(namespaceBefore);
  expect(readFileSync("/proc/self/mountinfo", "utf8")).not.toContain(stateDir);
}

function currentNamespace(): string {
  return readlinkSync("/proc/thread-self/ns/net");
}
