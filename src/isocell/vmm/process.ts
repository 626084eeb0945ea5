import { type ChildProcess, spawn } from "node:child_process";
import { constants } from "node:fs";
import { open, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import type { Cgroup } from "../../base/cgroup.ts";
import { readIfExists } from "../../base/durable.ts";
import { ForgeError } from "../../base/errors.ts";
import { childEnvironment } from "../../base/exec.ts";
import { inNetns } from "../../base/linux.ts";
import type { Launch } from "./vmm.ts";

/**
 * The process of one guest. It is the child of nobody that matters: its own session, its own control group, its own
 * network namespace; it outlives whoever started it. `<cellDir>/pid` names it by id and start time, written by the
 * process itself before it becomes the VMM, so that no crash of the starter leaves one unnamed and no reused id is taken
 * for it.
 */
export interface VmmProcess {
  readonly pid: number;
  /** False once it is dead, also when nobody has waited for it. */
  isAlive(): Promise<boolean>;
  /** Resolves when it is dead. Only for the process that started it: whoever finds it again learns by the channel's end. */
  readonly exited: Promise<void> | undefined;
}

export interface SpawnOptions {
  readonly cellDir: string;
  readonly netnsPath: string | null;
  readonly cgroup: Cgroup;
}

const pidFileName = "pid";
/** The VMM's own complaints; bounded as every file it writes. */
const diagnosticsFileName = "vmm.log";

/**
 * What runs before the VMM, in the same process: join the groups, leave the name behind, bound files and core dumps, and
 * become it. Everything it uses comes as an argument. With SIGXFSZ ignored a file at its bound fails the write (setrlimit(2))
 * instead of killing the writer; an ignored signal stays ignored across exec (execve(2)).
 */
const prelude = `
umask 077
groups=$1 pidFile=$2 maxBlocks=$3; shift 3
for file in $groups; do echo $$ > "$file" || exit 125; done
read -r boot < /proc/sys/kernel/random/boot_id && read -r stat < /proc/$$/stat && echo "$boot $stat" > "$pidFile" || exit 125
trap '' XFSZ
ulimit -c 0 && ulimit -f "$maxBlocks" || exit 125
exec "$@"
`;

/** Starts the process; returns once it exists and has its groups, namespace and name to come. Throws EXEC_FAILED when it cannot. */
export async function spawnVmm(launch: Launch, options: SpawnOptions): Promise<VmmProcess> {
  for (const { path, content } of launch.files) await writeFile(path, content, { mode: 0o600 });
  const diagnostics = await open(
    join(options.cellDir, diagnosticsFileName),
    constants.O_WRONLY | constants.O_CREAT | constants.O_APPEND,
    0o600,
  );
  try {
    const start = (): ChildProcess => spawnDetached(launch, options, diagnostics.fd);
    const child = options.netnsPath === null ? start() : inNetns(options.netnsPath, start);
    return await started(child, launch.program);
  } finally {
    await diagnostics.close();
  }
}

/** The process that an earlier `spawnVmm` left in this folder, if it lives. */
export async function findVmm(cellDir: string): Promise<VmmProcess | undefined> {
  const line = (await readIfExists(join(cellDir, pidFileName)))?.toString("latin1") ?? "";
  const bootId = (await readFile("/proc/sys/kernel/random/boot_id", "latin1")).trim();
  const name = line.startsWith(`${bootId} `) ? parseStat(line.slice(bootId.length)) : undefined;
  if (name === undefined || !(await isAlive(name))) return undefined;
  return { pid: name.pid, isAlive: () => isAlive(name), exited: undefined };
}

/** Last words of the VMM itself, for a person; a guest that broke out into the VMM can write here. */
export async function readDiagnostics(cellDir: string): Promise<string> {
  const text = (await readIfExists(join(cellDir, diagnosticsFileName)))?.toString("utf8") ?? "";
  return text.trim().slice(-600);
}

function spawnDetached(launch: Launch, options: SpawnOptions, diagnosticsFd: number): ChildProcess {
  const groups = options.cgroup.procsFiles;
  if (groups.some((file) => /[\s*?[\]\\]/.test(file)))
    throw new ForgeError("UNSUPPORTED", "a control group is mounted where the name has blanks");
  const maxBlocks = Math.ceil(launch.maxFileBytes / 512); // the unit of ulimit -f (POSIX, sh)
  const script = [groups.join(" "), join(options.cellDir, pidFileName), `${maxBlocks}`, launch.program, ...launch.args];
  return spawn("/bin/sh", ["-c", prelude, "forge-cell", ...script], {
    cwd: "/",
    detached: true,
    env: { ...childEnvironment },
    stdio: ["ignore", diagnosticsFd, diagnosticsFd, ...launch.inheritedFds],
  });
}

async function started(child: ChildProcess, program: string): Promise<VmmProcess> {
  const { pid } = child;
  const exited = new Promise<void>((resolve) => child.once("exit", () => resolve()).once("error", () => resolve()));
  child.unref();
  if (pid === undefined) {
    await exited;
    throw new ForgeError("EXEC_FAILED", `${program} could not be started`);
  }
  let alive = true;
  void exited.then(() => (alive = false));
  return { pid, exited, isAlive: async () => alive };
}

interface ProcessName {
  readonly pid: number;
  /** Clock ticks after boot (proc_pid_stat(5), field 22): with the id, unique until the next boot. */
  readonly startTime: string;
  readonly state: string;
}

async function isAlive(name: ProcessName): Promise<boolean> {
  const now = await readFile(`/proc/${name.pid}/stat`, "latin1").catch(() => "");
  const current = parseStat(now);
  return current !== undefined && current.startTime === name.startTime && !"ZX".includes(current.state);
}

/** The second field is in parentheses and may hold anything, parentheses and blanks too: what counts is after the last. */
export function parseStat(line: string): ProcessName | undefined {
  const match = /^(\d{1,10}) \(.*\) ([A-Za-z]) (.*)$/s.exec(line.trim());
  const startTime = match?.[3]?.split(" ")[18];
  if (match === null || startTime === undefined || !/^\d+$/.test(startTime)) return undefined;
  return { pid: Number(match[1]), state: match[2] ?? "", startTime };
}
