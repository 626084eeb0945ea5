import { execa } from "execa";
import { mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { newIn, takeInventory } from "./leaks.ts";

/**
 * What `npm test` runs: every check in order, cheapest first, up to the first failure. The last line of the output is
 * `N passed, N failed, N skipped`. With arguments only vitest runs, with these: `npm test -- src/audit -t torn`.
 */

const root = resolve(import.meta.dirname, "..");
const minuteMs = 60_000;

interface Counts {
  passed: number;
  failed: number;
  skipped: number;
}

interface Step {
  readonly title: string;
  /** Resolves to whether all is well; adds the tests it ran. */
  run(counts: Counts): Promise<boolean>;
}

const filters = process.argv.slice(2);
const counts: Counts = { passed: 0, failed: 0, skipped: 0 };
const isGood = await runSteps(filters.length > 0 ? [vitest("tests", filters, 20 * minuteMs)] : await everything());
if (!isGood) {
  counts.failed = Math.max(1, counts.failed); // a check without tests of its own that fails is a failure too
  process.exitCode = 1;
}
process.stdout.write(`${counts.passed} passed, ${counts.failed} failed, ${counts.skipped} skipped\n`);

async function everything(): Promise<Step[]> {
  const before = await takeInventory();
  return [
    command("types", "tsc", ["--noEmit"]),
    command("lint", "oxlint", []),
    command("format", "oxfmt", ["--check"]),
    command("openapi", "node", ["tools/openapi.ts", "--check"]),
    vitest("unit tests", ["--project", "unit"], 8 * minuteMs),
    vitest("end-to-end tests", ["--project", "e2e"], 14 * minuteMs),
    { title: "nothing left behind", run: async () => await nothingLeft(before) },
  ];
}

async function runSteps(steps: readonly Step[]): Promise<boolean> {
  const done: string[] = [];
  let isGoodSoFar = true;
  for (const step of steps) {
    process.stdout.write(`\n── ${step.title}\n`);
    const startedMs = performance.now();
    isGoodSoFar = await step.run(counts);
    const seconds = ((performance.now() - startedMs) / 1000).toFixed(1);
    done.push(`${isGoodSoFar ? "ok    " : "FAILED"} ${step.title.padEnd(20)} ${seconds.padStart(6)} s`);
    if (!isGoodSoFar) break;
  }
  process.stdout.write(`\n${done.join("\n")}\n`);
  return isGoodSoFar;
}

function command(title: string, program: string, args: readonly string[]): Step {
  return { title, run: async () => await succeeds(program, args, 5 * minuteMs) };
}

function vitest(title: string, args: readonly string[], timeoutMs: number): Step {
  return {
    title,
    async run(sum) {
      const folder = await mkdtemp(join(tmpdir(), "forge-check-"));
      try {
        const report = join(folder, "report.json");
        const reporters = ["--reporter=default", "--reporter=json", `--outputFile.json=${report}`];
        const isSuccess = await succeeds("vitest", ["run", ...reporters, ...args], timeoutMs);
        await addCounts(report, sum);
        return isSuccess;
      } finally {
        await rm(folder, { recursive: true, force: true });
      }
    },
  };
}

/** A run that was killed leaves no report; its failure is counted by whoever sees that it failed. */
async function addCounts(report: string, sum: Counts): Promise<void> {
  const text = await readFile(report, "utf8").catch(() => "{}");
  const found = JSON.parse(text) as Partial<Record<`num${"Passed" | "Failed" | "Pending" | "Todo"}Tests`, number>>;
  sum.passed += found.numPassedTests ?? 0;
  sum.failed += found.numFailedTests ?? 0;
  sum.skipped += (found.numPendingTests ?? 0) + (found.numTodoTests ?? 0);
}

async function succeeds(program: string, args: readonly string[], timeoutMs: number): Promise<boolean> {
  const result = await execa(program, args, {
    cwd: root,
    preferLocal: true,
    localDir: root,
    stdio: "inherit",
    timeout: timeoutMs,
    reject: false,
  });
  if (result.timedOut) process.stdout.write(`${program} did not finish within ${timeoutMs / minuteMs} minutes\n`);
  return !result.failed;
}

/** What was asked to end may take a moment to be gone. */
async function nothingLeft(before: ReadonlySet<string>): Promise<boolean> {
  let left: string[] = [];
  for (let attempt = 0; attempt < 10; attempt++) {
    left = newIn(before, await takeInventory());
    if (left.length === 0) return true;
    await delay(500);
  }
  process.stdout.write(`left behind by the tests:\n${left.join("\n")}\n`);
  return false;
}
