import { type ChildProcessByStdio, spawn } from "node:child_process";
import { createHash } from "node:crypto";
import { closeSync, existsSync, mkdirSync, readFileSync, rmSync } from "node:fs";
import { constants } from "node:os";
import { join } from "node:path";
import type { Readable } from "node:stream";
import { ForgeError } from "../base/errors.ts";
import { childEnvironment } from "../base/exec.ts";
import { isErrno, listenTcp, pidfdOpen, pidfdSendSignal, waitForExit } from "../base/linux.ts";
import { cellPath, namesIn, removeFolderIfEmpty, stateFolder } from "./state.ts";

/**
 * Published ports. The listener is opened in the host's network namespace and handed to a proxy that lives in the
 * cell's: there it can reach the cell and nothing else. Each port is one process of its own, unprivileged, in the cell's
 * cgroup and in no relation to the agent, whose death it does not notice. The proxy (systemd-socket-proxyd) knows no
 * half-closed connections: when one side ends, both do, once what it had sent is delivered.
 */

export interface PublishOptions {
  readonly cellId: string;
  /** Whose the port is, of a-z, 0-9, "_", "/" and "-": cells of one owner share it, nobody else may. */
  readonly owner: string;
  readonly netnsPath: string;
  /** cgroup.procs files (v1: one a controller) that the proxy joins before it runs. */
  readonly cgroupProcsFiles: readonly string[];
  readonly listenAddress: string;
  readonly publishedPort: number;
  readonly cellAddress: string;
  readonly cellPort: number;
  readonly stateDir: string;
}

export interface Published {
  readonly cellId: string;
  readonly owner: string;
  readonly publishedPort: number;
  readonly pid: number;
}

/** What is being published and has no record yet: two replicas may become ready at once. */
const underWay = new Set<PublishOptions>();

const proxyProgram = "/lib/systemd/systemd-socket-proxyd";
const maxConnections = 1024;
/** A connection takes two sockets and two pipes. */
const maxOpenFiles = maxConnections * 6 + 128;

/**
 * Publishes a port of the cell, or returns the publication that lives already. Cells of one owner share a port;
 * PORT_TAKEN where anybody else listens on it. When it resolves, connections are accepted.
 */
export async function publish(options: PublishOptions): Promise<Published> {
  const { cellId, owner, publishedPort, stateDir } = options;
  const record = recordPath(cellId, publishedPort, stateDir);
  const living = livingProcess(record);
  if (living !== undefined) return { cellId, publishedPort, ...living };
  if (!existsSync(proxyProgram)) throw new ForgeError("UNSUPPORTED", `the program ${proxyProgram} is not installed`);
  mkdirSync(cellPath(stateDir, "published", cellId), { recursive: true, mode: 0o700 });
  const listener = openListener(options);
  underWay.add(options);
  try {
    return { cellId, owner, publishedPort, pid: await startProxy(options, record, listener) };
  } finally {
    underWay.delete(options);
    closeSync(listener);
  }
}

/** Ends the cell's publications, or only that of one port; when it resolves their processes are gone. Idempotent. */
export async function unpublish(cellId: string, stateDir: string, publishedPort?: number): Promise<void> {
  const folder = cellPath(stateDir, "published", cellId);
  const ports = publishedPort === undefined ? portsIn(folder) : [publishedPort];
  await Promise.all(ports.map((port) => endProcess(recordPath(cellId, port, stateDir))));
  removeFolderIfEmpty(folder);
  removeFolderIfEmpty(stateFolder(stateDir, "published"));
}

/** The publications whose process lives; after a restart of the agent they are as before. */
export function listPublished(stateDir: string): Published[] {
  return namesIn(stateFolder(stateDir, "published")).flatMap((cellId) =>
    portsIn(cellPath(stateDir, "published", cellId)).flatMap((publishedPort) => {
      const living = livingProcess(recordPath(cellId, publishedPort, stateDir));
      return living === undefined ? [] : [{ cellId, publishedPort, ...living }];
    }),
  );
}

/**
 * Throws PORT_TAKEN where anybody but the owner listens on the port. A foreigner who listens with SO_REUSEPORT would go
 * unnoticed, so the owner's first asks for the port alone.
 */
export function checkPublishable(listenAddress: string, publishedPort: number, owner: string, stateDir: string): void {
  if (!/^[a-z0-9_/-]{1,200}$/.test(owner))
    throw new ForgeError("INVALID_INPUT", "the owner of a published port has a name of a-z, 0-9, _, / and -");
  const begun = [...underWay].filter((other) => other.stateDir === stateDir);
  const living = [...begun, ...listPublished(stateDir)].filter((other) => other.publishedPort === publishedPort);
  if (living.some((other) => other.owner !== owner)) throw new ForgeError("PORT_TAKEN", `port ${publishedPort} is another service's`);
  if (living.length === 0) closeSync(listenTcp(listenAddress, publishedPort, { reusePort: false }));
}

function openListener({ listenAddress, publishedPort, owner, stateDir }: PublishOptions): number {
  checkPublishable(listenAddress, publishedPort, owner, stateDir);
  return listenTcp(listenAddress, publishedPort, { reusePort: true });
}

/**
 * Runs in the cell's network namespace, still privileged: joins the cgroups, records itself (boot, process number and
 * start time, which together never repeat, and the owner), and gives up its privileges. LISTEN_FDS is sd_listen_fds(3).
 */
const launcher = `
set -eu
record=$1 owner=$2 files=$3
shift 3
while [ "$1" != -- ]; do echo $$ > "$1"; shift; done
shift
ulimit -n "$files"
read -r _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ _ start _ < /proc/$$/stat
read -r boot < /proc/sys/kernel/random/boot_id
echo "$boot $$ $start $owner" > "$record"
export LISTEN_PID=$$ LISTEN_FDS=1
exec "$@"
`;

/** Runs without privileges: all that could fail has succeeded, so it says so and becomes the proxy. */
const becomeProxy = `
echo ready
exec "$@" > /dev/null 2>&1
`;

async function startProxy(options: PublishOptions, record: string, listener: number): Promise<number> {
  const user = String(unprivilegedUser(options.cellId));
  const unprivileged = ["setpriv", `--reuid=${user}`, `--regid=${user}`, "--clear-groups", "--no-new-privs"];
  const incapable = ["--bounding-set=-all", "--inh-caps=-all", "--ambient-caps=-all"];
  // The target is a literal address, so nothing is ever looked up; systemd-socket-proxyd splits at the last colon.
  const proxy = [
    "sh",
    "-c",
    becomeProxy,
    "publish",
    proxyProgram,
    `--connections-max=${maxConnections}`,
    `${options.cellAddress}:${options.cellPort}`,
  ];
  const launch = ["sh", "-c", launcher, "publish", record, options.owner, String(maxOpenFiles), ...options.cgroupProcsFiles];
  const child = spawn("nsenter", [`--net=${options.netnsPath}`, ...launch, "--", ...unprivileged, ...incapable, ...proxy], {
    detached: true,
    cwd: "/",
    env: { ...childEnvironment },
    stdio: ["ignore", "pipe", "pipe", listener],
  }) as ChildProcessByStdio<null, Readable, Readable>;
  try {
    await untilReady(child);
  } catch (error) {
    child.kill("SIGKILL");
    rmSync(record, { force: true });
    throw error;
  }
  child.unref();
  const living = livingProcess(record);
  if (living === undefined) throw new ForgeError("EXEC_FAILED", `the proxy of port ${options.publishedPort} ended at once`);
  return living.pid;
}

/** Resolves when the launcher has said that it is ready and let go of its output. */
function untilReady(child: ChildProcessByStdio<null, Readable, Readable>): Promise<void> {
  const timeoutMs = 10_000;
  return new Promise((resolve, reject) => {
    let said = "";
    let complaint = "";
    const timer = setTimeout(() => reject(new ForgeError("TIMEOUT", `a proxy did not start within ${timeoutMs} ms`)), timeoutMs);
    child.stdout.on("data", (chunk: Buffer) => (said += chunk.toString()));
    child.stderr.on("data", (chunk: Buffer) => (complaint = (complaint + chunk.toString()).slice(-600)));
    child.once("error", (error) => {
      clearTimeout(timer);
      reject(new ForgeError("EXEC_FAILED", `a proxy could not be started: ${error.message}`, { cause: error }));
    });
    child.stdout.once("close", () => {
      clearTimeout(timer);
      if (said === "ready\n") resolve();
      else reject(new ForgeError("EXEC_FAILED", `a proxy could not be started: ${complaint.trim() || "it ended without a word"}`));
    });
  });
}

/**
 * A user of the cell's own, so that proxies of two cells are strangers: one of the 2^24 numbers from 0x71000000, in the
 * range that systemd's list of user numbers (UIDS-GIDS) leaves unused; the 2^24 from 0x70000000 are the VMMs'.
 */
function unprivilegedUser(cellId: string): number {
  return 0x71000000 + createHash("sha256").update(`publish:${cellId}`).digest().readUIntBE(0, 3);
}

async function endProcess(record: string): Promise<void> {
  const living = livingProcess(record);
  const pidfd = living === undefined ? undefined : pidfdOpen(living.pid);
  if (pidfd !== undefined) {
    try {
      // Looked at again now that the descriptor pins it: the number may have been used anew in between.
      if (livingProcess(record) !== undefined && pidfdSendSignal(pidfd, constants.signals.SIGKILL)) {
        const ended = await waitForExit(pidfd, 5_000);
        if (!ended) throw new ForgeError("TIMEOUT", "a proxy did not end within 5000 ms of SIGKILL");
      }
    } finally {
      closeSync(pidfd);
    }
  }
  rmSync(record, { force: true });
}

/** The process a record speaks of, where that very process still runs. */
function livingProcess(record: string): { pid: number; owner: string } | undefined {
  const [, boot, pid, start, owner] = /^(\S+) (\d+) (\d+) ([a-z0-9_/-]+)\n$/.exec(readIfPresent(record)) ?? [];
  if (boot === undefined || owner === undefined || boot !== readIfPresent("/proc/sys/kernel/random/boot_id").trim()) return undefined;
  // proc(5): the name, which may hold anything, ends with the last parenthesis; then state (3rd field) … start time (22nd).
  const stat = readIfPresent(`/proc/${pid}/stat`);
  const fields = stat.slice(stat.lastIndexOf(")") + 2).split(" ");
  return fields[0] !== "Z" && fields[0] !== "X" && fields[19] === start ? { pid: Number(pid), owner } : undefined;
}

function readIfPresent(path: string): string {
  try {
    return readFileSync(path, "latin1");
  } catch (error) {
    if (isErrno(error, "ENOENT") || isErrno(error, "ESRCH")) return "";
    throw error;
  }
}

function portsIn(folder: string): number[] {
  return namesIn(folder)
    .filter((name) => /^\d{1,5}$/.test(name))
    .map(Number);
}

function recordPath(cellId: string, publishedPort: number, stateDir: string): string {
  return join(cellPath(stateDir, "published", cellId), String(publishedPort));
}
