import { type ChildProcess, spawn } from "node:child_process";
import { constants, type Stats } from "node:fs";
import { type FileHandle, open, readFile, rename, stat } from "node:fs/promises";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { fileURLToPath } from "node:url";
import { readIfExists, removeDurable, writeDurable } from "../base/durable.ts";
import { errnoOf, ForgeError } from "../base/errors.ts";
import { childEnvironment } from "../base/exec.ts";

export type DaemonName = "control" | "agent";

/** A process we started is known by its pid and its start time: a pid alone may have gone to somebody else. */
interface DaemonRecord {
  readonly pid: number;
  /** Clock ticks after boot, field 22 of /proc/PID/stat (proc_pid_stat(5)). */
  readonly startTicks: string;
  readonly bootId: string;
}

export interface StartedDaemon {
  readonly pid: number;
  /** Resolves when it ends while we look; the text says how. */
  readonly ended: Promise<string>;
}

const maximumLogBytes = 10 * 1024 * 1024;
const pauseMs = 50;
const mainPath = fileURLToPath(new URL("../main.ts", import.meta.url));
/** What of our own environment a daemon may see; everything else stays here. */
const passedOn = ["FORGE_LOG", "FORGE_BUILD_DIR", "FORGE_DATABASE_URL"];

/** The pid of a running daemon, or undefined. */
export async function findDaemon(dataDir: string, name: DaemonName): Promise<number | undefined> {
  const bytes = await readIfExists(recordPath(dataDir, name));
  if (bytes === undefined) return undefined;
  const record = JSON.parse(bytes.toString()) as DaemonRecord;
  const current = await describeProcess(record.pid);
  return current?.startTicks === record.startTicks && current.bootId === record.bootId ? record.pid : undefined;
}

/** Starts a daemon in a session of its own, its output appended to DATA/log. */
export async function startDaemon(dataDir: string, name: DaemonName): Promise<StartedDaemon> {
  const log = await openLog(logPath(dataDir, name));
  try {
    const env: Record<string, string> = { ...childEnvironment };
    for (const key of passedOn) if (process.env[key] !== undefined) env[key] = process.env[key];
    const args = ["--disable-warning=ExperimentalWarning", mainPath, name, "--data", dataDir];
    const child = spawn(process.execPath, args, { cwd: "/", env, detached: true, stdio: ["ignore", log.fd, log.fd] });
    const ended = endOf(child);
    if (child.pid === undefined) throw new ForgeError("EXEC_FAILED", `${name} did not start: ${await ended}`);
    const record = await describeProcess(child.pid);
    if (record !== undefined) await writeDurable(recordPath(dataDir, name), JSON.stringify({ pid: child.pid, ...record }));
    child.unref();
    return { pid: child.pid, ended };
  } finally {
    await log.close();
  }
}

/** Signals a daemon and waits until it is gone. TIMEOUT names the log; nothing is killed harder: it may hold what must be kept. */
export async function stopDaemon(dataDir: string, name: DaemonName, signal: NodeJS.Signals, timeoutMs: number): Promise<boolean> {
  const pid = await findDaemon(dataDir, name);
  if (pid === undefined) return false;
  process.kill(pid, signal);
  const deadline = performance.now() + timeoutMs;
  while ((await findDaemon(dataDir, name)) !== undefined) {
    if (performance.now() > deadline) {
      throw new ForgeError("TIMEOUT", `${name} (pid ${pid}) did not end within ${timeoutMs / 1000} s; its log: ${logPath(dataDir, name)}`);
    }
    await delay(pauseMs);
  }
  await removeDurable(recordPath(dataDir, name));
  return true;
}

/**
 * Waits until `check` gives something. Fails at once when the daemon ends, with its last log lines, and after
 * `timeoutMs` otherwise. (The folders a watch would need come into being only while the daemon starts: a look every
 * 50 ms costs nothing.)
 */
export async function waitForDaemon<T>(
  daemon: { dataDir: string; name: DaemonName; started: StartedDaemon | undefined; timeoutMs: number; signal: AbortSignal },
  check: () => Promise<T | undefined>,
): Promise<T> {
  let end: string | undefined;
  void daemon.started?.ended.then((how) => (end = how));
  const deadline = performance.now() + daemon.timeoutMs;
  for (;;) {
    const found = await check();
    if (found !== undefined) return found;
    const lines = async (): Promise<string> =>
      (await lastLogLines(logPath(daemon.dataDir, daemon.name))).map((line) => `\n${line}`).join("");
    if (end !== undefined)
      throw new ForgeError(
        "UNAVAILABLE",
        `${daemon.name} ended (${end}); the last lines of ${logPath(daemon.dataDir, daemon.name)}:${await lines()}`,
      );
    if (performance.now() > deadline) {
      throw new ForgeError(
        "TIMEOUT",
        `${daemon.name} was not ready within ${daemon.timeoutMs / 1000} s; the last lines of ${logPath(daemon.dataDir, daemon.name)}:${await lines()}`,
      );
    }
    await delay(pauseMs, undefined, { signal: daemon.signal });
  }
}

export function logPath(dataDir: string, name: DaemonName): string {
  return join(dataDir, "log", `${name}.log`);
}

function recordPath(dataDir: string, name: DaemonName): string {
  return join(dataDir, "run", `${name}.json`);
}

async function describeProcess(pid: number): Promise<Omit<DaemonRecord, "pid"> | undefined> {
  const text = await readFile(`/proc/${pid}/stat`, "utf8").catch(() => undefined);
  if (text === undefined) return undefined;
  // The name in parentheses may hold anything; what follows the last one is plain. State is field 3, start time 22.
  const fields = text.slice(text.lastIndexOf(")") + 2).split(" ");
  if (fields[0] === "Z") return undefined;
  return { startTicks: fields[19] ?? "", bootId: (await readFile("/proc/sys/kernel/random/boot_id", "utf8")).trim() };
}

function endOf(child: ChildProcess): Promise<string> {
  return new Promise((resolve) => {
    child.once("error", (error) => resolve(error.message));
    child.once("exit", (code, signal) => resolve(signal === null ? `exit ${code}` : signal));
  });
}

async function openLog(path: string): Promise<FileHandle> {
  const state = await statIfExists(path);
  if (state !== undefined && state.size > maximumLogBytes) await rename(path, `${path}.1`);
  return open(path, constants.O_WRONLY | constants.O_CREAT | constants.O_APPEND, 0o600);
}

async function statIfExists(path: string): Promise<Stats | undefined> {
  try {
    return await stat(path);
  } catch (error) {
    if (errnoOf(error) === "ENOENT") return undefined;
    throw error;
  }
}

/** The last lines of a log, their JSON made words. */
async function lastLogLines(path: string): Promise<string[]> {
  const file = await open(path, "r").catch(() => undefined);
  if (file === undefined) return [];
  try {
    const { size } = await file.stat();
    const bytes = Buffer.alloc(Math.min(size, 16_384));
    await file.read(bytes, 0, bytes.length, size - bytes.length);
    return bytes
      .toString()
      .split("\n")
      .filter((line) => line.trim() !== "")
      .slice(-8)
      .map(logWords);
  } finally {
    await file.close();
  }
}

function logWords(line: string): string {
  try {
    const { msg, err } = JSON.parse(line) as { msg?: string; err?: { message?: string } };
    return [msg, err?.message].filter((part) => part !== undefined).join(": ") || line;
  } catch {
    return line;
  }
}
