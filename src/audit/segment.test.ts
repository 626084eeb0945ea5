import { generateKeyPairSync, sign } from "node:crypto";
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { type ChainEntry, genesis, linkEntry } from "./chain.ts";
import { newEvent } from "./event.ts";
import { encodeFrame, parseSegment } from "./segment.ts";

const { privateKey, publicKey } = generateKeyPairSync("ed25519");
const signer = {
  publicKeyPem: publicKey.export({ type: "spki", format: "pem" }),
  sign: (bytes: Uint8Array) => sign(null, bytes, privateKey),
};
const entries = chainOf(6);
const frames = [encodeFrame(entries.slice(0, 1)), encodeFrame(entries.slice(1, 4)), encodeFrame(entries.slice(4))];
const segment = Buffer.concat(frames);
const lastFrame = segment.length - frames[2]!.length;

describe("a segment", () => {
  test("is read as it was written", () => {
    expect(parseSegment(segment)).toEqual({ entries, goodBytes: segment.length, end: "clean" });
    expect(parseSegment(Buffer.alloc(0))).toEqual({ entries: [], goodBytes: 0, end: "clean" });
  });

  test("cut anywhere is torn, and loses only the frame that was cut", () => {
    const boundaries = new Set([0, frames[0]!.length, lastFrame, segment.length]);
    for (let length = 0; length < segment.length; length++) {
      const parsed = parseSegment(segment.subarray(0, length));
      expect(parsed.end).toBe(boundaries.has(length) ? "clean" : "torn");
      expect(parsed.goodBytes).toBe([...boundaries].filter((boundary) => boundary <= length).toSorted((a, b) => b - a)[0]);
    }
  });

  test("with a changed byte anywhere is corrupt, never torn and never good", () => {
    for (let offset = 0; offset < segment.length; offset++) {
      const changed = Buffer.from(segment);
      changed[offset] = changed[offset]! ^ (1 << (offset % 8));
      expect(parseSegment(changed).end).toBe("corrupt");
    }
  });

  test("whose last frame misses sectors is torn", () => {
    for (let sector = Math.ceil(lastFrame / 512) * 512; sector < segment.length; sector += 512) {
      const holed = Buffer.from(segment).fill(0, sector, Math.min(segment.length, sector + 512));
      expect(parseSegment(holed)).toMatchObject({ end: "torn", goodBytes: lastFrame });
    }
    expect(parseSegment(Buffer.concat([segment, Buffer.alloc(2000)]))).toMatchObject({ end: "torn", goodBytes: segment.length });
  });

  test("with a hole before its last frame is corrupt", () => {
    const holed = Buffer.concat([segment, segment]).fill(0, 512, 1024);
    expect(parseSegment(holed).end).toBe("corrupt");
  });

  test("any split into frames reads as the same entries", () => {
    fc.assert(
      fc.property(fc.array(fc.integer({ min: 1, max: 6 }), { maxLength: 6 }), (sizes) => {
        const parts: Buffer[] = [];
        let from = 0;
        for (const size of sizes) if (from < entries.length) parts.push(encodeFrame(entries.slice(from, (from += size))));
        expect(parseSegment(Buffer.concat(parts))).toMatchObject({ entries: entries.slice(0, from), end: "clean" });
      }),
    );
  });

  test("arbitrary bytes, alone or behind good frames, never throw and never yield an entry", () => {
    fc.assert(
      fc.property(fc.uint8Array({ minLength: 1, maxLength: 200 }), (noise) => {
        expect(parseSegment(Buffer.from(noise)).entries).toEqual([]);
        expect(parseSegment(Buffer.concat([segment, noise]))).toMatchObject({ entries, goodBytes: segment.length });
      }),
    );
  });
});

function chainOf(length: number): ChainEntry[] {
  const chain: ChainEntry[] = [];
  for (let head = genesis as { sequence: number; hash: string }; chain.length < length; head = chain.at(-1)!) {
    const details = { number: chain.length, text: "ü".repeat(chain.length * 40) };
    chain.push(
      linkEntry(
        head,
        newEvent({ tenant: null, kind: "cell.ready", actor: "node/n", outcome: "success", subject: "cell/x", details }),
        signer,
      ),
    );
  }
  return chain;
}
