import { once } from "node:events";
import { mkdtemp, rm } from "node:fs/promises";
import { createServer, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { encodeFrame, type Frame, frameHeaderBytes, frameTypes, type GuestFrameType, nonceBytes } from "./channel-codec.ts";

/** For tests: the guest's end of the channel, which says what a test wants it to. It answers `hello` honestly. */
export interface FakeGuest extends AsyncDisposable {
  readonly socketPath: string;
  readonly send: (type: GuestFrameType, stream?: number, payload?: Uint8Array) => void;
  /** Reads nothing more. */
  deafen(): void;
  /** As a VMM that died. */
  hangUp(): void;
}

/** `hear` is called with every frame of the host but `hello`. One host at a time. */
export async function startFakeGuest(hear: (frame: Frame, guest: FakeGuest) => void = () => undefined): Promise<FakeGuest> {
  const folder = await mkdtemp(join(tmpdir(), "forge-guest-"));
  const socketPath = join(folder, "channel");
  let host: Socket | undefined;
  const guest: FakeGuest = {
    socketPath,
    send: (type, stream, payload) => void host?.write(encodeFrame(type, stream, payload)),
    deafen: () => void host?.pause(),
    hangUp: () => void host?.destroy(),
    async [Symbol.asyncDispose]() {
      host?.destroy();
      server.close();
      await once(server, "close");
      await rm(folder, { recursive: true, force: true });
    },
  };
  const server = createServer((socket) => {
    host = socket;
    let pending = Buffer.alloc(0);
    socket.on("error", () => undefined);
    socket.on("data", (chunk: Buffer) => {
      pending = Buffer.concat([pending, chunk]);
      for (let frame = takeFrame(pending); frame !== undefined; frame = takeFrame(pending)) {
        pending = pending.subarray(frameHeaderBytes + frame.payload.length);
        if (frame.type === "hello") guest.send("helloReply", 0, replyTo(frame.payload));
        else hear(frame, guest);
      }
    });
  }).listen(socketPath);
  await once(server, "listening");
  return guest;
}

const typeNames = new Map(Object.entries(frameTypes).map(([name, value]) => [value as number, name as GuestFrameType]));

function takeFrame(bytes: Buffer): Frame | undefined {
  if (bytes.length < frameHeaderBytes) return undefined;
  const endsAt = frameHeaderBytes + bytes.readUInt32LE(8);
  if (bytes.length < endsAt) return undefined;
  const type = typeNames.get(bytes.readUInt8(4));
  if (type === undefined) throw new Error("the host sent a frame of an unknown type");
  return { type, stream: bytes.readUInt16LE(6), payload: bytes.subarray(frameHeaderBytes, endsAt) };
}

/** The nonce, u32 version, 16 bytes boot id, u64 µs at which init began, u64 µs of now. */
function replyTo(hello: Buffer): Buffer {
  const reply = Buffer.alloc(nonceBytes + 36);
  hello.copy(reply, 0, 0, nonceBytes);
  reply.writeUInt32LE(hello.readUInt32LE(nonceBytes), nonceBytes);
  return reply;
}
