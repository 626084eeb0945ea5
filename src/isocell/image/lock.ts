import { spawn } from "node:child_process";
import { once } from "node:events";
import { childEnvironment } from "../../base/exec.ts";
import { ForgeError } from "../../base/errors.ts";

/** Gives the lock back. */
export type Release = () => Promise<void>;

/**
 * An exclusive lock between processes on a file. A small `flock` child holds it for as long as our end of its stdin
 * is open: the kernel gives it back when this process dies, however it dies, and nobody polls.
 */
export async function waitForLock(path: string, timeoutMs: number): Promise<Release> {
  const release = await acquire(path, ["--timeout", String(Math.ceil(timeoutMs / 1000))]);
  if (release === undefined) throw new ForgeError("TIMEOUT", `another process held ${path} for more than ${timeoutMs} ms`);
  return release;
}

/** Undefined when another process holds it now. */
export async function tryLock(path: string): Promise<Release | undefined> {
  return acquire(path, ["--nonblock"]);
}

async function acquire(path: string, wait: readonly string[]): Promise<Release | undefined> {
  const child = spawn("flock", ["--exclusive", ...wait, "--conflict-exit-code", "75", path, "cat"], {
    env: childEnvironment,
    stdio: ["pipe", "pipe", "ignore"],
  });
  const ended = once(child, "close") as Promise<[number | null]>;
  ended.catch(() => undefined); // awaited below in every path
  child.stdin.on("error", () => undefined); // the child may end before it reads
  child.stdin.write("\n"); // comes back from `cat`, which runs only under the lock
  const locked = await Promise.race([once(child.stdout, "data").then(() => true), ended.then(() => false)]);
  if (locked) {
    return async () => {
      child.stdin.end();
      await ended;
    };
  }
  const [exitCode] = await ended;
  if (exitCode === 75) return undefined;
  throw new ForgeError("EXEC_FAILED", `flock ${path} ended with ${exitCode}`);
}
