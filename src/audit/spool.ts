import { createPublicKey } from "node:crypto";
import { constants } from "node:fs";
import { type FileHandle, open, readdir, readFile } from "node:fs/promises";
import { join } from "node:path";
import { z } from "zod";
import { appendDurable, makeDirectory, readIfExists, removeDurable, syncDirectory, writeDurable } from "../base/durable.ts";
import { errnoOf, ForgeError } from "../base/errors.ts";
import { type ChainEntry, checkLink, eventText, genesis, type Head, isSigned, linkText } from "./chain.ts";
import { type AuditEvent, newEvent } from "./event.ts";
import { encodeFrame, parseSegment } from "./segment.ts";
import type { Signer } from "./signer.ts";

/** The part of an open file that the spool writes through; tests put failing disks behind it. */
export interface SegmentFile {
  size(): Promise<number>;
  /** Resolves when the bytes are on stable storage. */
  append(bytes: Uint8Array): Promise<void>;
  /** Resolves when the shorter length is on stable storage. */
  truncate(sizeBytes: number): Promise<void>;
  close(): Promise<void>;
}

export interface SpoolOptions {
  /** A segment is closed before it grows beyond this. */
  readonly segmentBytes?: number;
  /** Entries not acknowledged by the region may take this much disk; beyond it appends fail closed. */
  readonly maxUnshippedBytes?: number;
  readonly openSegment?: (path: string) => Promise<SegmentFile>;
}

interface Segment {
  readonly path: string;
  readonly first: number;
  last: number;
  bytes: number;
}

interface Waiting {
  readonly texts: readonly string[];
  readonly bytes: number;
  readonly resolve: (entries: ChainEntry[]) => void;
  readonly reject: (error: unknown) => void;
}

/** One append, and one durable write, may be this large. */
const maxAppendBytes = 1024 * 1024;
/** One read() returns entries until their events are this large. */
const maxReadBytes = 1024 * 1024;
/** What surrounds an event in its segment, at most: the entry's other members and the frame's header. */
const entryOverheadBytes = 352;
const segmentName = /^[0-9]{16}\.jsonl$/;
const headSchema = z.strictObject({ sequence: z.int().min(0), hash: z.string().regex(/^[0-9a-f]{64}$/) });

/**
 * A node's events until the region has them: chained, signed, and on stable storage before append() resolves.
 * Sequence numbers have no gaps and never repeat. One process at a time may have a spool open.
 *
 * An append that rejects was not recorded, with one exception: a crash right after the failure may leave it recorded.
 */
export class Spool {
  readonly #folder: string;
  readonly #signer: Signer;
  readonly #options: Required<SpoolOptions>;
  /** Oldest first. */
  readonly #segments: Segment[];
  #head: Head;
  #acknowledged: Head;
  /** The last segment, while it takes more frames. */
  #open: { segment: Segment; file: SegmentFile } | undefined;
  /** Set while a failed write has not been undone; nothing is appended before it is. */
  #undo: Segment | undefined;
  /** Facts about the spool itself, recorded in front of the next append. */
  #own: string[];
  readonly #queue: Waiting[] = [];
  #queuedBytes = 0;
  #writing: Promise<void> | undefined;
  #acknowledging: Promise<void> = Promise.resolve();
  #closed = false;

  private constructor(folder: string, signer: Signer, options: Required<SpoolOptions>, found: Found) {
    this.#folder = folder;
    this.#signer = signer;
    this.#options = options;
    this.#segments = found.segments;
    this.#head = found.head;
    this.#acknowledged = found.acknowledged;
    this.#own = found.recovered;
  }

  /**
   * Opens or creates the spool in a folder. The remains of a write that a crash interrupted are cut off, which the
   * next append records; anything else that is not as it was written is refused with AUDIT_BROKEN.
   */
  static async open(folder: string, signer: Signer, options: SpoolOptions = {}): Promise<Spool> {
    const all = { segmentBytes: 1024 * 1024, maxUnshippedBytes: 256 * 1024 * 1024, openSegment: openSegmentFile, ...options };
    await makeDirectory(folder);
    return new Spool(folder, signer, all, await examine(folder, signer, all));
  }

  get head(): Head {
    return this.#head;
  }

  /** What the region does not have yet. `bytes` is an upper bound: whole segments are counted. */
  pending(): { entries: number; bytes: number; acknowledged: Head } {
    const bytes = this.#segments.reduce((sum, segment) => sum + (segment.last > this.#acknowledged.sequence ? segment.bytes : 0), 0);
    return { entries: this.#head.sequence - this.#acknowledged.sequence, bytes, acknowledged: this.#acknowledged };
  }

  /**
   * Records events, all or none, in this order. Resolves with their entries once they are on stable storage; appends
   * that arrive during a write share the next one.
   */
  append(events: readonly AuditEvent[]): Promise<ChainEntry[]> {
    return new Promise((resolve, reject) => {
      const texts = events.map(eventText); // refuses bad events now
      const bytes = texts.reduce((sum, text) => sum + Buffer.byteLength(JSON.stringify(text)) + entryOverheadBytes, 0);
      if (bytes > maxAppendBytes) throw new ForgeError("TOO_LARGE", `one append of more than ${maxAppendBytes} bytes of events`);
      if (this.#closed) throw new ForgeError("AUDIT_UNAVAILABLE", "the audit spool of this node is closed");
      const pending = this.pending();
      if (pending.bytes + this.#queuedBytes + bytes > this.#options.maxUnshippedBytes) {
        const waiting = `${pending.entries} events wait to be shipped to the region`;
        throw new ForgeError("AUDIT_UNAVAILABLE", `the audit spool of this node is full: ${waiting}`);
      }
      this.#queue.push({ texts, bytes, resolve, reject });
      this.#queuedBytes += bytes;
      this.#writing ??= this.#drain();
    });
  }

  /** Durable entries after a sequence number, oldest first, at most `limit` and about 1 MiB. */
  async read(afterSequence: number, limit: number): Promise<ChainEntry[]> {
    const oldest = this.#segments[0]?.first ?? this.#head.sequence + 1;
    if (afterSequence + 1 < oldest && afterSequence < this.#head.sequence) {
      throw new ForgeError(
        "AUDIT_BROKEN",
        `entries ${afterSequence + 1} to ${oldest - 1} were acknowledged by the region and are gone from the spool`,
      );
    }
    const durable = this.#head.sequence;
    const entries: ChainEntry[] = [];
    let bytes = 0;
    for (const segment of this.#segments.filter(({ last }) => last > afterSequence)) {
      for (const entry of parseSegment(await readFile(segment.path)).entries) {
        if (entry.sequence <= afterSequence) continue;
        if (entry.sequence > durable || entries.length >= limit || bytes >= maxReadBytes) return entries;
        entries.push(entry);
        bytes += entry.event.length;
      }
    }
    return entries;
  }

  /** The region has everything up to here, durably: whole segments of it may go. The head is kept. */
  acknowledge(throughSequence: number): Promise<void> {
    const after = this.#acknowledging.then(() => this.#acknowledge(throughSequence)); // one at a time: it never goes back
    this.#acknowledging = after.catch(() => undefined); // reported to its own caller
    return after;
  }

  /** Waits for what is under way; later appends are refused. */
  async close(): Promise<void> {
    this.#closed = true;
    await this.#writing;
    await this.#acknowledging;
    await this.#giveUpOpen();
  }

  async #acknowledge(throughSequence: number): Promise<void> {
    if (throughSequence <= this.#acknowledged.sequence) return;
    if (throughSequence > this.#head.sequence) {
      throw new ForgeError(
        "AUDIT_BROKEN",
        `the region acknowledges entry ${throughSequence}, this node's spool ends at ${this.#head.sequence}`,
      );
    }
    const [entry] = await this.read(throughSequence - 1, 1);
    if (entry?.sequence !== throughSequence) throw new ForgeError("AUDIT_BROKEN", `entry ${throughSequence} of the spool cannot be read`);
    const head = { sequence: entry.sequence, hash: entry.hash };
    await writeDurable(acknowledgedPath(this.#folder), JSON.stringify(head));
    this.#acknowledged = head;
    await this.#trim();
  }

  /** Removes segments the region has wholly, except the last; in order, so that a crash leaves no hole. */
  async #trim(): Promise<void> {
    for (let oldest = this.#segments[0]; this.#segments.length > 1 && oldest !== undefined; oldest = this.#segments[0]) {
      if (oldest.last > this.#acknowledged.sequence) return;
      await removeDurable(oldest.path);
      this.#segments.shift();
    }
  }

  async #drain(): Promise<void> {
    while (this.#queue.length > 0) {
      const batch = this.#takeBatch();
      try {
        const entries = await this.#write(batch.flatMap(({ texts }) => texts));
        let from = 0;
        for (const { texts, resolve } of batch) resolve(entries.slice(from, (from += texts.length)));
      } catch (error) {
        const failure = describe(error);
        for (const { reject } of batch) reject(failure);
      }
    }
    this.#writing = undefined;
  }

  /** As many of the waiting appends as one write may carry; at least one. */
  #takeBatch(): Waiting[] {
    const batch: Waiting[] = [];
    let bytes = 0;
    for (
      let next = this.#queue[0];
      next !== undefined && (batch.length === 0 || bytes + next.bytes <= maxAppendBytes);
      next = this.#queue[0]
    ) {
      this.#queue.shift();
      this.#queuedBytes -= next.bytes;
      bytes += next.bytes;
      batch.push(next);
    }
    return batch;
  }

  /** Links, signs and writes events as one frame; the head moves only once the frame is durable. */
  async #write(texts: readonly string[]): Promise<ChainEntry[]> {
    await this.#undoFailedWrite();
    let head = this.#head;
    const own = this.#own;
    const entries = [...own, ...texts].map((text) => {
      const entry = linkText(head, text, this.#signer);
      head = { sequence: entry.sequence, hash: entry.hash };
      return entry;
    });
    const frame = encodeFrame(entries);
    const { segment, file } = await this.#segmentFor(frame.length);
    if ((await file.size()) !== segment.bytes) throw new ForgeError("AUDIT_BROKEN", `${segment.path} was changed by someone else`);
    this.#undo = segment;
    await file.append(frame);
    if (segment.bytes === 0) await syncDirectory(this.#folder);
    this.#undo = undefined;
    if (segment.bytes === 0) this.#segments.push(segment);
    segment.bytes += frame.length;
    segment.last = head.sequence;
    this.#head = head;
    this.#own = [];
    return entries.slice(own.length);
  }

  /** The segment that takes the next frame: the open one, or a new one where that is full or was given up. */
  async #segmentFor(frameBytes: number): Promise<{ segment: Segment; file: SegmentFile }> {
    if (this.#open !== undefined && this.#open.segment.bytes + frameBytes <= this.#options.segmentBytes) return this.#open;
    await this.#giveUpOpen();
    const first = this.#head.sequence + 1;
    const segment = { path: join(this.#folder, `${String(first).padStart(16, "0")}.jsonl`), first, last: this.#head.sequence, bytes: 0 };
    this.#open = { segment, file: await this.#options.openSegment(segment.path) };
    return this.#open;
  }

  /**
   * After a failed write or fdatasync nobody knows what is on the disk (a second fdatasync may lie): the segment is cut
   * back to what is known and given up, or removed where it was new. Fails as long as that fails.
   */
  async #undoFailedWrite(): Promise<void> {
    if (this.#undo === undefined) return;
    const { path, bytes } = this.#undo;
    await this.#giveUpOpen();
    if (bytes === 0) await removeDurable(path);
    else await cutBack(path, bytes, this.#options);
    this.#undo = undefined;
  }

  async #giveUpOpen(): Promise<void> {
    const given = this.#open;
    this.#open = undefined;
    await given?.file.close();
  }
}

interface Found {
  segments: Segment[];
  head: Head;
  acknowledged: Head;
  /** Texts of events that record what was mended. */
  recovered: string[];
}

/** Reads the whole folder and checks every link; the last signature covers all before it. Cuts a torn end. */
async function examine(folder: string, signer: Signer, options: Required<SpoolOptions>): Promise<Found> {
  const acknowledged = await readAcknowledged(folder);
  const found: Found = { segments: [], head: acknowledged, acknowledged, recovered: [] };
  const names = (await readdir(folder)).filter((name) => segmentName.test(name)).toSorted();
  let last: ChainEntry | undefined;
  for (const [index, name] of names.entries()) {
    const path = join(folder, name);
    const bytes = await readFile(path);
    const { entries, goodBytes, end } = parseSegment(bytes);
    if (end === "corrupt" || (end === "torn" && index < names.length - 1)) {
      throw new ForgeError("AUDIT_BROKEN", `the audit spool is damaged: ${path} was changed at or after byte ${goodBytes}`);
    }
    for (const entry of entries) {
      checkNext(entry, last, acknowledged, path);
      last = entry;
    }
    if (end === "torn") {
      await cutBack(path, goodBytes, options);
      found.recovered.push(recoveredText(name, bytes.length - goodBytes));
    }
    const first = entries[0]?.sequence;
    if (first !== undefined) found.segments.push({ path, first, last: entries.at(-1)?.sequence ?? first, bytes: goodBytes });
    else await removeDurable(path); // an empty file: its first write never happened
  }
  if (last === undefined) return found;
  if (last.sequence < acknowledged.sequence) {
    throw new ForgeError(
      "AUDIT_BROKEN",
      `the audit spool ends at entry ${last.sequence}, but the region already has ${acknowledged.sequence}`,
    );
  }
  if (!isSigned(last, createPublicKey(signer.publicKeyPem))) {
    throw new ForgeError("AUDIT_BROKEN", `entry ${last.sequence} of the audit spool is not signed by this node's key`);
  }
  return { ...found, head: { sequence: last.sequence, hash: last.hash } };
}

/** The entry must follow the one before it; the first one found must follow genesis or what was acknowledged. */
function checkNext(entry: ChainEntry, before: ChainEntry | undefined, acknowledged: Head, path: string): void {
  const previous =
    before ?? (entry.sequence <= acknowledged.sequence ? { sequence: entry.sequence - 1, hash: entry.previous } : acknowledged);
  const problem = checkLink(entry, previous);
  if (problem !== undefined)
    throw new ForgeError("AUDIT_BROKEN", `the audit spool is damaged: ${problem} at entry ${entry.sequence} in ${path}`);
  if (entry.sequence === acknowledged.sequence && entry.hash !== acknowledged.hash) {
    throw new ForgeError("AUDIT_BROKEN", `entry ${entry.sequence} of the audit spool is not the one the region has`);
  }
}

async function cutBack(path: string, sizeBytes: number, options: Required<SpoolOptions>): Promise<void> {
  const file = await options.openSegment(path);
  try {
    await file.truncate(sizeBytes);
  } finally {
    await file.close();
  }
}

function recoveredText(segment: string, cutBytes: number): string {
  const details = { segment, cutBytes };
  return eventText(newEvent({ tenant: null, kind: "node.spool-recovered", actor: "node", outcome: "success", subject: "spool", details }));
}

async function readAcknowledged(folder: string): Promise<Head> {
  const text = await readIfExists(acknowledgedPath(folder));
  if (text === undefined) return genesis;
  try {
    return headSchema.parse(JSON.parse(text.toString()));
  } catch (error) {
    throw new ForgeError("AUDIT_BROKEN", `${acknowledgedPath(folder)} is damaged`, { cause: error });
  }
}

function acknowledgedPath(folder: string): string {
  return join(folder, "acknowledged.json");
}

export async function openSegmentFile(path: string): Promise<SegmentFile> {
  const file: FileHandle = await open(path, constants.O_RDWR | constants.O_CREAT | constants.O_APPEND, 0o600);
  return {
    size: async () => (await file.stat()).size,
    append: (bytes) => appendDurable(file, bytes),
    async truncate(sizeBytes) {
      await file.truncate(sizeBytes);
      await file.datasync();
    },
    close: () => file.close(),
  };
}

function describe(error: unknown): ForgeError {
  if (error instanceof ForgeError) return error;
  const errno = errnoOf(error);
  if (errno === "ENOSPC" || errno === "EDQUOT")
    return new ForgeError("DISK_FULL", "the audit spool of this node cannot be written: the disk is full", { cause: error });
  return new ForgeError("AUDIT_UNAVAILABLE", `the audit spool of this node cannot be written (${errno ?? String(error)})`, {
    cause: error,
  });
}
