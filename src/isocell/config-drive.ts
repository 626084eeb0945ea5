import { isIPv6 } from "node:net";
import { crc32 } from "node:zlib";
import { ForgeError } from "../base/errors.ts";

/** Everything the guest's init needs to know, read once from a read-only disk before anything of the image runs. */
export interface GuestConfig {
  readonly cellId: string;
  readonly hostname: string;
  readonly argv: readonly string[];
  readonly env: Readonly<Record<string, string>>;
  readonly cwd: string;
  /** As an OCI config says it: `user`, `uid`, `user:group`, `uid:gid`; empty means root. */
  readonly user: string;
  /** Signal number that asks the entrypoint to stop; 15 unless the image says otherwise. */
  readonly stopSignal: number;
  /** IPv6 address of the cell and of the host's side of its link, without prefix length. */
  readonly address: string;
  readonly gateway: string;
  readonly gatewayMac: string;
  readonly mtu: number;
  /** Bound of what the cell may write over its root file system (in memory); half the memory where absent. */
  readonly overlaySizeMib?: number;
}

export interface VerityParameters {
  /** Hex. */
  readonly rootHash: string;
  /** Hex; empty where the tree has no salt. */
  readonly salt: string;
  /** In blocks of 4096 bytes. */
  readonly dataBlocks: number;
  readonly hashStartBlock: number;
}

/*
 * Layout, little-endian: "FORGECFG", u32 version, u32 length of the body, u32 CRC-32 of the body, then the body:
 * entries of u16 tag, u32 length, value. Strings carry no terminator and hold no NUL. Zero padding to whole sectors.
 * guest/config.c reads it.
 */
const magic = "FORGECFG";
const version = 1;
const headerBytes = 20;
const sectorBytes = 512;
export const maxConfigBytes = 1024 * 1024;

const tags = {
  cellId: 1,
  hostname: 2,
  argument: 3,
  variable: 4,
  cwd: 5,
  user: 6,
  stopSignal: 7,
  address: 8,
  gateway: 9,
  gatewayMac: 10,
  mtu: 11,
  overlaySizeMib: 12,
} as const;

/** The same configuration gives the same bytes: they are part of what a boot's measurement covers. */
export function encodeConfigDrive(config: GuestConfig): Buffer {
  if (config.argv.length === 0)
    throw new ForgeError("INVALID_INPUT", "the cell has no command: neither its image nor its manifest names one");
  const variables = Object.entries(config.env).sort(([a], [b]) => (a < b ? -1 : a > b ? 1 : 0));
  for (const [name] of variables) {
    if (name === "" || name.includes("=")) throw new ForgeError("INVALID_INPUT", `"${name}" is no name for an environment variable`);
  }
  const body = Buffer.concat([
    text(tags.cellId, config.cellId),
    text(tags.hostname, config.hostname),
    ...config.argv.map((argument) => text(tags.argument, argument)),
    ...variables.map(([name, value]) => text(tags.variable, `${name}=${value}`)),
    text(tags.cwd, config.cwd),
    text(tags.user, config.user),
    number(tags.stopSignal, config.stopSignal, 1, 64),
    entry(tags.address, addressBytes(config.address)),
    entry(tags.gateway, addressBytes(config.gateway)),
    entry(tags.gatewayMac, macBytes(config.gatewayMac)),
    number(tags.mtu, config.mtu, 1280, 65_535),
    ...(config.overlaySizeMib === undefined ? [] : [number(tags.overlaySizeMib, config.overlaySizeMib, 1, 1024 * 1024)]),
  ]);
  const drive = Buffer.alloc(Math.ceil((headerBytes + body.length) / sectorBytes) * sectorBytes);
  if (drive.length > maxConfigBytes) throw new ForgeError("TOO_LARGE", `command and environment exceed ${maxConfigBytes} bytes`);
  drive.write(magic, 0, "latin1");
  drive.writeUInt32LE(version, 8);
  drive.writeUInt32LE(body.length, 12);
  drive.writeUInt32LE(crc32(body), 16);
  body.copy(drive, headerBytes);
  return drive;
}

/**
 * The guest kernel's command line. Only failures reach the console (`quiet`); a panic or a reboot ends the VMM at once
 * (triple fault, with the VMM told not to reboot); probes for hardware a microVM never has are left out.
 */
export function guestCommandLine(verity: VerityParameters): string {
  if (!/^[0-9a-f]{64}$/.test(verity.rootHash)) throw new ForgeError("INVALID_INPUT", "the root hash is not 64 hex digits");
  if (!/^(?:[0-9a-f]{2}){0,256}$/.test(verity.salt)) throw new ForgeError("INVALID_INPUT", "the salt is not hex");
  const salt = verity.salt === "" ? "-" : verity.salt;
  return [...kernelOptions, `forge.verity=${verity.rootHash},${salt},${verity.dataBlocks},${verity.hashStartBlock}`].join(" ");
}

/** The crypto self-tests are the kernel's regression tests, not a check of anything the cell depends on. */
const kernelOptions = ["console=ttyS0", "quiet", "panic=-1", "reboot=t", "rdinit=/init", "cryptomgr.notests"] as const;

function entry(tag: number, value: Uint8Array): Buffer {
  const head = Buffer.alloc(6);
  head.writeUInt16LE(tag, 0);
  head.writeUInt32LE(value.length, 2);
  return Buffer.concat([head, value]);
}

function text(tag: number, value: string): Buffer {
  if (value.includes("\0")) throw new ForgeError("INVALID_INPUT", "command, environment, user and folder hold no NUL byte");
  return entry(tag, Buffer.from(value, "utf8"));
}

function number(tag: number, value: number, least: number, most: number): Buffer {
  if (!Number.isInteger(value) || value < least || value > most)
    throw new ForgeError("INVALID_INPUT", `${value} is not within ${least}..${most}`);
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(value);
  return entry(tag, bytes);
}

function macBytes(mac: string): Buffer {
  if (!/^[0-9a-f]{2}(?::[0-9a-f]{2}){5}$/i.test(mac)) throw new ForgeError("INVALID_INPUT", `"${mac}" is no MAC address`);
  return Buffer.from(mac.replaceAll(":", ""), "hex");
}

/** The 16 bytes of an IPv6 address in any of its written forms without zone (RFC 4291 §2.2). */
function addressBytes(address: string): Buffer {
  if (!isIPv6(address) || address.includes("%")) throw new ForgeError("INVALID_INPUT", `"${address}" is no IPv6 address`);
  // The URL parser normalises the dotted IPv4 tail away.
  const [head = "", tail] = new URL(`http://[${address}]`).hostname.slice(1, -1).split("::");
  const groups = (part: string): number[] => (part === "" ? [] : part.split(":").map((group) => Number.parseInt(group, 16)));
  const before = groups(head);
  const after = groups(tail ?? "");
  const bytes = Buffer.alloc(16);
  before.forEach((group, index) => bytes.writeUInt16BE(group, index * 2));
  after.forEach((group, index) => bytes.writeUInt16BE(group, (8 - after.length + index) * 2));
  return bytes;
}
