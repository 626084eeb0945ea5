import { Readable, Writable } from "node:stream";
import { ForgeError } from "../base/errors.ts";
import type { Frame, GuestFrameType } from "./channel-codec.ts";
import { guestText } from "./channel-text.ts";
import type { ExitStatus } from "./channel.ts";

export interface ExecOptions {
  readonly argv: readonly string[];
  /** With a terminal stdout and stderr are one: stdout. */
  readonly tty: boolean;
  readonly columns?: number;
  readonly rows?: number;
  /** Added to the cell's environment. */
  readonly env?: Readonly<Record<string, string>>;
  /** The cell's own where absent. */
  readonly cwd?: string;
}

/** Bytes that may be under way unread, each stream and direction; guest/session.h says the same. */
const outputWindowBytes = 256 * 1024;
const stdinWindowBytes = 64 * 1024;
const stdinChunkBytes = 16 * 1024;
const joinedBytes = 1024;
const streamNumbers = { stdout: 1, stderr: 2 } as const;

/**
 * One program run in a cell. Output is held back in the guest until it is read here; stdin until it is read there.
 * `exited` settles after the last byte of output was handed to the streams.
 */
export class ExecSession {
  readonly stdin: Writable;
  readonly stdout: Readable;
  readonly stderr: Readable;
  readonly started: Promise<void>;
  readonly exited: Promise<ExitStatus>;
  readonly #send: (type: GuestFrameType, payload?: Uint8Array) => void;
  readonly #forget: () => void;
  readonly #started = Promise.withResolvers<void>();
  readonly #exited = Promise.withResolvers<ExitStatus>();
  readonly #outputs: Record<"stdout" | "stderr", CreditedOutput>;
  #stdinCredit = stdinWindowBytes;
  #stdinWaiting: { chunk: Buffer; done: (error?: Error | null) => void } | undefined;

  constructor(options: ExecOptions, send: (type: GuestFrameType, payload?: Uint8Array) => void, forget: () => void) {
    this.#send = send;
    this.#forget = forget;
    this.started = this.#started.promise;
    this.exited = this.#exited.promise;
    this.exited.catch(() => undefined); // a caller may look at `started` only
    this.started.catch(() => undefined);
    this.#outputs = { stdout: this.#makeOutput("stdout"), stderr: this.#makeOutput("stderr") };
    this.stdout = this.#outputs.stdout.readable;
    this.stderr = this.#outputs.stderr.readable;
    this.stdin = new Writable({
      write: (chunk: Buffer, _encoding, done) => {
        this.#stdinWaiting = { chunk, done };
        this.#writeStdin();
      },
      final: (done) => {
        this.#send("stdinEnd");
        done();
      },
    });
    this.stdin.on("error", () => undefined);
    this.#send("exec", encodeExec(options));
  }

  resize(columns: number, rows: number): void {
    const payload = Buffer.alloc(4);
    payload.writeUInt16LE(rows, 0);
    payload.writeUInt16LE(columns, 2);
    this.#send("resize", payload);
  }

  /** Signals the program and what it started in its group. */
  kill(signal: number): void {
    const payload = Buffer.alloc(4);
    payload.writeUInt32LE(signal);
    this.#send("signal", payload);
  }

  /** Hangs up: the program's group gets SIGHUP, then SIGKILL. */
  close(reason: ForgeError = new ForgeError("CELL_FAILED", "the session was closed")): void {
    this.#send("execClose");
    this.fail(reason);
  }

  /** For the channel: ends the session without the guest's word. */
  fail(reason: ForgeError): void {
    this.#started.reject(reason);
    this.#exited.reject(reason);
    this.#finish();
  }

  /** For the channel: a frame of this session. */
  receive(frame: Frame): void {
    const { payload } = frame;
    switch (frame.type) {
      case "execStarted":
        return this.#started.resolve();
      case "output":
        return this.#outputs[payload.readUInt8(0) === streamNumbers.stderr ? "stderr" : "stdout"].push(payload.subarray(1));
      case "stdinCredit":
        this.#stdinCredit += payload.readUInt32LE(0);
        if (this.#stdinCredit > stdinWindowBytes) throw new ForgeError("GUEST_PROTOCOL", "the guest gave more room than the window has");
        return this.#writeStdin();
      case "execExited":
        this.#started.resolve();
        this.#exited.resolve(readExitStatus(payload, 0));
        return this.#finish();
      case "execError":
        return this.fail(new ForgeError("EXEC_FAILED", guestText(payload.subarray(4)), { details: { errno: payload.readUInt32LE(0) } }));
      default:
        throw new ForgeError("GUEST_PROTOCOL", `a ${frame.type} does not belong to a session`);
    }
  }

  #makeOutput(name: "stdout" | "stderr"): CreditedOutput {
    return new CreditedOutput((bytes) => {
      const payload = Buffer.alloc(5);
      payload.writeUInt8(streamNumbers[name], 0);
      payload.writeUInt32LE(bytes, 1);
      this.#send("outputCredit", payload);
    });
  }

  #writeStdin(): void {
    const waiting = this.#stdinWaiting;
    if (waiting === undefined) return;
    while (waiting.chunk.length > 0 && this.#stdinCredit > 0) {
      const part = waiting.chunk.subarray(0, Math.min(this.#stdinCredit, stdinChunkBytes));
      this.#stdinCredit -= part.length;
      waiting.chunk = waiting.chunk.subarray(part.length);
      this.#send("stdin", part);
    }
    if (waiting.chunk.length > 0) return;
    this.#stdinWaiting = undefined;
    waiting.done();
  }

  #finish(): void {
    this.#forget();
    this.#outputs.stdout.end();
    this.#outputs.stderr.end();
    this.stdin.destroy();
  }
}

/** A readable whose reader's pace gives the guest its credit. */
class CreditedOutput {
  readonly readable: Readable;
  readonly #grant: (bytes: number) => void;
  readonly #waiting: Buffer[] = [];
  #credit = outputWindowBytes;
  #ended = false;
  #news = Promise.withResolvers<void>();

  constructor(grant: (bytes: number) => void) {
    this.#grant = grant;
    this.readable = Readable.from(this.#chunks(), { objectMode: true, highWaterMark: 1 });
  }

  push(bytes: Buffer): void {
    if (bytes.length === 0) throw new ForgeError("GUEST_PROTOCOL", "the guest sent output without a byte"); // no credit would bound it
    this.#credit -= bytes.length;
    if (this.#credit < 0) throw new ForgeError("GUEST_PROTOCOL", "the guest sent more output than it was given room for");
    const last = this.#waiting.at(-1);
    // A copy: the chunk it lies in must not live as long as the reader is slow. Small ones join, or 256 Ki of one byte wait.
    if (last !== undefined && last.length + bytes.length <= joinedBytes) this.#waiting.splice(-1, 1, Buffer.concat([last, bytes]));
    else this.#waiting.push(Buffer.from(bytes));
    this.#news.resolve();
  }

  end(): void {
    this.#ended = true;
    this.#news.resolve();
  }

  /** Resumed when the reader has room again: what it took is owed to the guest, in pieces worth a frame. */
  async *#chunks(): AsyncGenerator<Buffer, void, undefined> {
    let owedBytes = 0;
    for (;;) {
      for (let chunk = this.#waiting.shift(); chunk !== undefined; chunk = this.#waiting.shift()) {
        yield chunk;
        owedBytes += chunk.length;
        if (this.#ended || (owedBytes < outputWindowBytes / 4 && this.#waiting.length > 0)) continue;
        this.#credit += owedBytes;
        this.#grant(owedBytes);
        owedBytes = 0;
      }
      if (this.#ended) return;
      await this.#news.promise;
      this.#news = Promise.withResolvers<void>();
    }
  }
}

/** A code is a byte (wait(2)) and signals are 1 to 64 (signal(7)). */
export function readExitStatus(payload: Buffer, offset: number): ExitStatus {
  const kind = payload.readUInt8(offset);
  const value = payload.readUInt32LE(offset + 1);
  if (kind === 0 && value <= 255) return { code: value };
  if (kind === 1 && value >= 1 && value <= 64) return { signal: value };
  throw new ForgeError("GUEST_PROTOCOL", "the guest told an exit that no process can make");
}

function encodeExec(options: ExecOptions): Buffer {
  const env = Object.entries(options.env ?? {}).map(([name, value]) => `${name}=${value}`);
  const words = [options.cwd ?? "", ...options.argv, ...env];
  if (options.argv.length === 0) throw new ForgeError("INVALID_INPUT", "exec needs a program");
  if (words.some((word) => word.includes("\0"))) throw new ForgeError("INVALID_INPUT", "an argument holds a NUL byte");
  const head = Buffer.alloc(10);
  head.writeUInt8(options.tty ? 1 : 0, 0);
  head.writeUInt16LE(options.rows ?? 24, 2);
  head.writeUInt16LE(options.columns ?? 80, 4);
  head.writeUInt16LE(options.argv.length, 6);
  head.writeUInt16LE(env.length, 8);
  return Buffer.concat([head, Buffer.from(words.map((word) => `${word}\0`).join(""), "utf8")]);
}
