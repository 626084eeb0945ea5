import { crc32 } from "node:zlib";
import { type ChainEntry, chainEntrySchema } from "./chain.ts";
import { canonicalJson } from "./canonical.ts";

/**
 * The form of a spool's segment file: frames one after the other, each the entries of one durable write. A frame is a
 * header line of fixed size, then one line of canonical JSON an entry; no byte of it is ever NUL.
 *
 *     #<bytes of the body, 8 hex> <CRC-32 of the body, 8 hex> <CRC-32 of the 18 characters before, 8 hex>\n
 *
 * The header has a checksum of its own, so that an altered length cannot make acknowledged entries look half-written.
 */
const headerBytes = 28;
const headerPattern = /^#([0-9a-f]{8}) ([0-9a-f]{8}) ([0-9a-f]{8})\n$/;
/** The smallest unit a disk writes or does not write. */
const sectorBytes = 512;

export function encodeFrame(entries: readonly ChainEntry[]): Buffer {
  const body = Buffer.from(entries.map((entry) => `${canonicalJson(entry)}\n`).join(""));
  const start = `#${hex(body.length)} ${hex(crc32(body))}`;
  return Buffer.concat([Buffer.from(`${start} ${hex(crc32(start))}\n`), body]);
}

export interface ParsedSegment {
  readonly entries: ChainEntry[];
  /** Bytes of the whole frames from the start. */
  readonly goodBytes: number;
  /** What follows them: nothing, the remains of a write that a crash interrupted, or a changed byte. */
  readonly end: "clean" | "torn" | "corrupt";
}

/** Reads frames until the end or the first that is not whole. Never throws, whatever the bytes. */
export function parseSegment(bytes: Buffer): ParsedSegment {
  const entries: ChainEntry[] = [];
  let offset = 0;
  while (offset < bytes.length) {
    const frame = parseFrame(bytes, offset);
    if (frame === "torn" || frame === "corrupt") return { entries, goodBytes: offset, end: frame };
    for (const entry of frame.entries) entries.push(entry);
    offset = frame.end;
  }
  return { entries, goodBytes: offset, end: "clean" };
}

function parseFrame(bytes: Buffer, start: number): { entries: ChainEntry[]; end: number } | "torn" | "corrupt" {
  const bodyStart = start + headerBytes;
  if (bodyStart > bytes.length) return looksUnwritten(bytes, start) || isHeaderPrefix(bytes.subarray(start)) ? "torn" : "corrupt";
  const header = headerPattern.exec(bytes.toString("latin1", start, bodyStart));
  if (header === null || hex(crc32(bytes.subarray(start, start + 18))) !== header[3])
    return looksUnwritten(bytes, start) ? "torn" : "corrupt";
  const end = bodyStart + Number.parseInt(header[1] ?? "", 16);
  if (end > bytes.length) return "torn";
  const body = bytes.subarray(bodyStart, end);
  if (hex(crc32(body)) !== header[2]) return end === bytes.length && looksUnwritten(bytes, start) ? "torn" : "corrupt";
  const entries = parseBody(body);
  return entries === undefined ? "corrupt" : { entries, end };
}

/** The entries of a body whose checksum is right; undefined where it is still not what encodeFrame writes. */
function parseBody(body: Buffer): ChainEntry[] | undefined {
  const lines = body.toString("utf8").split("\n");
  if (lines.pop() !== "" || lines.length === 0) return undefined;
  const entries: ChainEntry[] = [];
  for (const line of lines) {
    const entry = parseLine(line);
    if (entry === undefined) return undefined;
    entries.push(entry);
  }
  return entries;
}

function parseLine(line: string): ChainEntry | undefined {
  try {
    const entry = chainEntrySchema.safeParse(JSON.parse(line)).data;
    return entry !== undefined && canonicalJson(entry) === line ? entry : undefined;
  } catch {
    return undefined; // not JSON
  }
}

/**
 * A crash leaves each sector of an append either written or not, and one not written reads as zeros. A damaged frame
 * with no such sector was not torn by a crash: somebody or something changed a byte.
 */
function looksUnwritten(bytes: Buffer, start: number): boolean {
  for (let from = start; from < bytes.length;) {
    const to = Math.min(bytes.length, from - (from % sectorBytes) + sectorBytes);
    if (bytes.subarray(from, to).every((byte) => byte === 0)) return true;
    from = to;
  }
  return false;
}

function isHeaderPrefix(bytes: Buffer): boolean {
  const text = bytes.toString("latin1");
  return headerPattern.test(text + "#00000000 00000000 00000000\n".slice(text.length));
}

function hex(value: number): string {
  return value.toString(16).padStart(8, "0");
}
