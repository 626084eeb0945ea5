import { randomBytes } from "node:crypto";

/** Lower-case Crockford base32: no i, l, o, u; sorts like the bytes it encodes. */
const alphabet = "0123456789abcdefghjkmnpqrstvwxyz";

export type IdPrefix = "ten" | "tok" | "svc" | "cell" | "node" | "img" | "evt" | "job" | "ses" | "key";

/**
 * A new identifier `<prefix>_<24 characters>`: 48 bits of milliseconds since the epoch, then 72 random bits.
 * Identifiers made later sort later (to the millisecond).
 */
export function newId(prefix: IdPrefix, nowMs: number = Date.now()): string {
  const bytes = Buffer.alloc(15);
  bytes.writeUIntBE(nowMs, 0, 6);
  randomBytes(9).copy(bytes, 6);
  return `${prefix}_${encodeBase32(bytes)}`;
}

/** Base32 of a whole number of 5-byte groups. */
export function encodeBase32(bytes: Uint8Array): string {
  let out = "";
  let bits = 0;
  let value = 0;
  for (const byte of bytes) {
    value = (value << 8) | byte;
    bits += 8;
    while (bits >= 5) {
      out += alphabet[(value >>> (bits - 5)) & 31];
      bits -= 5;
    }
    value &= (1 << bits) - 1;
  }
  if (bits > 0) out += alphabet[(value << (5 - bits)) & 31];
  return out;
}
