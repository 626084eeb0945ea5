import { crc32 } from "node:zlib";
import { ForgeError } from "../base/errors.ts";

/*
 * Frames of the channel between host and guest. Header, little-endian, 20 bytes:
 *   u32 magic, u8 type, u8 zero, u16 stream, u32 payload length, u32 CRC-32 of the payload, u32 CRC-32 of the above
 * then the payload. guest/codec.c is the other side. CRC-32 is the one of IEEE 802.3, which Node computes natively.
 *
 * Either side may find itself in the middle of the other's frame: a host that died is followed by one that knows
 * nothing. The new host sends `hello` with a nonce no one could guess and discards everything up to the reply that
 * repeats it; a guest that waits for the rest of a dead host's frame is freed by `flush`: enough zeros to end it.
 */
export const frameMagic = 0x3147_4346; // "FCG1"
export const frameHeaderBytes = 20;
export const maxPayloadBytes = 64 * 1024;
export const nonceBytes = 16;

export const frameTypes = {
  // host to guest
  hello: 1,
  time: 2,
  exec: 3,
  stdin: 4,
  stdinEnd: 5,
  resize: 6,
  signal: 7,
  outputCredit: 8,
  execClose: 9,
  probe: 10,
  stop: 11,
  powerOff: 12,
  // guest to host
  helloReply: 64,
  started: 65,
  log: 66,
  dropped: 67,
  fatal: 68,
  exited: 69,
  execStarted: 70,
  output: 71,
  execExited: 72,
  execError: 73,
  stdinCredit: 74,
  probeResult: 75,
} as const;
export type GuestFrameType = keyof typeof frameTypes;

const typeNames = new Map<number, GuestFrameType>(Object.entries(frameTypes).map(([name, value]) => [value, name as GuestFrameType]));

export interface Frame {
  readonly type: GuestFrameType;
  readonly stream: number;
  readonly payload: Buffer;
}

export const flush: Buffer = Buffer.alloc(frameHeaderBytes + maxPayloadBytes);

export function encodeFrame(type: GuestFrameType, stream = 0, payload: Uint8Array = new Uint8Array()): Buffer {
  if (payload.length > maxPayloadBytes)
    throw new ForgeError("TOO_LARGE", `a frame carries at most ${maxPayloadBytes} bytes, not ${payload.length}`);
  const frame = Buffer.alloc(frameHeaderBytes + payload.length);
  frame.writeUInt32LE(frameMagic, 0);
  frame.writeUInt8(frameTypes[type], 4);
  frame.writeUInt16LE(stream, 6);
  frame.writeUInt32LE(payload.length, 8);
  frame.writeUInt32LE(crc32(payload), 12);
  frame.writeUInt32LE(crc32(frame.subarray(0, 16)), 16);
  frame.set(payload, frameHeaderBytes);
  return frame;
}

/**
 * The host's decoder. Until the reply that carries `nonce` it skips whatever comes; after it, the first byte that is
 * not a frame is GUEST_PROTOCOL. Holds at most one frame and one chunk in memory.
 */
export class FrameDecoder {
  readonly #nonce: Uint8Array;
  #pending: Buffer = Buffer.alloc(0);
  #inSync = false;

  constructor(nonce: Uint8Array) {
    this.#nonce = nonce;
  }

  *push(chunk: Uint8Array): Generator<Frame, void, undefined> {
    this.#pending = Buffer.concat([this.#pending, chunk]);
    for (;;) {
      if (!this.#inSync && !this.#findReply()) return;
      this.#inSync = true;
      const frame = this.#takeFrame();
      if (frame === undefined) return;
      yield frame;
    }
  }

  /** Drops bytes before our reply. True when it stands whole at the front. */
  #findReply(): boolean {
    const wholeBytes = frameHeaderBytes + nonceBytes;
    const magic = Buffer.alloc(4);
    magic.writeUInt32LE(frameMagic);
    for (;;) {
      const at = this.#pending.indexOf(magic);
      if (at === -1) {
        this.#pending = this.#pending.subarray(Math.max(0, this.#pending.length - 3)); // a magic may be cut in two
        return false;
      }
      this.#pending = this.#pending.subarray(at);
      if (this.#pending.length < wholeBytes) return false;
      const isReply = this.#pending[4] === frameTypes.helloReply && this.#headerIsWhole();
      if (isReply && this.#pending.subarray(frameHeaderBytes, wholeBytes).equals(this.#nonce)) return true;
      this.#pending = this.#pending.subarray(1);
    }
  }

  #headerIsWhole(): boolean {
    return (
      this.#pending.readUInt32LE(0) === frameMagic &&
      this.#pending.readUInt32LE(16) === crc32(this.#pending.subarray(0, 16)) &&
      this.#pending.readUInt32LE(8) <= maxPayloadBytes
    );
  }

  #takeFrame(): Frame | undefined {
    if (this.#pending.length < frameHeaderBytes) return undefined;
    if (!this.#headerIsWhole()) throw new ForgeError("GUEST_PROTOCOL", "the guest sent bytes that are no frame");
    const endsAt = frameHeaderBytes + this.#pending.readUInt32LE(8);
    if (this.#pending.length < endsAt) return undefined;
    const payload = this.#pending.subarray(frameHeaderBytes, endsAt);
    if (crc32(payload) !== this.#pending.readUInt32LE(12))
      throw new ForgeError("GUEST_PROTOCOL", "the guest sent a frame whose checksum is wrong");
    const type = typeNames.get(this.#pending[4] ?? 0);
    if (type === undefined) throw new ForgeError("GUEST_PROTOCOL", `the guest sent a frame of the unknown type ${this.#pending[4]}`);
    const stream = this.#pending.readUInt16LE(6);
    this.#pending = this.#pending.subarray(endsAt);
    return { type, stream, payload };
  }
}
