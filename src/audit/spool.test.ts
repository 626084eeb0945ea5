import { appendFile, mkdtemp, readdir, readFile, rename, rm, stat, truncate, unlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { run } from "../base/exec.ts";
import { type ChainEntry, verifyChain } from "./chain.ts";
import { type AuditEvent, newEvent } from "./event.ts";
import { fileSigner, type Signer } from "./signer.ts";
import { openSegmentFile, type SegmentFile, Spool, type SpoolOptions } from "./spool.ts";

let folder = "";
let signer: Signer;
const opened: Spool[] = [];

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), "forge-spool-"));
  signer = await fileSigner(join(folder, "key"));
});

afterEach(async () => {
  for (const spool of opened.splice(0)) await spool.close();
  await rm(folder, { recursive: true, force: true });
});

describe("append", () => {
  test("resolves with chained, signed entries that are on disk", async () => {
    const spool = await open();
    const entries = await spool.append([event("a"), event("b")]);
    expect(entries.map(({ sequence }) => sequence)).toEqual([1, 2]);
    expect(await readFile(join(folder, "spool", "0000000000000001.jsonl"), "utf8")).toContain(entries[1]!.hash);
    expect(await verifyChain(entries, signer.publicKeyPem, spool.head)).toMatchObject({ ok: true, entries: 2 });
  });

  test("keeps order and gives each caller its own entries when many append at once", async () => {
    const writes = countingFiles();
    const spool = await open({ openSegment: writes.open });
    const names = Array.from({ length: 100 }, (_, index) => `e${index}`);
    const results = await Promise.all(names.map(async (name) => await spool.append([event(name), event(`${name}b`)])));
    expect(results.flat().map(({ sequence }) => sequence)).toEqual(Array.from({ length: 200 }, (_, index) => index + 1));
    expect(results.map((entries) => subjectOf(entries[0]!))).toEqual(names);
    expect(writes.count).toBeLessThanOrEqual(3); // the first alone, the rest together
  });

  test("an append of nothing is nothing", async () => {
    const spool = await open();
    expect(await spool.append([])).toEqual([]);
    expect(spool.head.sequence).toBe(0);
  });

  test("refuses an invalid event and records none of its append", async () => {
    const spool = await open();
    const invalid = { ...event("a"), kind: "no.kind" } as unknown as AuditEvent;
    await expect(spool.append([event("a"), invalid])).rejects.toMatchObject({ code: "INVALID_INPUT" });
    expect(spool.head.sequence).toBe(0);
  });

  test("refuses one append that is too large", async () => {
    const spool = await open();
    const large = Array.from({ length: 40 }, () => event("x".repeat(500), "y".repeat(30_000)));
    await expect(spool.append(large)).rejects.toMatchObject({ code: "TOO_LARGE" });
  });

  test("fails closed when too much waits to be shipped, and recovers when it is shipped", async () => {
    const spool = await open({ segmentBytes: 2000, maxUnshippedBytes: 6000 });
    await expect(fill(spool)).rejects.toMatchObject({ code: "AUDIT_UNAVAILABLE" });
    const { bytes } = spool.pending();
    expect(bytes).toBeLessThanOrEqual(6000);
    await spool.acknowledge(spool.head.sequence);
    expect(spool.pending()).toMatchObject({ entries: 0, bytes: 0 });
    await spool.append([event("again")]);
  });

  test("after close is refused", async () => {
    const spool = await open();
    await spool.close();
    await expect(spool.append([event("a")])).rejects.toMatchObject({ code: "AUDIT_UNAVAILABLE" });
  });
});

describe("reopening", () => {
  test("continues the chain over several segments", async () => {
    for (let round = 0; round < 3; round++) {
      const spool = await open({ segmentBytes: 1500 });
      for (let index = 0; index < 5; index++) await spool.append([event(`e${index}`)]);
      await spool.close();
    }
    const spool = await open();
    expect((await readdir(join(folder, "spool"))).length).toBeGreaterThan(3);
    expect(await verifyChain(await spool.read(0, 100), signer.publicKeyPem, spool.head)).toMatchObject({ ok: true, entries: 15 });
  });

  test("cuts a torn end, and says so in the log itself", async () => {
    const path = await filled(3);
    const cut = 7;
    await truncate(path, (await stat(path)).size - cut);
    const spool = await open();
    expect(spool.head.sequence).toBe(2);
    await spool.append([event("next")]);
    const entries = await spool.read(2, 10);
    expect(entries.map(kindOf)).toEqual(["node.spool-recovered", "cell.ready"]);
    expect(await verifyChain(await spool.read(0, 10), signer.publicKeyPem)).toMatchObject({ ok: true, entries: 4 });
  });

  test.each([
    ["a changed byte in the middle", async (path: string) => await flip(path, 200)],
    ["a changed byte at the end", async (path: string) => await flip(path, (await stat(path)).size - 20)],
    ["an entry appended by hand", async (path: string) => await appendFile(path, (await readFile(path)).subarray(0, 300))],
    ["a torn segment before the last", async (path: string) => await truncate(path, 700)],
    ["a segment that is gone", async (path: string) => await rename(path, path.replace(/1\.jsonl$/, "9.jsonl"))],
  ])("refuses %s", async (_, damage) => {
    const path = await filled(3);
    await appendMore();
    await damage(path);
    await expect(open()).rejects.toMatchObject({ code: "AUDIT_BROKEN" });
  });

  test("refuses a spool that another key signed", async () => {
    await filled(2);
    signer = await fileSigner(join(folder, "other-key"));
    await expect(open()).rejects.toMatchObject({ code: "AUDIT_BROKEN" });
  });

  test("refuses a spool that lost what the region has", async () => {
    const path = await filled(3);
    const spool = await open();
    await spool.acknowledge(3);
    await spool.close();
    await truncate(path, (await stat(path)).size - 7);
    await expect(open()).rejects.toMatchObject({ code: "AUDIT_BROKEN" });
  });

  test("refuses a damaged record of what was acknowledged", async () => {
    await filled(1);
    await writeFile(join(folder, "spool", "acknowledged.json"), "{");
    await expect(open()).rejects.toMatchObject({ code: "AUDIT_BROKEN" });
  });

  test("notices a second writer", async () => {
    const path = await filled(1);
    const spool = await open();
    await spool.append([event("mine")]);
    await appendFile(path.replace("1.jsonl", "2.jsonl"), "theirs");
    await expect(spool.append([event("mine too")])).rejects.toMatchObject({ code: "AUDIT_BROKEN" });
  });
});

describe("shipping", () => {
  test("reads on from where the region is, in pieces", async () => {
    const spool = await open({ segmentBytes: 1500 });
    for (let index = 0; index < 10; index++) await spool.append([event(`e${index}`)]);
    expect((await spool.read(0, 4)).map(({ sequence }) => sequence)).toEqual([1, 2, 3, 4]);
    expect((await spool.read(4, 100)).map(({ sequence }) => sequence)).toEqual([5, 6, 7, 8, 9, 10]);
    expect(await spool.read(10, 100)).toEqual([]);
  });

  test("acknowledged segments go, the head stays, also over a restart", async () => {
    const first = await open({ segmentBytes: 1500 });
    for (let index = 0; index < 10; index++) await first.append([event(`e${index}`)]);
    await first.acknowledge(10);
    expect((await readdir(join(folder, "spool"))).filter((name) => name.endsWith(".jsonl"))).toHaveLength(1);
    await first.close();
    for (const name of await readdir(join(folder, "spool"))) if (name.endsWith(".jsonl")) await unlink(join(folder, "spool", name));
    const second = await open();
    expect(second.head).toEqual(first.head);
    const [next] = await second.append([event("next")]);
    expect(next).toMatchObject({ sequence: 11, previous: first.head.hash });
    await second.close();
    expect((await open()).pending()).toMatchObject({ entries: 1, acknowledged: { sequence: 10 } });
  });

  test("a region that wants what it had acknowledged, or more than there is, is told so", async () => {
    const spool = await open({ segmentBytes: 1500 });
    for (let index = 0; index < 10; index++) await spool.append([event(`e${index}`)]);
    await spool.acknowledge(9);
    await expect(spool.read(0, 10)).rejects.toMatchObject({ code: "AUDIT_BROKEN" });
    await expect(spool.acknowledge(11)).rejects.toMatchObject({ code: "AUDIT_BROKEN" });
    await spool.acknowledge(3); // an old acknowledgement changes nothing
    expect(spool.pending().acknowledged.sequence).toBe(9);
  });

  test("acknowledgements at once never go back", async () => {
    const spool = await open({ segmentBytes: 1500 });
    for (let index = 0; index < 10; index++) await spool.append([event(`e${index}`)]);
    await Promise.all([8, 3, 10, 5].map(async (through) => await spool.acknowledge(through)));
    await spool.close();
    expect((await open()).pending()).toMatchObject({ entries: 0, acknowledged: { sequence: 10 } });
  });
});

/** Each write of a run fails once: before anything, after some bytes, or after all of them; undoing may fail as well. */
describe("failing writes", () => {
  const faults = ["nothing written", "half written", "all written"] as const;
  const cases = faults.flatMap((fault) => [1, 2, 3, 4].flatMap((nth) => [false, true].map((undoFails) => ({ fault, nth, undoFails }))));

  test.each(cases)("$fault at write $nth, undo fails: $undoFails", async ({ fault, nth, undoFails }) => {
    const disk = failingFiles(nth, fault, undoFails);
    const spool = await open({ segmentBytes: 1500, openSegment: disk.open });
    const recorded: string[] = [];
    const failures: unknown[] = [];
    for (let index = 0; index < 8; index++) {
      await spool.append([event(`e${index}`)]).then(
        (entries) => recorded.push(entries[0]!.hash),
        (error: unknown) => failures.push(error),
      );
    }
    const isNewSegment = nth === 1 || nth === 3; // undone by removing it, which does not fail here
    expect(failures).toHaveLength(undoFails && !isNewSegment ? 2 : 1);
    for (const failure of failures) expect(failure).toMatchObject({ code: "AUDIT_UNAVAILABLE" });
    await spool.close();
    const again = await open();
    const entries = await again.read(0, 100);
    expect(entries.map(({ hash }) => hash)).toEqual(recorded);
    expect(await verifyChain(entries, signer.publicKeyPem, again.head)).toMatchObject({ ok: true });
  });
});

describe.skipIf(process.getuid?.() !== 0)("a full disk", () => {
  test("is said, loses nothing, and recovers when there is room", async () => {
    const mount = join(folder, "small");
    await run("mkdir", [mount]);
    await run("mount", ["-t", "tmpfs", "-o", "size=256k", "forge-test", mount]);
    try {
      const spool = await Spool.open(join(mount, "spool"), signer, { segmentBytes: 16_384 });
      await expect(fill(spool)).rejects.toMatchObject({ code: "DISK_FULL" });
      const full = spool.head;
      await expect(spool.append([event("x", "y".repeat(9000))])).rejects.toMatchObject({ code: "DISK_FULL" });
      expect(spool.head).toEqual(full);
      await run("mount", ["-o", "remount,size=1m", mount]);
      await spool.append([event("room again")]);
      await spool.close();
      const again = await Spool.open(join(mount, "spool"), signer);
      expect(again.head.sequence).toBe(full.sequence + 1);
      await again.close();
    } finally {
      await run("umount", [mount]);
    }
  });
});

async function open(options: SpoolOptions = {}): Promise<Spool> {
  const spool = await Spool.open(join(folder, "spool"), signer, options);
  opened.push(spool);
  return spool;
}

/** A closed spool with one segment; returns its path. */
async function filled(count: number): Promise<string> {
  const spool = await open();
  for (let index = 0; index < count; index++) await spool.append([event(`e${index}`)]);
  await spool.close();
  return join(folder, "spool", "0000000000000001.jsonl");
}

/** A second segment. */
async function appendMore(): Promise<void> {
  const spool = await open();
  await spool.append([event("more")]);
  await spool.close();
}

/** Appends until the spool refuses. */
async function fill(spool: Spool): Promise<void> {
  for (let index = 0; index < 2000; index++) await spool.append([event(`e${index}`, "z".repeat(500))]);
}

async function flip(path: string, offset: number): Promise<void> {
  const bytes = await readFile(path);
  bytes[offset] = bytes[offset]! ^ 1;
  await writeFile(path, bytes);
}

function event(subject: string, text = ""): AuditEvent {
  return newEvent({ tenant: "ten_1", kind: "cell.ready", actor: "node/n", outcome: "success", subject, details: { text } });
}

function subjectOf(entry: ChainEntry): string {
  return (JSON.parse(entry.event) as AuditEvent).subject;
}

function kindOf(entry: ChainEntry): string {
  return (JSON.parse(entry.event) as AuditEvent).kind;
}

function countingFiles(): { count: number; open: (path: string) => Promise<SegmentFile> } {
  const counter = {
    count: 0,
    async open(path: string): Promise<SegmentFile> {
      const file = await openSegmentFile(path);
      return {
        ...file,
        async append(bytes) {
          counter.count++;
          await file.append(bytes);
        },
      };
    },
  };
  return counter;
}

function failingFiles(nth: number, fault: string, undoFails: boolean): { open: (path: string) => Promise<SegmentFile> } {
  let writes = 0;
  let truncations = 0;
  const fail = () => Object.assign(new Error("EIO: i/o error"), { code: "EIO" });
  return {
    async open(path) {
      const file = await openSegmentFile(path);
      return {
        ...file,
        async append(bytes) {
          writes++;
          if (writes !== nth) return await file.append(bytes);
          if (fault === "half written") await file.append(bytes.subarray(0, bytes.length / 2));
          if (fault === "all written") await file.append(bytes);
          throw fail();
        },
        async truncate(size) {
          truncations++;
          if (undoFails && truncations === 1) throw fail();
          await file.truncate(size);
        },
      };
    },
  };
}
