import { createHash, createPublicKey, type KeyObject, verify } from "node:crypto";
import { setImmediate as yieldToOthers } from "node:timers/promises";
import { z } from "zod";
import { ForgeError } from "../base/errors.ts";
import { canonicalJson, isCanonicalJson } from "./canonical.ts";
import { type AuditEvent, auditEventSchema } from "./event.ts";
import type { Signer } from "./signer.ts";

/** Where a chain ends: its last entry's number and hash. */
export interface Head {
  readonly sequence: number;
  readonly hash: string;
}

/** The head of a chain without entries; the first entry has sequence 1. */
export const genesis: Head = { sequence: 0, hash: "0".repeat(64) };

/** An event's canonical JSON may not be larger. */
export const maxEventBytes = 64 * 1024;

const hexHash = z.string().regex(/^[0-9a-f]{64}$/);

/** One link: `hash` covers sequence, previous and event; `signature` (base64, Ed25519) covers the hash. */
export const chainEntrySchema = z.strictObject({
  sequence: z.int().min(1),
  previous: hexHash,
  /** Canonical JSON (RFC 8785) of the event, exactly as hashed. */
  event: z.string(),
  hash: hexHash,
  signature: z.string().regex(/^[A-Za-z0-9+/]{85}[AQgw]==$/), // 64 bytes, the one base64 form: unused bits are zero
});
export type ChainEntry = z.infer<typeof chainEntrySchema>;

/** The entry that carries `event` right after `head`. Invalid events are refused with INVALID_INPUT. */
export function linkEntry(head: Head, event: AuditEvent, signer: Signer): ChainEntry {
  return linkText(head, eventText(event), signer);
}

/** The same for a text that eventText made. */
export function linkText(head: Head, text: string, signer: Signer): ChainEntry {
  const link = { sequence: head.sequence + 1, previous: head.hash, event: text };
  const hash = hashLink(link);
  return { ...link, hash: hash.toString("hex"), signature: signer.sign(hash).toString("base64") };
}

/** The event's canonical text; refuses what the log does not take. */
export function eventText(event: AuditEvent): string {
  const parsed = auditEventSchema.safeParse(event);
  if (!parsed.success) throw new ForgeError("INVALID_INPUT", `not an audit event: ${z.prettifyError(parsed.error)}`);
  const text = canonicalJson(parsed.data);
  if (Buffer.byteLength(text) > maxEventBytes)
    throw new ForgeError("TOO_LARGE", `an audit event of more than ${maxEventBytes} bytes: ${event.kind}`);
  return text;
}

export type ChainProblem =
  | "malformed" // not an entry at all
  | "gap" // one or more entries are missing before this one
  | "reordered" // this entry stands before one that belongs in front of it
  | "duplicate" // this entry's number was already seen
  | "broken link" // it does not follow from the entry before it
  | "altered event" // event or hash changed: they no longer belong together
  | "non-canonical event" // correctly hashed, yet not in the one allowed form
  | "bad signature" // this entry alone is not signed by the key
  | "foreign key" // from here on, another key signed
  | "truncated" // the chain ends before the head that is known to have existed
  | "diverged"; // the entry at the known head is another one than it was

export interface ChainReport {
  readonly ok: boolean;
  /** How many entries were found good, from the start. */
  readonly entries: number;
  /** The last good entry. */
  readonly head: Head;
  readonly firstBad: { readonly sequence: number; readonly problem: ChainProblem } | null;
}

/**
 * Checks entries one after the other and stops at the first bad one. `expected` is a head known from elsewhere (a
 * backup, a witness, a peer): without it, a chain cut at its end cannot be told from a shorter one. `from` is where
 * the entries begin, for a part of a chain.
 */
export async function verifyChain(
  entries: AsyncIterable<unknown> | Iterable<unknown>,
  publicKeyPem: string,
  expected?: Head,
  from: Head = genesis,
): Promise<ChainReport> {
  const key = createPublicKey(publicKeyPem);
  let head = from;
  let count = 0;
  const bad = (problem: ChainProblem, sequence = head.sequence + 1): ChainReport => ({
    ok: false,
    entries: count,
    head,
    firstBad: { sequence, problem },
  });

  for await (const { entry, following } of withFollowing(entries)) {
    if (entry === undefined) return bad("malformed");
    const problem = checkEntry(entry, head, following, key);
    if (problem !== undefined) return bad(problem, entry.sequence);
    if (entry.sequence === expected?.sequence && entry.hash !== expected.hash) return bad("diverged", entry.sequence);
    head = { sequence: entry.sequence, hash: entry.hash };
    count++;
    if (count % 64 === 0) await yieldToOthers(); // a long chain must not hold up the process that checks it
  }
  if (expected !== undefined && head.sequence < expected.sequence) return bad("truncated");
  return { ok: true, entries: count, head, firstBad: null };
}

/** Each entry (undefined: malformed) with the one after it, which tells a swap from a gap and one bad signature from another key. */
async function* withFollowing(
  candidates: AsyncIterable<unknown> | Iterable<unknown>,
): AsyncGenerator<{ entry: ChainEntry | undefined; following: ChainEntry | undefined }> {
  let waiting: { entry: ChainEntry | undefined } | undefined;
  for await (const candidate of candidates) {
    const entry = chainEntrySchema.safeParse(candidate).data;
    if (waiting !== undefined) yield { entry: waiting.entry, following: entry };
    waiting = { entry };
  }
  if (waiting !== undefined) yield { entry: waiting.entry, following: undefined };
}

/** What is wrong with this entry as the one after `head`, or undefined. */
function checkEntry(entry: ChainEntry, head: Head, following: ChainEntry | undefined, key: KeyObject): ChainProblem | undefined {
  const next = head.sequence + 1;
  if (entry.sequence < next) return "duplicate";
  if (entry.sequence > next) return following?.sequence === next ? "reordered" : "gap";
  const linkProblem = checkLink(entry, head);
  if (linkProblem !== undefined) return linkProblem;
  if (!isCanonicalJson(entry.event)) return "non-canonical event";
  if (isSigned(entry, key)) return undefined;
  return following === undefined || isSigned(following, key) ? "bad signature" : "foreign key";
}

/** The part of the check that needs no key: does this entry follow from `head`, and is its hash its own? */
export function checkLink(entry: ChainEntry, head: Head): "gap" | "broken link" | "altered event" | undefined {
  if (entry.sequence !== head.sequence + 1) return "gap";
  if (entry.previous !== head.hash) return "broken link";
  return hashLink(entry).toString("hex") === entry.hash ? undefined : "altered event";
}

/** Is the entry's hash signed by this key? Covers, through the links, every entry before it. */
export function isSigned(entry: ChainEntry, key: KeyObject): boolean {
  return verify(null, Buffer.from(entry.hash, "hex"), key, Buffer.from(entry.signature, "base64"));
}

/** SHA-256 over a name for this use and version, then fields of fixed length, then the event: no two links collide. */
function hashLink(link: { sequence: number; previous: string; event: string }): Buffer {
  const number = Buffer.alloc(8);
  number.writeBigUInt64BE(BigInt(link.sequence));
  return createHash("sha256")
    .update("forge-audit-entry-v1\0")
    .update(number)
    .update(link.previous, "hex")
    .update(link.event, "utf8")
    .digest();
}
