import { readdir, readFile, readlink } from "node:fs/promises";
import { join } from "node:path";
import { run } from "../src/base/exec.ts";

/**
 * What Forge can leave behind on a machine, as a set of lines: namespaces, interfaces, control groups, mounts, pinned
 * eBPF, processes and listening sockets. Taken before and after; what is new is a leak.
 */
export async function takeInventory(): Promise<Set<string>> {
  const parts = await Promise.all([mounts(), interfaces(), cgroups(), pinned("/sys/fs/bpf"), processes(), listeners(), programs()]);
  return new Set(parts.flat());
}

/** Lines of `after` that `before` has not. */
export function newIn(before: ReadonlySet<string>, after: ReadonlySet<string>): string[] {
  return [...after].filter((line) => !before.has(line)).toSorted();
}

/** Everything mounted (a named network namespace is a mount too). */
async function mounts(): Promise<string[]> {
  const lines = (await readFile("/proc/self/mountinfo", "utf8")).trim().split("\n");
  return lines.map((line) => `mount ${line.split(" ")[4] ?? line}`);
}

async function interfaces(): Promise<string[]> {
  return (await readdir("/sys/class/net")).map((name) => `interface ${name}`);
}

async function cgroups(): Promise<string[]> {
  const found = await run("find", ["/sys/fs/cgroup", "-type", "d", "-path", "*forge*"]);
  return found
    .split("\n")
    .filter(Boolean)
    .map((path) => `cgroup ${path}`);
}

async function pinned(path: string): Promise<string[]> {
  const entries = await readdir(path, { withFileTypes: true, recursive: true }).catch(() => []);
  return entries.map((entry) => `pinned ${join(entry.parentPath, entry.name)}`);
}

/** Loaded eBPF programs, by name and number. */
async function programs(): Promise<string[]> {
  const text = await run("bpftool", ["prog", "list", "-j"]).catch(() => "[]");
  const list = JSON.parse(text) as { id: number; name?: string; type: string }[];
  return list.map(({ id, name, type }) => `program ${type} ${name ?? ""} ${id}`);
}

/** Of PostgreSQL the server itself: its workers come and go. */
const ours = /qemu-system|systemd-socket-proxyd|src\/main\.ts|bin\/postgres/;

async function processes(): Promise<string[]> {
  const lines: string[] = [];
  for (const pid of await readdir("/proc")) {
    if (!/^[0-9]+$/.test(pid)) continue;
    const command = (await readFile(`/proc/${pid}/cmdline`, "utf8").catch(() => "")).replaceAll("\0", " ").trim();
    const isOurs = ours.test(command) && (await readlink(`/proc/${pid}/exe`).catch(() => "")) !== "";
    if (isOurs) lines.push(`process ${pid} ${command.slice(0, 160)}`);
  }
  return lines;
}

async function listeners(): Promise<string[]> {
  const text = await run("ss", ["-Hltnx"]);
  return text
    .split("\n")
    .map((line) => line.trim().split(/\s+/))
    .filter((fields) => /forge|127\.0\.0\.1|::1/.test(fields.join(" ")) && fields.includes("LISTEN"))
    .map((fields) => `listener ${fields[0]} ${fields[4] ?? ""}`);
}
