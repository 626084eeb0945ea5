import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { createInterface } from "node:readline";
import { afterEach, beforeEach, expect, test } from "vitest";
import { childEnvironment } from "../base/exec.ts";
import { type ChainEntry, verifyChain } from "./chain.ts";
import type { AuditEvent } from "./event.ts";
import { fileSigner } from "./signer.ts";
import { Spool } from "./spool.ts";

/**
 * A process appends as fast as it can from eight callers and prints what was acknowledged; it is killed at an arbitrary
 * moment, again and again, on the same spool. The random part is only the moment.
 */
const rounds = 8;

/** Runs in the process that is killed: prints one line `<subject> <sequence>` per acknowledged event. */
const appender = `
  import { writeSync } from "node:fs";
  const [folder, key, round, auditIndex] = process.argv.slice(-4);
  const { fileSigner, newEvent, Spool } = await import(auditIndex);
  const spool = await Spool.open(folder, await fileSigner(key), { segmentBytes: 20_000 });
  const caller = async (name) => {
    for (let count = 0; ; count++) {
      const subject = round + "/" + name + "/" + count;
      const fact = { tenant: null, kind: "cell.ready", actor: "node/n", outcome: "success", subject, details: {} };
      const [entry] = await spool.append([newEvent(fact)]);
      writeSync(1, subject + " " + entry.sequence + "\\n");
    }
  };
  await Promise.all(Array.from({ length: 8 }, (_, name) => caller(name)));
`;

let folder = "";
let child: ChildProcess | undefined;

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), "forge-spool-crash-"));
});

afterEach(async () => {
  child?.kill("SIGKILL");
  await rm(folder, { recursive: true, force: true });
});

test("kill -9 while appending: nothing acknowledged is lost, nothing is there twice, no gap", { timeout: 60_000 }, async () => {
  const key = join(folder, "key");
  const signer = await fileSigner(key);
  const acknowledged = new Map<string, number>();
  for (let round = 0; round < rounds; round++) {
    await appendUntilKilled([join(folder, "spool"), key, String(round)], acknowledged);
    const spool = await Spool.open(join(folder, "spool"), signer);
    const entries = await readAll(spool);
    await spool.close();
    expect(await verifyChain(entries, signer.publicKeyPem, spool.head)).toMatchObject({ ok: true, entries: entries.length });
    const found = new Map(entries.map((entry) => [(JSON.parse(entry.event) as AuditEvent).subject, entry.sequence]));
    for (const [subject, sequence] of acknowledged) expect(found.get(subject)).toBe(sequence);
    const recoveries = entries.filter((entry) => entry.event.includes("node.spool-recovered")).length;
    expect(found.size - (recoveries > 0 ? 1 : 0)).toBe(entries.length - recoveries);
  }
  expect(acknowledged.size).toBeGreaterThan(rounds);
});

async function appendUntilKilled(args: readonly string[], acknowledged: Map<string, number>): Promise<void> {
  const script = ["--input-type=module", "--eval", appender, "--", ...args, resolve(import.meta.dirname, "index.ts")];
  const running = spawn(process.execPath, script, { stdio: ["ignore", "pipe", "inherit"], env: childEnvironment });
  child = running;
  const gone = once(running, "close");
  let isFirst = true;
  for await (const line of createInterface({ input: running.stdout })) {
    const [subject = "", sequence = ""] = line.split(" ");
    if (sequence !== "") acknowledged.set(subject, Number(sequence));
    if (isFirst) setTimeout(() => running.kill("SIGKILL"), 20 + Math.random() * 200);
    isFirst = false;
  }
  await gone;
  if (isFirst) throw new Error("the appending process ended before it acknowledged anything");
}

async function readAll(spool: Spool): Promise<ChainEntry[]> {
  const entries: ChainEntry[] = [];
  for (;;) {
    const piece = await spool.read(entries.length, 1000);
    if (piece.length === 0) return entries;
    entries.push(...piece);
  }
}
