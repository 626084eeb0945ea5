import { createHash, randomBytes } from "node:crypto";
import { ForgeError } from "../base/errors.ts";

/**
 * Addresses of the mesh. An installation draws one RFC 4193 /48 at random; 16 bits name the tenant's network and
 * 64 random bits the cell. No bit names a host, so an address survives a move.
 *
 *   fd | 40 random bits | 16 bits tenant network | 64 bits cell identifier
 */

/** MAC of the host's side of every tap: each tap is alone in its network namespace, so one will do. */
export const gatewayMac = "02:f0:00:00:00:01";

/** Ethernet's 1500 less 80 bytes that the mesh's tunnel takes (IPv6 40, UDP 8, WireGuard 32). */
export const linkMtu = 1420;

/** Tenant network 0 is the platform's own: the gateway lives there. */
const platformNetwork = 0;

/** A fresh `fdxx:xxxx:xxxx::/48` with 40 random bits (RFC 4193 section 3.2). */
export function newInstallationPrefix(): string {
  const bytes = Buffer.alloc(16);
  bytes[0] = 0xfd;
  randomBytes(5).copy(bytes, 1);
  return `${formatAddress(bytes)}/48`;
}

/** 64 random bits, 16 hexadecimal digits, never one of the interface identifiers reserved by RFC 5453. */
export function newCellIdentifier(): string {
  for (let attempt = 0; attempt < 8; attempt++) {
    const identifier = randomBytes(8).toString("hex");
    if (!isReservedIdentifier(identifier)) return identifier;
  }
  throw new ForgeError("INTERNAL", "the random number generator returned eight reserved identifiers in a row");
}

/** Canonical text of a cell's address. */
export function cellAddress(prefix: string, tenantNetwork: number, identifier: string): string {
  if (!Number.isInteger(tenantNetwork) || tenantNetwork < 1 || tenantNetwork > 0xffff) {
    throw new ForgeError("INVALID_INPUT", `a tenant network is a number from 1 to 65535, not ${tenantNetwork}`);
  }
  if (!/^[0-9a-f]{16}$/.test(identifier) || isReservedIdentifier(identifier)) {
    throw new ForgeError("INVALID_INPUT", "a cell identifier is 16 lower-case hexadecimal digits and not a reserved interface identifier");
  }
  return compose(prefix, tenantNetwork, Buffer.from(identifier, "hex"));
}

/** The address every cell of the installation knows as its gateway: interface identifier 1 of tenant network 0. */
export function gatewayAddress(prefix: string): string {
  return compose(prefix, platformNetwork, Buffer.from([0, 0, 0, 0, 0, 0, 0, 1]));
}

/** A guest's MAC: 02:f0 (locally administered, unicast), then 32 bits of the cell identifier's hash; never the gateway's. */
export function guestMac(cellId: string): string {
  const hash = createHash("sha256").update(`mac:${cellId}`).digest();
  hash[0] = (hash[0] ?? 0) | 0x80; // the gateway's third byte is 0
  return ["02", "f0", ...hash.subarray(0, 4).toString("hex").match(/../g)!].join(":");
}

/**
 * The 16 bytes of an IPv6 address (RFC 4291 section 2.2, without zone and without embedded IPv4).
 * INVALID_INPUT for anything else.
 */
export function parseAddress(text: string): Buffer {
  const bytes = tryParse(text);
  if (bytes === undefined) throw new ForgeError("INVALID_INPUT", `not an IPv6 address: ${JSON.stringify(text.slice(0, 64))}`);
  return bytes;
}

/** Canonical text (RFC 5952): lower case, no leading zeros, the first longest run of two or more zero groups as `::`. */
export function formatAddress(bytes: Uint8Array): string {
  if (bytes.length !== 16) throw new ForgeError("INVALID_INPUT", `an IPv6 address has 16 bytes, not ${bytes.length}`);
  const view = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
  const groups = Array.from({ length: 8 }, (_, index) => view.readUInt16BE(index * 2));
  const run = longestZeroRun(groups);
  const hex = (part: number[]): string => part.map((group) => group.toString(16)).join(":");
  if (run.length < 2) return hex(groups);
  return `${hex(groups.slice(0, run.start))}::${hex(groups.slice(run.start + run.length))}`;
}

function compose(prefix: string, tenantNetwork: number, identifier: Buffer): string {
  const bytes = parsePrefix(prefix);
  bytes.writeUInt16BE(tenantNetwork, 6);
  identifier.copy(bytes, 8);
  return formatAddress(bytes);
}

/** The bytes of a locally assigned RFC 4193 prefix `fd…::/48`. */
function parsePrefix(prefix: string): Buffer {
  const bytes = prefix.endsWith("/48") ? tryParse(prefix.slice(0, -3)) : undefined;
  if (bytes === undefined || bytes[0] !== 0xfd || bytes.subarray(6).some((byte) => byte !== 0)) {
    throw new ForgeError(
      "INVALID_INPUT",
      `an installation prefix looks like fdxx:xxxx:xxxx::/48, not ${JSON.stringify(prefix.slice(0, 64))}`,
    );
  }
  return bytes;
}

/** RFC 5453: subnet-router anycast (all zero) and the anycast range fdff:ffff:ffff:ff80 to ffff; also our gateway's own. */
function isReservedIdentifier(identifier: string): boolean {
  return identifier === "0000000000000000" || identifier === "0000000000000001" || /^fdffffffffffff[89a-f]/.test(identifier);
}

function tryParse(text: string): Buffer | undefined {
  if (text.length > 39) return undefined;
  const halves = text.split("::");
  if (halves.length > 2) return undefined;
  const [head, tail] = halves.map(parseGroups);
  if (head === undefined || (halves.length === 2 && tail === undefined)) return undefined;
  const missing = 8 - head.length - (tail?.length ?? 0);
  // "::" stands for at least one group (RFC 4291 section 2.2).
  if (halves.length === 1 ? missing !== 0 : missing < 1) return undefined;
  const bytes = Buffer.alloc(16);
  head.forEach((group, index) => bytes.writeUInt16BE(group, index * 2));
  tail?.forEach((group, index) => bytes.writeUInt16BE(group, (8 - tail.length + index) * 2));
  return bytes;
}

function parseGroups(text: string): number[] | undefined {
  if (text === "") return [];
  const parts = text.split(":");
  return parts.every((part) => /^[0-9a-fA-F]{1,4}$/.test(part)) ? parts.map((part) => Number.parseInt(part, 16)) : undefined;
}

function longestZeroRun(groups: readonly number[]): { start: number; length: number } {
  let best = { start: 0, length: 0 };
  for (let start = 0; start < groups.length; start++) {
    let length = 0;
    while (groups[start + length] === 0) length++;
    if (length > best.length) best = { start, length };
  }
  return best;
}
