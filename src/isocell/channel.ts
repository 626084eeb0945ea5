import { randomBytes } from "node:crypto";
import { connect as connectSocket, type Socket } from "node:net";
import { setTimeout as delay } from "node:timers/promises";
import { errnoOf, ForgeError } from "../base/errors.ts";
import { type ExecOptions, ExecSession, readExitStatus } from "./channel-exec.ts";
import { encodeFrame, flush, type Frame, FrameDecoder, type GuestFrameType, nonceBytes } from "./channel-codec.ts";
import { guestText } from "./channel-text.ts";

export type { ExecOptions, ExecSession } from "./channel-exec.ts";

/** How a process of the guest ended. */
export type ExitStatus = { readonly code: number } | { readonly signal: number };

export interface GuestLog {
  /** Grows by one a chunk, from 1, for the life of the microVM. */
  readonly sequence: number;
  /** When init read it from the entrypoint, by the guest's clock. */
  readonly time: Date;
  readonly stream: "stdout" | "stderr";
  readonly bytes: Buffer;
}

/**
 * What a guest tells. All may be absent. After a reconnect `booted`, `started`, `fatal` and `exited` are told again where
 * they have happened. While a promise returned here is pending nothing more is read: that is the back-pressure.
 */
export interface GuestHandlers {
  /** Init's first word. `at` is when init began to run and `kernelUs` the guest's own clock then: both exclude transport. */
  booted?(event: { readonly bootId: string; readonly at: Date; readonly kernelUs: number }): void;
  /** The entrypoint was exec'd. `initUs` from init's first instruction. */
  started?(event: { readonly at: Date; readonly initUs: number; readonly pid: number }): void;
  log?(log: GuestLog): void | Promise<void>;
  /** These logs are lost: the guest keeps a bounded number of bytes for an absent host. */
  dropped?(event: { readonly fromSequence: number; readonly toSequence: number }): void | Promise<void>;
  /** The cell cannot run, or cannot go on. The guest powers off after it. */
  fatal?(event: { readonly code: string; readonly message: string }): void | Promise<void>;
  /** The entrypoint ended and all its logs were handed over; once this returns the guest powers off. */
  exited?(event: { readonly at: Date; readonly status: ExitStatus }): void | Promise<void>;
  /** The connection is over; with the error that ended it, if one did. Nothing is told after it. */
  closed?(error: ForgeError | undefined): void;
}

export interface ConnectOptions {
  /** The last log this host holds durably; the guest sends what came after. 0 for none. */
  readonly lastLogSequence: number;
  /** Until the guest answered: covers its boot. */
  readonly timeoutMs: number;
  readonly signal?: AbortSignal;
  readonly handlers?: GuestHandlers;
}

export interface ProbeResult {
  readonly ok: boolean;
  readonly detail: string;
}

const protocolVersion = 1;
const maxProbes = 16;
/** guest/session.h says the same. */
const maxSessions = 16;
/** Beyond a probe's own bound, for the way there and back. */
const probeMarginMs = 1_000;
const execStartMs = 10_000;
/** More than every session's window of stdin and its request, probes and credits together: beyond it a guest does not read. */
const maxUnsentBytes = 4 * 1024 * 1024;
const maxStream = 0xffff;
/** A guest that still waits for the rest of a dead host's frame hears nothing until it is flushed out. */
const helloAgainAfterMs = [1_000, 5_000, 20_000];

/**
 * The host's end of the channel to one guest, over the unix socket of its VMM. The guest is not trusted: what it sends
 * is bounded, and whatever is not of the protocol ends the connection with GUEST_PROTOCOL.
 */
export class GuestChannel {
  readonly #socket: Socket;
  readonly #handlers: GuestHandlers;
  readonly #decoder: FrameDecoder;
  readonly #nonce = randomBytes(nonceBytes);
  readonly #ready = Promise.withResolvers<void>();
  readonly #closed = Promise.withResolvers<void>();
  readonly #sessions = new Map<number, ExecSession>();
  readonly #probes = new Map<number, PromiseWithResolvers<ProbeResult>>();
  /** Numbers are used anew after 65,535: a cell is probed for months over one connection. */
  #lastStream = 0;
  #highestStream = 0;
  /** Host time (ms) of the guest's boot clock at zero. */
  #bootClockZeroMs = 0;
  #bootedUs = 0;
  #isReady = false;
  #isOver = false;
  #closingOnPurpose = false;

  /** Resolves when the guest answered; handlers are called from then on. */
  static async connect(socketPath: string, options: ConnectOptions): Promise<GuestChannel> {
    const deadline = AbortSignal.timeout(options.timeoutMs);
    const signal = options.signal === undefined ? deadline : AbortSignal.any([deadline, options.signal]);
    const socket = await openSocket(socketPath, signal);
    const channel = new GuestChannel(socket, options.handlers ?? {});
    const giveUp = (): void => void socket.destroy(connectError(deadline));
    signal.addEventListener("abort", giveUp, { once: true });
    try {
      if (signal.aborted) giveUp();
      void channel.#sayHello(options.lastLogSequence);
      await channel.#ready.promise;
      return channel;
    } finally {
      signal.removeEventListener("abort", giveUp);
    }
  }

  private constructor(socket: Socket, handlers: GuestHandlers) {
    this.#socket = socket;
    this.#handlers = handlers;
    this.#decoder = new FrameDecoder(this.#nonce);
    this.#ready.promise.catch(() => undefined); // connect() reports it
    void this.#read();
  }

  /** Resolves when the connection is over, whatever ended it. */
  get closed(): Promise<void> {
    return this.#closed.promise;
  }

  /** Runs a program in the cell as the cell's user. Ends with the connection. Rejects when it cannot be started in time. */
  async exec(options: ExecOptions): Promise<ExecSession> {
    if (this.#sessions.size >= maxSessions) throw new ForgeError("UNAVAILABLE", `${maxSessions} sessions are open in this cell`);
    const stream = this.#takeStream();
    const session = new ExecSession(
      options,
      (type, payload) => this.#send(type, stream, payload),
      () => this.#sessions.delete(stream),
    );
    this.#sessions.set(stream, session);
    const late = new ForgeError("TIMEOUT", `the guest did not start the program within ${execStartMs} ms`);
    const timer = setTimeout(() => session.close(late), execStartMs);
    try {
      await session.started;
      return session;
    } finally {
      clearTimeout(timer);
    }
  }

  /** Is the port answering, asked from inside the cell? TCP connect, or an HTTP GET that must answer 2xx or 3xx. */
  async probe(options: { readonly port: number; readonly httpPath?: string; readonly timeoutMs: number }): Promise<ProbeResult> {
    if (this.#probes.size >= maxProbes) throw new ForgeError("UNAVAILABLE", `${maxProbes} probes of this cell are already under way`);
    const stream = this.#takeStream();
    const path = Buffer.from(options.httpPath ?? "", "utf8");
    const payload = Buffer.alloc(6 + path.length);
    payload.writeUInt16LE(options.port, 0);
    payload.writeUInt32LE(options.timeoutMs, 2);
    path.copy(payload, 6);
    const result = Promise.withResolvers<ProbeResult>();
    this.#probes.set(stream, result);
    this.#send("probe", stream, payload);
    const timer = setTimeout(() => {
      this.#probes.delete(stream);
      result.resolve({ ok: false, detail: "the guest did not answer" });
    }, options.timeoutMs + probeMarginMs);
    try {
      return await result.promise;
    } finally {
      clearTimeout(timer);
    }
  }

  /** Sends the entrypoint a signal. */
  signal(number: number): void {
    this.#send("signal", 0, uint32(number));
  }

  /** Asks the entrypoint to stop with its stop signal; after `graceMs` everything is killed. `exited` tells the end. */
  stop(graceMs: number): void {
    this.#send("stop", 0, uint32(graceMs));
  }

  /** Leaves the guest running; its exec sessions end. */
  async close(): Promise<void> {
    this.#closingOnPurpose = true;
    this.#socket.destroy();
    await this.#closed.promise;
  }

  async #sayHello(lastLogSequence: number): Promise<void> {
    const hello = Buffer.alloc(nonceBytes + 12);
    this.#nonce.copy(hello);
    hello.writeUInt32LE(protocolVersion, nonceBytes);
    hello.writeBigUInt64LE(BigInt(lastLogSequence), nonceBytes + 4);
    this.#send("hello", 0, hello);
    for (const pauseMs of helloAgainAfterMs) {
      await Promise.race([delay(pauseMs, undefined, { ref: false }), this.#ready.promise, this.#closed.promise]).catch(() => undefined);
      if (this.#isReady || this.#isOver) return;
      this.#socket.write(flush);
      this.#send("hello", 0, hello);
    }
  }

  async #read(): Promise<void> {
    let failure: ForgeError | undefined;
    try {
      for await (const chunk of this.#socket) {
        for (const frame of this.#decoder.push(chunk as Buffer)) {
          const handled = this.#dispatch(frame);
          if (handled !== undefined) await handled;
        }
      }
    } catch (error) {
      if (!this.#closingOnPurpose) failure = channelError(error);
    }
    this.#end(failure);
  }

  #end(failure: ForgeError | undefined): void {
    this.#isOver = true;
    this.#socket.destroy();
    const reason = failure ?? new ForgeError("CELL_FAILED", "the connection to the cell is closed");
    this.#ready.reject(reason);
    for (const session of this.#sessions.values()) session.fail(reason);
    for (const probe of this.#probes.values()) probe.reject(reason);
    this.#sessions.clear();
    this.#probes.clear();
    this.#closed.resolve();
    this.#handlers.closed?.(failure);
  }

  #dispatch(frame: Frame): void | Promise<void> {
    const { payload } = frame;
    try {
      switch (frame.type) {
        case "helloReply":
          return this.#onReply(payload);
        case "started":
          return this.#handlers.started?.({
            at: this.#at(readUs(payload, 0)),
            initUs: readUs(payload, 0) - this.#bootedUs,
            pid: payload.readUInt32LE(8),
          });
        case "log":
          return this.#handlers.log?.({
            sequence: readUs(payload, 0),
            time: new Date(readUs(payload, 8) / 1000),
            stream: payload.readUInt8(16) === 2 ? "stderr" : "stdout",
            bytes: payload.subarray(17),
          });
        case "dropped":
          return this.#handlers.dropped?.({ fromSequence: readUs(payload, 0), toSequence: readUs(payload, 8) });
        case "fatal":
          return this.#onFatal(payload);
        case "exited":
          return this.#onExited(payload);
        case "probeResult":
          return this.#onProbeResult(frame.stream, payload);
        default:
          return this.#onSessionFrame(frame);
      }
    } catch (error) {
      if (error instanceof RangeError) throw new ForgeError("GUEST_PROTOCOL", `the guest sent a ${frame.type} that is too short or absurd`);
      throw error;
    }
  }

  #onReply(payload: Buffer): void {
    if (this.#isReady) return; // the answer to a repeated hello
    if (payload.readUInt32LE(nonceBytes) !== protocolVersion)
      throw new ForgeError("GUEST_PROTOCOL", "the guest speaks another version of the channel");
    const bootId = payload.subarray(nonceBytes + 4, nonceBytes + 20).toString("hex");
    this.#bootedUs = readUs(payload, nonceBytes + 20);
    this.#bootClockZeroMs = Date.now() - readUs(payload, nonceBytes + 28) / 1000;
    const now = Buffer.alloc(8);
    now.writeBigUInt64LE(BigInt(Date.now()) * 1000n);
    this.#send("time", 0, now);
    this.#isReady = true;
    this.#ready.resolve();
    this.#handlers.booted?.({ bootId, at: this.#at(this.#bootedUs), kernelUs: this.#bootedUs });
  }

  /** Before its power-off the guest waits, for a bounded time, to hear that its last word arrived. */
  async #onFatal(payload: Buffer): Promise<void> {
    const split = payload.indexOf(0);
    if (split === -1) throw new ForgeError("GUEST_PROTOCOL", "the guest sent a failure without a code");
    await this.#handlers.fatal?.({ code: guestText(payload.subarray(0, split)), message: guestText(payload.subarray(split + 1)) });
    this.#send("powerOff", 0);
  }

  async #onExited(payload: Buffer): Promise<void> {
    const event = { at: this.#at(readUs(payload, 0)), status: readExitStatus(payload, 8) };
    await this.#handlers.exited?.(event);
    this.#send("powerOff", 0);
  }

  #onProbeResult(stream: number, payload: Buffer): void {
    const probe = this.#probes.get(stream);
    if (probe === undefined) return this.#passOver("probeResult", stream);
    this.#probes.delete(stream);
    probe.resolve({ ok: payload.readUInt8(0) === 1, detail: guestText(payload.subarray(1)) });
  }

  #onSessionFrame(frame: Frame): void {
    const session = this.#sessions.get(frame.stream);
    if (session !== undefined) return session.receive(frame);
    this.#passOver(frame.type, frame.stream);
  }

  /** What was under way when we closed a session or gave up a probe may still arrive; for a stream never opened nothing may. */
  #passOver(type: GuestFrameType, stream: number): void {
    if (stream === 0 || stream > this.#highestStream)
      throw new ForgeError("GUEST_PROTOCOL", `the guest sent a ${type} that nobody asked for`);
  }

  /** Host time of a moment on the guest's boot clock. */
  #at(bootUs: number): Date {
    const atMs = this.#bootClockZeroMs + bootUs / 1000;
    if (Math.abs(atMs) > 8.64e15) throw new RangeError("no date");
    return new Date(atMs);
  }

  #takeStream(): number {
    if (this.#isOver) throw new ForgeError("CELL_FAILED", "the connection to the cell is closed");
    do {
      this.#lastStream = (this.#lastStream % maxStream) + 1;
    } while (this.#sessions.has(this.#lastStream) || this.#probes.has(this.#lastStream));
    this.#highestStream = Math.max(this.#highestStream, this.#lastStream);
    return this.#lastStream;
  }

  #send(type: GuestFrameType, stream: number, payload?: Uint8Array): void {
    if (this.#isOver || !this.#socket.writable) return;
    this.#socket.write(encodeFrame(type, stream, payload));
    if (this.#socket.writableLength > maxUnsentBytes)
      this.#socket.destroy(new ForgeError("GUEST_PROTOCOL", "the guest does not read what it is sent"));
  }
}

/** The VMM makes its socket a moment after it was spawned: absent or not yet listening is tried again. */
async function openSocket(path: string, signal: AbortSignal): Promise<Socket> {
  for (;;) {
    if (signal.aborted) throw connectError(signal);
    const socket = connectSocket(path);
    const outcome = await new Promise<unknown>((resolve) => socket.once("connect", () => resolve(undefined)).once("error", resolve));
    socket.removeAllListeners("error");
    socket.on("error", () => undefined); // the read loop sees it
    if (outcome === undefined) return socket;
    const code = errnoOf(outcome);
    if (code !== "ENOENT" && code !== "ECONNREFUSED") throw channelError(outcome);
    await delay(10, undefined, { signal }).catch(() => undefined);
  }
}

function connectError(deadline: AbortSignal): ForgeError {
  return deadline.aborted
    ? new ForgeError("GUEST_NOT_READY", "the guest did not answer in time")
    : new ForgeError("UNAVAILABLE", "connecting to the guest was given up");
}

function channelError(thrown: unknown): ForgeError {
  if (thrown instanceof ForgeError) return thrown;
  return new ForgeError("CELL_FAILED", "the connection to the cell broke", { cause: thrown });
}

function uint32(value: number): Buffer {
  const bytes = Buffer.alloc(4);
  bytes.writeUInt32LE(value);
  return bytes;
}

/** A 64-bit count or microseconds; beyond what a number holds exactly it is not honest. */
function readUs(payload: Buffer, offset: number): number {
  const value = payload.readBigUInt64LE(offset);
  if (value > BigInt(Number.MAX_SAFE_INTEGER)) throw new RangeError("beyond 2^53");
  return Number(value);
}
