import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { chmod, mkdtemp, readdir, readFile, rm, stat } from "node:fs/promises";
import { request } from "node:https";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { afterEach, beforeEach, expect, test } from "vitest";
import { childEnvironment } from "../base/exec.ts";

/** The whole process as it is installed: privileges dropped, its own PostgreSQL, killed and started again. */

const entry = `
  const { runControl } = await import(${JSON.stringify(new URL("main.ts", import.meta.url).href)});
  await runControl({ dataDir: process.env.DATA, apiAddress: "127.0.0.1", apiPort: 0, nodePort: 0, region: "test", jurisdiction: "de" });
`;

let folder: string;
let child: ChildProcess | undefined;

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), "forge-e2e-"));
  await chmod(folder, 0o711); // as DATA is: others may pass through to what is theirs
});

afterEach(async () => {
  if (child?.exitCode === null && child.signalCode === null) await end(child, "SIGTERM");
  const postmaster = await postmasterPid();
  if (postmaster !== undefined) process.kill(postmaster, "SIGQUIT");
  await rm(folder, { recursive: true, force: true, maxRetries: 20 });
});

const control = (...path: string[]): string => join(folder, "control", ...path);

async function start(): Promise<{ pid: number; apiPort: number }> {
  const env = { ...childEnvironment, DATA: folder };
  child = spawn(process.execPath, ["--input-type=module", "--eval", entry], { env, stdio: ["ignore", "inherit", "pipe"] });
  const words: string[] = [];
  child.stderr?.on("data", (data: Buffer) => words.push(data.toString()));
  for (let attempt = 0; attempt < 1200 && child.exitCode === null; attempt++) {
    const ready = await readFile(control("run", "ready.json"), "utf8").catch(() => undefined);
    if (ready !== undefined && (JSON.parse(ready) as { pid: number }).pid === child.pid)
      return JSON.parse(ready) as { pid: number; apiPort: number };
    await delay(50);
  }
  throw new Error(`the control plane did not get ready: ${words.join("")}`);
}

async function end(process: ChildProcess, signal: NodeJS.Signals): Promise<void> {
  const ended = once(process, "exit");
  process.kill(signal);
  await ended;
}

async function postmasterPid(): Promise<number | undefined> {
  const text = await readFile(control("pg", "postmaster.pid"), "utf8").catch(() => undefined);
  return text === undefined ? undefined : Number(text.split("\n")[0]);
}

async function status(apiPort: number, token: string): Promise<{ region: string; installationPrefix: string }> {
  const ca = await readFile(control("ca.pem"));
  return new Promise((resolve, reject) => {
    const options = { host: "localhost", port: apiPort, path: "/v1/status", ca, headers: { authorization: `Bearer ${token.trim()}` } };
    request(options, (response) => {
      let text = "";
      response.on("data", (data: Buffer) => (text += data.toString()));
      response.on("end", () => resolve(JSON.parse(text) as { region: string; installationPrefix: string }));
    })
      .on("error", reject)
      .end();
  });
}

test("killed, it finds its database again and knows who it is; told to stop, it leaves nothing running", async () => {
  const first = await start();
  const token = await readFile(control("bootstrap", "owner-token"), "utf8");
  const before = await status(first.apiPort, token);
  const postmaster = await postmasterPid();
  if (child !== undefined) await end(child, "SIGKILL");
  expect(await postmasterPid()).toBe(postmaster);

  const second = await start();
  expect(await postmasterPid()).toBe(postmaster);
  expect(await status(second.apiPort, token)).toEqual(before);

  if (process.getuid?.() === 0) {
    const { uid } = await stat(control("pg"));
    expect(uid).not.toBe(0);
    expect(await readFile(`/proc/${second.pid}/status`, "utf8")).toMatch(new RegExp(`^Uid:\\s+${uid}\\s+${uid}\\s+${uid}\\s+${uid}$`, "m"));
  }
  for (const file of ["owner-token", "operator-token", "join-token"]) expect((await stat(control("bootstrap", file))).mode & 0o077).toBe(0);
  expect((await stat(control())).mode & 0o777).toBe(0o700);

  if (child !== undefined) await end(child, "SIGTERM");
  expect(child?.exitCode).toBe(0);
  expect(await readdir(control("run"))).toEqual([]);
  expect(await postmasterPid()).toBeUndefined();
});
