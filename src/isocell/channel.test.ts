import { setTimeout as delay } from "node:timers/promises";
import { afterEach, expect, describe, test, vi } from "vitest";
import type { Frame } from "./channel-codec.ts";
import { type FakeGuest, startFakeGuest } from "./channel.fixture.ts";
import { GuestChannel, type GuestHandlers } from "./channel.ts";

const cleanUp: AsyncDisposable[] = [];
afterEach(async () => {
  vi.useRealTimers();
  for (const resource of cleanUp.splice(0).toReversed()) await resource[Symbol.asyncDispose]();
});

const shell = { argv: ["sh"], tty: false };
const start = (frame: Frame, guest: FakeGuest): void => {
  if (frame.type === "exec") guest.send("execStarted", frame.stream, Buffer.alloc(4));
};

describe("what a guest tells of an end", () => {
  test.each([
    [0, 0, { code: 0 }],
    [0, 255, { code: 255 }],
    [1, 1, { signal: 1 }],
    [1, 64, { signal: 64 }],
  ])("kind %i and value %i are an exit", async (kind, value, status) => {
    const { promise, resolve } = Promise.withResolvers<unknown>();
    const { guest } = await open({ exited: (event) => resolve(event.status) });
    guest.send("exited", 0, Buffer.concat([Buffer.alloc(8), exit(kind, value)]));
    expect(await promise).toEqual(status);
  });

  test.each([
    [0, 256],
    [0, 0xffff_ffff],
    [1, 0],
    [1, 65],
    [2, 1],
  ])("kind %i and value %i are none, of the entrypoint or of a session", async (kind, value) => {
    const first = await open();
    first.guest.send("exited", 0, Buffer.concat([Buffer.alloc(8), exit(kind, value)]));
    expect(await first.ended).toMatchObject({ code: "GUEST_PROTOCOL" });
    const second = await open({}, start);
    const session = await second.channel.exec(shell);
    second.guest.send("execExited", 1, exit(kind, value));
    await expect(session.exited).rejects.toMatchObject({ code: "GUEST_PROTOCOL" });
  });

  test("its words come without control characters and cut", async () => {
    const said = `\0a\x1b[2Jb\r\nc\u009bd ${"x".repeat(1991)}😀 and more`;
    const kept = `a [2Jb c d ${"x".repeat(1991)}`.slice(0, 2000);
    const { promise, resolve } = Promise.withResolvers<unknown>();
    const { guest, channel } = await open({ fatal: resolve }, (frame, { send }) => {
      if (frame.type === "exec") send("execError", frame.stream, Buffer.concat([Buffer.alloc(4), Buffer.from(said)]));
      if (frame.type === "probe") send("probeResult", frame.stream, Buffer.concat([Buffer.alloc(1), Buffer.from(said)]));
    });
    const words = [(await channel.probe({ port: 80, timeoutMs: 1000 })).detail];
    await channel.exec(shell).catch((error: Error) => words.push(error.message));
    guest.send("fatal", 0, Buffer.from(`CO\x07DE\0${said}`));
    const fatal = (await promise) as { code: string; message: string };
    expect(fatal.code).toBe("CO DE");
    for (const word of [...words, fatal.message]) {
      expect(word.startsWith(kept.slice(0, 1990))).toBe(true);
      expect(word.length).toBeLessThanOrEqual(2000);
      expect(word.isWellFormed()).toBe(true);
      expect(word).not.toMatch(/\p{Cc}/u);
    }
    expect(words).toHaveLength(2);
  });
});

describe("a guest that does not answer", () => {
  test("a probe settles a second after its bound, and a late answer is passed over", async () => {
    let asked = 0;
    const { channel, guest } = await open({}, ({ type, stream }, { send }) => {
      if (type === "probe") asked = stream;
      if (type === "exec") send("execStarted", stream, Buffer.alloc(4));
    });
    const began = performance.now();
    expect(await channel.probe({ port: 80, timeoutMs: 50 })).toEqual({ ok: false, detail: "the guest did not answer" });
    expect(performance.now() - began).toBeGreaterThan(1_000);
    guest.send("probeResult", asked, Buffer.from([1]));
    await channel.exec(shell); // the connection lives
  });

  test("an answer to a probe that was never asked ends the connection", async () => {
    const { guest, ended } = await open();
    guest.send("probeResult", 1, Buffer.from([1]));
    expect(await ended).toMatchObject({ code: "GUEST_PROTOCOL" });
  });

  test("a program that does not start is given up and hung up on", async () => {
    const asked = Promise.withResolvers<void>();
    const closed = Promise.withResolvers<void>();
    const { channel, guest } = await open({}, ({ type }) => {
      if (type === "exec") asked.resolve();
      if (type === "execClose") closed.resolve();
    });
    vi.useFakeTimers({ toFake: ["setTimeout", "clearTimeout"] });
    const failure = channel.exec(shell).catch((error: unknown) => error);
    await asked.promise;
    vi.advanceTimersByTime(10_000);
    vi.useRealTimers();
    expect(await failure).toMatchObject({ code: "TIMEOUT" });
    await closed.promise;
    guest.send("execStarted", 1, Buffer.alloc(4)); // too late: passed over
    expect(await channel.probe({ port: 80, timeoutMs: 0 })).toMatchObject({ ok: false });
  });

  test("no more sessions are opened than a guest holds", async () => {
    const { channel } = await open({}, start);
    const sessions = await Promise.all(Array.from({ length: 16 }, () => channel.exec(shell)));
    await expect(channel.exec(shell)).rejects.toMatchObject({ code: "UNAVAILABLE" });
    sessions[0]?.close();
    await channel.exec(shell);
  });
});

describe("memory of the host", () => {
  test("nothing is read while the loss of logs is noted", async () => {
    const noted = Promise.withResolvers<void>();
    const told: string[] = [];
    const { guest } = await open({
      dropped: async () => {
        told.push("dropped");
        await noted.promise;
        told.push("noted");
      },
      fatal: () => void told.push("fatal"),
    });
    guest.send("dropped", 0, Buffer.alloc(16));
    guest.send("fatal", 0, Buffer.from("A\0b"));
    await delay(100);
    expect(told).toEqual(["dropped"]);
    noted.resolve();
    await vi.waitFor(() => expect(told).toEqual(["dropped", "noted", "fatal"]));
  });

  test("output without a byte ends the connection", async () => {
    const { channel, guest, ended } = await open({}, start);
    await channel.exec(shell);
    guest.send("output", 1, Buffer.from([1]));
    expect(await ended).toMatchObject({ code: "GUEST_PROTOCOL" });
  });

  test("output in single bytes is the same bytes", async () => {
    const { channel, guest } = await open({}, start);
    const session = await channel.exec(shell);
    const sent = Buffer.from(Array.from({ length: 5000 }, (_, index) => index % 256));
    for (const byte of sent) guest.send("output", 1, Buffer.from([1, byte]));
    guest.send("execExited", 1, exit(0, 0));
    const chunks: Buffer[] = [];
    for await (const chunk of session.stdout) chunks.push(chunk as Buffer);
    expect(Buffer.concat(chunks).equals(sent)).toBe(true);
  });

  test("a guest that asks for answers and reads none is left", async () => {
    const { guest, ended } = await open();
    guest.deafen();
    // Every `exited` is answered by `powerOff`: what the guest does not read would pile up here.
    const answered = Buffer.concat([Buffer.alloc(8), exit(0, 0)]);
    let isOver = false;
    void ended.then(() => (isOver = true));
    for (let round = 0; round < 5000 && !isOver; round++) {
      for (let index = 0; index < 200; index++) guest.send("exited", 0, answered);
      await delay(0);
    }
    expect(await ended).toMatchObject({ code: "GUEST_PROTOCOL", message: "the guest does not read what it is sent" });
  });

  test("full windows of input to every session are within the bound", async () => {
    const { channel, guest } = await open({}, start);
    const sessions = await Promise.all(Array.from({ length: 16 }, () => channel.exec(shell)));
    guest.deafen();
    for (const session of sessions) session.stdin.write(Buffer.alloc(1024 * 1024));
    await delay(100);
    await expect(Promise.race([channel.closed, delay(10, "open")])).resolves.toBe("open");
  });
});

test("one connection takes more probes than there are numbers for them", async () => {
  const { channel } = await open({}, ({ type, stream }, { send }) => {
    if (type === "probe") send("probeResult", stream, Buffer.from([1]));
  });
  let left = 70_000;
  const worker = async (): Promise<void> => {
    while (left-- > 0) expect((await channel.probe({ port: 80, timeoutMs: 10_000 })).ok).toBe(true);
  };
  await Promise.all(Array.from({ length: 16 }, worker));
  await expect(Promise.race([channel.closed, delay(10, "open")])).resolves.toBe("open");
});

async function open(handlers: GuestHandlers = {}, hear?: (frame: Frame, guest: FakeGuest) => void) {
  const guest = await startFakeGuest(hear);
  cleanUp.push(guest);
  const { promise: ended, resolve } = Promise.withResolvers<unknown>();
  const channel = await GuestChannel.connect(guest.socketPath, {
    lastLogSequence: 0,
    timeoutMs: 10_000,
    handlers: { ...handlers, closed: resolve },
  });
  cleanUp.push({ [Symbol.asyncDispose]: () => channel.close() });
  return { guest, channel, ended };
}

function exit(kind: number, value: number): Buffer {
  const payload = Buffer.alloc(5);
  payload.writeUInt8(kind, 0);
  payload.writeUInt32LE(value, 1);
  return payload;
}
