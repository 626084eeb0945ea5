import { mkdtemp, readdir, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { CellLog } from "./logs.ts";

let dir = "";
beforeEach(async () => {
  dir = await mkdtemp(join(tmpdir(), "forge-log-"));
});
afterEach(() => rm(dir, { recursive: true, force: true }));

const cellId = "cell_000000000000000000000000";
const text = (log: CellLog, tail = 1000) => collect(log.lines({ tail, follow: false, signal: AbortSignal.timeout(5000) }));

async function collect(lines: AsyncIterable<{ message: string; stream: string }>): Promise<string[]> {
  const found: string[] = [];
  for await (const line of lines) found.push(`${line.stream}:${line.message}`);
  return found;
}

describe("a cell's log", () => {
  test("assembles lines from chunks, each stream on its own", async () => {
    const log = await CellLog.open(dir, cellId);
    await log.append(1, 1, new Date(), "stdout", Buffer.from("he"));
    await log.append(1, 2, new Date(), "stderr", Buffer.from("oops\n"));
    await log.append(1, 3, new Date(), "stdout", Buffer.from("llo\nworld\nno end"));
    expect(await text(log)).toEqual(["stderr:oops", "stdout:hello", "stdout:world", "stdout:no end"]);
    expect(await text(log, 2)).toEqual(["stdout:world", "stdout:no end"]);
    await log.close();
  });

  test("keeps bytes that are no UTF-8 and knows the last sequence of a boot after being opened again", async () => {
    const first = await CellLog.open(dir, cellId);
    await first.append(1, 7, new Date(), "stdout", Uint8Array.of(0xff, 0x0a));
    await first.append(2, 3, new Date(), "stdout", Buffer.from("second boot\n"));
    await first.close();
    const again = await CellLog.open(dir, cellId);
    expect(await again.lastSequence(1)).toBe(7);
    expect(await again.lastSequence(2)).toBe(3);
    expect(await again.lastSequence(3)).toBe(0);
    expect(await text(again)).toEqual(["stdout:\ufffd", "stdout:second boot"]);
    await again.close();
  });

  test("passes over a record cut short by a crash and goes on after it", async () => {
    await writeFile(
      join(dir, "00000001.ndjson"),
      '{"boot":1,"sequence":1,"time":"2026-01-01T00:00:00.000Z","stream":"stdout","text":"a\\n"}\n{"boot":1,"seq',
    );
    const log = await CellLog.open(dir, cellId);
    await log.append(1, 2, new Date(), "stdout", Buffer.from("b\n"));
    expect(await text(log)).toEqual(["stdout:a", "stdout:b"]);
    await log.close();
  });

  test("follows across a rotation, in order, without a gap or a repeat", async () => {
    const log = await CellLog.open(dir, cellId);
    const stop = new AbortController();
    const seen: string[] = [];
    const following = (async () => {
      for await (const line of log.lines({ tail: 0, follow: true, signal: stop.signal })) {
        seen.push(line.message.slice(0, 6));
        if (seen.length === 400) stop.abort();
      }
    })();
    for (let n = 1; n <= 400; n++)
      await log.append(1, n, new Date(), "stdout", Buffer.from(`${String(n).padStart(6, "0")}${"x".repeat(60_000)}\n`));
    await following;
    expect(seen).toEqual(Array.from({ length: 400 }, (_, index) => String(index + 1).padStart(6, "0")));
    expect((await readdir(dir)).length).toBeLessThanOrEqual(4);
    await log.close();
  }, 30_000);
});
