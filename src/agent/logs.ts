import { isUtf8 } from "node:buffer";
import { EventEmitter, once } from "node:events";
import { createReadStream } from "node:fs";
import { type FileHandle, mkdir, open, readdir, rm, stat } from "node:fs/promises";
import { join } from "node:path";
import { createInterface } from "node:readline";
import type { LogLine } from "../api/resources.ts";
import { errnoOf } from "../base/errors.ts";

/**
 * What a cell wrote, on the node's disk: one record a chunk as the guest sent it, so that writing keeps no state and a
 * crash loses no half line. Readers assemble lines. Bounded: the oldest file goes when there are too many.
 */

const fileBytes = 8 * 1024 * 1024;
const filesKept = 4;
const lineBytesMax = 16 * 1024;

export type LogStream = LogLine["stream"];

interface LogRecord {
  /** Boot of the cell, 1 for its first; the guest's sequence starts anew with each. */
  readonly boot: number;
  /** The guest's sequence number; 0 for what the agent itself says. */
  readonly sequence: number;
  readonly time: string;
  readonly stream: LogStream;
  readonly text?: string;
  /** Base64, where the bytes are not UTF-8. */
  readonly bytes?: string;
}

export class CellLog {
  readonly #dir: string;
  readonly #cellId: string;
  readonly #changes = new EventEmitter();
  #file: FileHandle | undefined;
  #path = "";
  #sizeBytes = 0;
  #queue: Promise<void> = Promise.resolve();
  #closed = false;

  private constructor(dir: string, cellId: string) {
    this.#dir = dir;
    this.#cellId = cellId;
    this.#changes.setMaxListeners(64);
  }

  static async open(dir: string, cellId: string): Promise<CellLog> {
    await mkdir(dir, { recursive: true, mode: 0o700 });
    return new CellLog(dir, cellId);
  }

  /** Appends a chunk; resolves when the kernel has it (it then survives the agent, and dies with the machine as the cell does). */
  append(boot: number, sequence: number, time: Date, stream: LogStream, bytes: Uint8Array): Promise<void> {
    const buffer = Buffer.from(bytes.buffer, bytes.byteOffset, bytes.byteLength);
    const content = isUtf8(buffer) ? { text: buffer.toString("utf8") } : { bytes: buffer.toString("base64") };
    const record: LogRecord = { boot, sequence, time: time.toISOString(), stream, ...content };
    const written = this.#queue.then(() => this.#write(`${JSON.stringify(record)}\n`));
    this.#queue = written.catch(() => undefined); // one failed write must not fail those after it
    return written;
  }

  /** A line of the agent's own, among the cell's. */
  async say(boot: number, message: string): Promise<void> {
    await this.append(boot, 0, new Date(), "system", Buffer.from(`${message}\n`));
  }

  /** The last guest sequence of this boot that is on disk; 0 for none. */
  async lastSequence(boot: number): Promise<number> {
    await this.#queue;
    let last = 0;
    for (const path of (await this.#paths()).slice(-2)) {
      for await (const record of readRecords(path, 0)) if (record.boot === boot && record.sequence > last) last = record.sequence;
    }
    return last;
  }

  /** The last `tail` lines, then, when following, every new one until the signal. */
  async *lines(options: { tail: number; follow: boolean; signal: AbortSignal }): AsyncGenerator<LogLine> {
    await this.#queue;
    const assembler = new LineAssembler(this.#cellId);
    const kept: LogLine[] = [];
    let position = { path: "", offset: 0 };
    for (const path of await this.#paths()) {
      const end = await this.#wholeBytes(path);
      for await (const record of readRecords(path, 0, end)) {
        kept.push(...assembler.push(record));
        if (kept.length > options.tail * 2 + 1024) kept.splice(0, kept.length - options.tail);
      }
      position = { path, offset: end };
    }
    if (!options.follow) kept.push(...assembler.end());
    yield* options.tail === 0 ? [] : kept.slice(-options.tail);
    if (options.follow) yield* this.#follow(position, assembler, options.signal);
  }

  /** Forgets everything the cell wrote. */
  async remove(): Promise<void> {
    await this.close();
    await rm(this.#dir, { recursive: true, force: true });
  }

  async close(): Promise<void> {
    this.#closed = true;
    await this.#queue;
    await this.#file?.close();
    this.#file = undefined;
    this.#changes.emit("change");
  }

  async *#follow(from: { path: string; offset: number }, assembler: LineAssembler, signal: AbortSignal): AsyncGenerator<LogLine> {
    let { path, offset } = from;
    while (!signal.aborted) {
      const changed = once(this.#changes, "change", { signal }).catch(() => undefined); // aborted: the loop ends
      const paths = await this.#paths();
      for (const next of paths.slice(Math.max(0, paths.indexOf(path)))) {
        const start = next === path ? offset : 0;
        const end = await this.#wholeBytes(next);
        for await (const record of readRecords(next, start, end)) yield* assembler.push(record);
        path = next;
        offset = end;
      }
      if (this.#closed) return;
      await changed;
    }
  }

  /** The length of a file up to its last whole record: a write under way is not read half. */
  async #wholeBytes(path: string): Promise<number> {
    return path === this.#path ? this.#sizeBytes : sizeOf(path);
  }

  async #write(text: string): Promise<void> {
    if (this.#closed) return;
    if (this.#file === undefined || this.#sizeBytes >= fileBytes) await this.#rotate();
    const bytes = Buffer.from(text);
    try {
      await this.#file?.appendFile(bytes);
    } catch (error) {
      await this.#file?.close().catch(() => undefined); // opened anew, which ends the record that was cut short
      this.#file = undefined;
      throw error;
    }
    this.#sizeBytes += bytes.length;
    this.#changes.emit("change");
  }

  /** Opens the newest file, or begins a new one when that is full; drops the oldest beyond the bound. */
  async #rotate(): Promise<void> {
    await this.#file?.close();
    this.#file = undefined;
    const paths = await this.#paths();
    const newest = paths.at(-1);
    const reuse = newest !== undefined && (await sizeOf(newest)) < fileBytes ? newest : undefined;
    for (const old of paths.slice(0, Math.max(0, paths.length - (reuse === undefined ? filesKept - 1 : filesKept))))
      await rm(old, { force: true });
    const path = reuse ?? join(this.#dir, `${String(numberOf(newest) + 1).padStart(8, "0")}.ndjson`);
    this.#file = await open(path, "a", 0o600);
    this.#path = path;
    this.#sizeBytes = await sizeOf(path);
    if (reuse !== undefined) await this.#endTornRecord(path);
  }

  /** A crash may have cut the last record short: close its line, so that the next record is whole. */
  async #endTornRecord(path: string): Promise<void> {
    if (this.#sizeBytes === 0) return;
    const reader = await open(path, "r");
    try {
      const last = Buffer.alloc(1);
      await reader.read(last, 0, 1, this.#sizeBytes - 1);
      if (last[0] !== 0x0a) this.#sizeBytes += (await this.#file?.write("\n"))?.bytesWritten ?? 0;
    } finally {
      await reader.close();
    }
  }

  async #paths(): Promise<string[]> {
    const names = (await readdir(this.#dir).catch(() => [])).filter((name) => name.endsWith(".ndjson"));
    return names.sort().map((name) => join(this.#dir, name));
  }
}

/** Chunks to lines, per stream; a line longer than the bound is cut, and says so by being continued. */
class LineAssembler {
  readonly #cellId: string;
  readonly #rest = new Map<LogStream, { time: string; text: string }>();

  constructor(cellId: string) {
    this.#cellId = cellId;
  }

  push(record: LogRecord): LogLine[] {
    const text = record.text ?? Buffer.from(record.bytes ?? "", "base64").toString("utf8");
    const pending = this.#rest.get(record.stream);
    const pieces = ((pending?.text ?? "") + text).split("\n");
    const rest = pieces.pop() ?? "";
    const lines = pieces.map((message, index) =>
      this.#line(index === 0 ? (pending?.time ?? record.time) : record.time, record.stream, message),
    );
    if (rest.length >= lineBytesMax) lines.push(this.#line(record.time, record.stream, rest));
    if (rest === "" || rest.length >= lineBytesMax) this.#rest.delete(record.stream);
    else this.#rest.set(record.stream, { time: pieces.length === 0 ? (pending?.time ?? record.time) : record.time, text: rest });
    return lines;
  }

  /** What was written without an end of line. */
  end(): LogLine[] {
    return [...this.#rest].map(([stream, { time, text }]) => this.#line(time, stream, text));
  }

  #line(time: string, stream: LogStream, message: string): LogLine {
    return { cell: this.#cellId, time, stream, message: message.endsWith("\r") ? message.slice(0, -1) : message };
  }
}

async function* readRecords(path: string, start: number, end?: number): AsyncGenerator<LogRecord> {
  if (end !== undefined && end <= start) return;
  const input = createReadStream(path, { start, ...(end === undefined ? {} : { end: end - 1 }) });
  try {
    for await (const line of createInterface({ input, crlfDelay: Infinity })) {
      const record = parseRecord(line);
      if (record !== undefined) yield record;
    }
  } catch (error) {
    if (errnoOf(error) !== "ENOENT") throw error; // rotated away under us: it had nothing more to give
  }
}

/** A record cut short by a crash is passed over. */
function parseRecord(line: string): LogRecord | undefined {
  if (!line.startsWith("{") || !line.endsWith("}")) return undefined;
  try {
    return JSON.parse(line) as LogRecord;
  } catch {
    return undefined;
  }
}

async function sizeOf(path: string): Promise<number> {
  return stat(path).then(
    (found) => found.size,
    () => 0,
  );
}

function numberOf(path: string | undefined): number {
  return path === undefined ? 0 : Number.parseInt(path.slice(-15, -7), 10);
}
