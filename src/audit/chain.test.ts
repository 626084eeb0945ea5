import { createHash, generateKeyPairSync, sign } from "node:crypto";
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { canonicalJson } from "./canonical.ts";
import { type ChainEntry, type ChainReport, genesis, type Head, linkEntry, maxEventBytes, verifyChain } from "./chain.ts";
import { type AuditEvent, newEvent } from "./event.ts";
import type { Signer } from "./signer.ts";

const signer = memorySigner();
const stranger = memorySigner();
const chain = chainOf(6, signer);

describe("a chain", () => {
  test("verifies, to its head", async () => {
    const report = await verifyChain(chain, signer.publicKeyPem, headOf(chain));
    expect(report).toEqual({ ok: true, entries: 6, head: headOf(chain), firstBad: null });
  });

  test("without entries is good, and its head is genesis", async () => {
    expect(await verifyChain([], signer.publicKeyPem)).toEqual({ ok: true, entries: 0, head: genesis, firstBad: null });
  });

  test("a part verifies from the head before it", async () => {
    const report = await verifyChain(chain.slice(3), signer.publicKeyPem, headOf(chain), headOf(chain.slice(0, 3)));
    expect(report).toMatchObject({ ok: true, entries: 3 });
  });

  test("is read from a stream as well", async () => {
    async function* stream(): AsyncGenerator<ChainEntry> {
      for (const entry of chain) yield await Promise.resolve(entry);
    }
    expect(await verifyChain(stream(), signer.publicKeyPem)).toMatchObject({ ok: true, entries: 6 });
  });

  test("its first hash is what the format says, byte by byte", () => {
    const first = chain[0]!;
    const sequence = Buffer.from("0000000000000001", "hex");
    const bytes = Buffer.concat([Buffer.from("forge-audit-entry-v1\0"), sequence, Buffer.alloc(32), Buffer.from(first.event)]);
    expect(first.hash).toBe(createHash("sha256").update(bytes).digest("hex"));
  });

  test("takes no invalid event", () => {
    const bad: unknown[] = [
      { ...event(1), kind: "nothing.known" },
      { ...event(1), extra: 1 },
      { ...event(1), details: { a: Number.NaN } },
    ];
    for (const fact of bad)
      expect(() => linkEntry(genesis, fact as AuditEvent, signer)).toThrow(expect.objectContaining({ code: "INVALID_INPUT" }));
    const large = { ...event(1), details: { text: "x".repeat(maxEventBytes) } };
    expect(() => linkEntry(genesis, large, signer)).toThrow(expect.objectContaining({ code: "TOO_LARGE" }));
  });
});

describe("tampering", () => {
  const head = headOf(chain);
  const at = (index: number, change: (entry: ChainEntry) => unknown): unknown[] =>
    chain.map((entry, i) => (i === index ? change(entry) : entry));
  const move = (order: readonly number[]): ChainEntry[] => order.map((index) => chain[index]!);
  const foreignTail = chainOf(2, stranger, headOf(chain.slice(0, 4)));
  const notCanonical = relink(headOf(chain.slice(0, 3)), ` ${chain[3]!.event}`);

  test.each<[string, unknown[], number, string]>([
    ["an entry removed", move([0, 1, 3, 4, 5]), 4, "gap"],
    ["the first entry removed", move([1, 2, 3, 4, 5]), 2, "gap"],
    ["the last entry removed", move([0, 1, 2, 3, 4]), 6, "truncated"],
    ["all entries removed", [], 1, "truncated"],
    ["neighbours swapped", move([0, 2, 1, 3, 4, 5]), 3, "reordered"],
    ["an entry twice", move([0, 1, 1, 2, 3, 4, 5]), 2, "duplicate"],
    ["the first entry again at the end", move([0, 1, 2, 3, 4, 5, 0]), 1, "duplicate"],
    ["an event altered", at(2, (entry) => ({ ...entry, event: entry.event.replace("success", "failure") })), 3, "altered event"],
    [
      "an event replaced and hashed anew",
      at(2, (entry) => ({ ...relink(headOf(chain.slice(0, 2)), chain[4]!.event), signature: entry.signature })),
      3,
      "bad signature",
    ],
    ["a link to elsewhere", at(2, (entry) => ({ ...entry, previous: genesis.hash })), 3, "broken link"],
    ["a hash altered", at(2, (entry) => ({ ...entry, hash: genesis.hash })), 3, "altered event"],
    ["a signature of another entry", at(2, (entry) => ({ ...entry, signature: chain[3]!.signature })), 3, "bad signature"],
    ["no base64 in a signature", at(2, (entry) => ({ ...entry, signature: "?" })), 3, "malformed"],
    ["a further member", at(2, (entry) => ({ ...entry, note: "x" })), 3, "malformed"],
    ["something else instead of an entry", at(2, () => null), 3, "malformed"],
    ["an event in another form, signed", [...chain.slice(0, 3), notCanonical], 4, "non-canonical event"],
    ["a tail signed by another key", [...chain.slice(0, 4), ...foreignTail], 5, "foreign key"],
    ["a tail rewritten by the key's owner", [...chain.slice(0, 3), ...chainOf(3, signer, headOf(chain.slice(0, 3)))], 6, "diverged"],
  ])("%s", async (_, entries, sequence, problem) => {
    const report = await verifyChain(entries as ChainEntry[], signer.publicKeyPem, head);
    expect(report).toMatchObject({ ok: false, firstBad: { sequence, problem } });
  });

  test("the whole chain under another key", async () => {
    expect(await verifyChain(chain, stranger.publicKeyPem)).toMatchObject({
      ok: false,
      entries: 0,
      firstBad: { sequence: 1, problem: "foreign key" },
    });
  });

  test("every change of one byte of the serialised chain is found", async () => {
    const original = serialise(chain.slice(0, 3));
    const expected = headOf(chain.slice(0, 3));
    const unseen: number[] = [];
    for (let offset = 0; offset < original.length; offset++) {
      const flipped = Buffer.from(original);
      flipped[offset] = flipped[offset]! ^ (1 << (offset % 8));
      const report = await verifySerialised(flipped, expected);
      if (report.ok) unseen.push(offset);
    }
    expect(unseen).toEqual([]);
  });

  test("every removal, exchange and repetition of entries is found", async () => {
    const order = chain.map((_, index) => index);
    await fc.assert(
      fc.asyncProperty(fc.array(fc.nat({ max: 5 }), { maxLength: 8 }), async (drawn) => {
        const report = await verifyChain(move(drawn), signer.publicKeyPem, head);
        expect(report.ok).toBe(drawn.join() === order.join());
      }),
    );
  });

  test("entries of any shape never make the check itself fail", async () => {
    await fc.assert(
      fc.asyncProperty(fc.array(fc.anything()), async (entries) => {
        const report = await verifyChain(entries, signer.publicKeyPem);
        expect(report.ok).toBe(entries.length === 0);
      }),
    );
  });
});

test("a long chain is checked at a useful speed, and lets others run meanwhile", async () => {
  const long = chainOf(2000, signer);
  let turns = 0;
  const ticking = setInterval(() => turns++, 1);
  const startedMs = performance.now();
  const report = await verifyChain(long, signer.publicKeyPem);
  const perSecond = Math.round((long.length / (performance.now() - startedMs)) * 1000);
  clearInterval(ticking);
  expect(report.ok).toBe(true);
  expect(turns).toBeGreaterThan(2);
  expect(perSecond).toBeGreaterThan(200); // several thousand on an idle core; the bound only catches a blunder
});

function memorySigner(): Signer {
  const { privateKey, publicKey } = generateKeyPairSync("ed25519");
  return { publicKeyPem: publicKey.export({ type: "spki", format: "pem" }), sign: (bytes) => sign(null, bytes, privateKey) };
}

function event(number: number): AuditEvent {
  const details = { revision: number, note: 'quotes " and \u00fc, \n' };
  return newEvent({ tenant: "ten_1", kind: "service.applied", actor: "token/ci", outcome: "success", subject: "service/web", details });
}

function chainOf(length: number, by: Signer, from: Head = genesis): ChainEntry[] {
  const entries: ChainEntry[] = [];
  for (let head = from; entries.length < length; head = headOf(entries)) entries.push(linkEntry(head, event(entries.length), by));
  return entries;
}

/** An entry hashed and signed by the key's owner around a text that linkEntry would not make. */
function relink(head: Head, text: string): ChainEntry {
  const number = Buffer.alloc(8);
  number.writeBigUInt64BE(BigInt(head.sequence + 1));
  const hash = createHash("sha256").update("forge-audit-entry-v1\0").update(number).update(head.hash, "hex").update(text).digest();
  return {
    sequence: head.sequence + 1,
    previous: head.hash,
    event: text,
    hash: hash.toString("hex"),
    signature: signer.sign(hash).toString("base64"),
  };
}

function headOf(entries: readonly ChainEntry[]): Head {
  const { sequence, hash } = entries.at(-1) ?? genesis;
  return { sequence, hash };
}

function serialise(entries: readonly ChainEntry[]): Buffer {
  return Buffer.from(entries.map((entry) => `${canonicalJson(entry)}\n`).join(""));
}

async function verifySerialised(bytes: Buffer, expected: Head): Promise<ChainReport> {
  const lines = bytes.toString("utf8").split("\n").slice(0, -1);
  const entries = lines.map((line) => {
    try {
      return JSON.parse(line) as unknown;
    } catch {
      return undefined;
    }
  });
  return await verifyChain(entries, signer.publicKeyPem, expected);
}
