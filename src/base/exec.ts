import { execa } from "execa";
import { ForgeError } from "./errors.ts";

export interface RunOptions {
  /** Killed after this; every child has a bound. */
  readonly timeoutMs?: number;
  readonly input?: string | Uint8Array;
  readonly cwd?: string;
  /** Added to a minimal environment (PATH, LANG); the parent's environment is never inherited. */
  readonly env?: Readonly<Record<string, string>>;
  readonly signal?: AbortSignal;
  /** Stdout beyond this many bytes is an error. */
  readonly maxOutputBytes?: number;
}

/** What every child gets instead of our own environment: a secret in ours must not travel. */
export const childEnvironment: Readonly<Record<string, string>> = {
  PATH: "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin",
  LANG: "C.UTF-8",
};

/**
 * Runs a program to its end and returns its stdout. Never through a shell.
 * Fails with EXEC_FAILED (its last words in the message), TIMEOUT, or UNSUPPORTED when the program is not installed.
 */
export async function run(program: string, args: readonly string[], options: RunOptions = {}): Promise<string> {
  const timeoutMs = options.timeoutMs ?? 60_000;
  const result = await execa(program, args, {
    env: { ...childEnvironment, ...options.env },
    extendEnv: false,
    timeout: timeoutMs,
    reject: false,
    stripFinalNewline: false,
    maxBuffer: options.maxOutputBytes ?? 16 * 1024 * 1024,
    ...(options.input === undefined ? { stdin: "ignore" as const } : { input: options.input }),
    ...(options.cwd === undefined ? {} : { cwd: options.cwd }),
    ...(options.signal === undefined ? {} : { cancelSignal: options.signal }),
  });
  if (!result.failed) return result.stdout;
  if (result.code === "ENOENT") throw new ForgeError("UNSUPPORTED", `the program ${program} is not installed`);
  if (result.timedOut) throw new ForgeError("TIMEOUT", `${program} did not finish within ${timeoutMs} ms`);
  throw new ForgeError("EXEC_FAILED", `${program} ${args[0] ?? ""}: ${lastWords(result.stderr) || (result.shortMessage ?? "failed")}`, {
    details: { program, ...(result.exitCode === undefined ? {} : { exitCode: result.exitCode }), stderr: result.stderr.slice(-4000) },
    cause: result.cause,
  });
}

/** The last non-empty lines of a program's stderr, short enough for one message. */
function lastWords(stderr: string): string {
  return stderr.trim().split("\n").slice(-3).join(" / ").slice(-600);
}
