import { randomBytes } from "node:crypto";
import { crc32 } from "node:zlib";
import * as fc from "fast-check";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { run } from "../base/exec.ts";
import {
  encodeFrame,
  flush,
  type Frame,
  FrameDecoder,
  frameTypes,
  type GuestFrameType,
  maxPayloadBytes,
  nonceBytes,
} from "./channel-codec.ts";
import { buildHarness } from "./guest/harness.fixture.ts";

const nonce = randomBytes(nonceBytes);
const reply = encodeFrame("helloReply", 0, Buffer.concat([nonce, Buffer.alloc(52)]));
const typeNames = Object.keys(frameTypes) as GuestFrameType[];
const frames = fc.array(
  fc.record({ type: fc.constantFrom(...typeNames), stream: fc.nat(0xffff), payload: fc.uint8Array({ maxLength: 3000 }) }),
  { maxLength: 12 },
);

function encodeAll(list: readonly { type: GuestFrameType; stream: number; payload: Uint8Array }[]): Buffer {
  return Buffer.concat(list.map(({ type, stream, payload }) => encodeFrame(type, stream, payload)));
}

function decode(bytes: Buffer, chunkBytes: number): Frame[] {
  const decoder = new FrameDecoder(nonce);
  const found: Frame[] = [];
  for (let at = 0; at < bytes.length; at += chunkBytes) found.push(...decoder.push(bytes.subarray(at, at + chunkBytes)));
  return found;
}

describe("the host's decoder", () => {
  test("gives back what was encoded, however the bytes are cut", () => {
    fc.assert(
      fc.property(frames, fc.integer({ min: 1, max: 4000 }), (list, chunkBytes) => {
        const [first, ...rest] = decode(Buffer.concat([reply, encodeAll(list)]), chunkBytes);
        expect(first?.type).toBe("helloReply");
        expect(rest).toEqual(list.map((frame) => ({ ...frame, payload: Buffer.from(frame.payload) })));
      }),
      { numRuns: 60 },
    );
  });

  test("finds its reply after any garbage: the tail of a frame for another host, or frames forged in it", () => {
    fc.assert(
      fc.property(
        fc.uint8Array({ maxLength: 2000 }),
        frames,
        fc.nat(50),
        fc.integer({ min: 1, max: 500 }),
        (garbage, list, cut, chunkBytes) => {
          const before = Buffer.concat([
            garbage,
            encodeAll(list).subarray(cut),
            encodeFrame("helloReply", 0, Buffer.alloc(68, 1)),
            garbage,
          ]);
          const found = decode(Buffer.concat([before, reply, encodeFrame("log", 0, Buffer.from("x"))]), chunkBytes);
          expect(found.map((frame) => frame.type)).toEqual(["helloReply", "log"]);
        },
      ),
      { numRuns: 60 },
    );
  });

  test("takes nothing but frames once it is in sync", () => {
    fc.assert(
      fc.property(fc.uint8Array({ minLength: 20, maxLength: 200 }), (garbage) => {
        expect(() => decode(Buffer.concat([reply, garbage]), 64)).toThrow(expect.objectContaining({ code: "GUEST_PROTOCOL" }));
      }),
    );
    const altered = encodeFrame("log", 0, Buffer.from("hello"));
    altered.writeUInt8(1, altered.length - 1);
    expect(() => decode(Buffer.concat([reply, altered]), 64)).toThrow(/checksum/);
  });

  test("does not grow while it waits for its reply", () => {
    const decoder = new FrameDecoder(nonce);
    for (let i = 0; i < 200; i++) expect([...decoder.push(randomBytes(65_536))]).toEqual([]);
    expect([...decoder.push(reply)].map((frame) => frame.type)).toEqual(["helloReply"]);
  });

  test("refuses to encode more than a frame carries", () => {
    expect(() => encodeFrame("log", 0, Buffer.alloc(maxPayloadBytes + 1))).toThrow(expect.objectContaining({ code: "TOO_LARGE" }));
  });
});

describe("the guest's decoder", () => {
  let harness: Awaited<ReturnType<typeof buildHarness>>;

  beforeAll(async () => {
    harness = await buildHarness();
  });

  afterAll(async () => {
    await harness[Symbol.asyncDispose]();
  });

  const decodeInC = async (bytes: Uint8Array, chunkBytes: number): Promise<string[]> =>
    (await run(harness.path, ["frames", String(chunkBytes)], { input: bytes })).split("\n").slice(0, -1);
  const line = (frame: { type: GuestFrameType; stream: number; payload: Uint8Array }): string =>
    `${frameTypes[frame.type]} ${frame.stream} ${frame.payload.length} ${crc32(frame.payload)}`;

  test("understands the host's frames, however they are cut, with garbage between them", async () => {
    await fc.assert(
      fc.asyncProperty(frames, fc.uint8Array({ maxLength: 300 }), fc.integer({ min: 1, max: 5000 }), async (list, garbage, chunkBytes) => {
        const bytes = Buffer.concat(list.flatMap((frame) => [Buffer.from(garbage), encodeAll([frame])]));
        expect(await decodeInC(bytes, chunkBytes)).toEqual(list.map(line));
      }),
      { numRuns: 25 },
    );
  });

  test("a dead host's unfinished frame swallows nothing for good", async () => {
    const hello = { type: "hello" as const, stream: 0, payload: Buffer.alloc(28, 7) };
    const largest = encodeFrame("stdin", 3, Buffer.alloc(maxPayloadBytes, 9));
    for (const cut of [1, 19, 20, 21, 40_000, largest.length - 1]) {
      const bytes = Buffer.concat([largest.subarray(0, cut), encodeAll([hello]), flush, encodeAll([hello])]);
      const heard = (await decodeInC(bytes, 4096)).filter((one) => one === line(hello));
      expect(heard.length, `cut at ${cut}`).toBeGreaterThanOrEqual(1);
    }
  });

  test("survives two seconds of mutated frames under the sanitisers", async () => {
    const seed = encodeAll(typeNames.map((type, stream) => ({ type, stream, payload: randomBytes(stream * 37) })));
    await run(harness.path, ["fuzz", "2", "1"], { input: seed });
  });
});
