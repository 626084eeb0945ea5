import { accessSync, constants } from "node:fs";
import { access, open, readdir, readFile, statfs } from "node:fs/promises";
import { availableParallelism, release, totalmem } from "node:os";
import { dirname, join, resolve } from "node:path";
import { childEnvironment, run } from "./exec.ts";
import { ForgeError } from "./errors.ts";

/** One thing Forge needs or likes to have. missing: Forge does not work here. degraded: it works, with less. */
export interface Finding {
  readonly name: string;
  readonly state: "found" | "missing" | "degraded";
  /** What was seen. */
  readonly detail: string;
  /** What it is for, and so what its absence means. */
  readonly meaning: string;
}

export interface ExamineOptions {
  /** Where tools/setup put what it compiled; FORGE_BUILD_DIR, or build/ beside src/. */
  readonly buildDir?: string;
  /** Where the runtime keeps its data; its nearest existing parent is examined. */
  readonly dataDir?: string;
}

/** Looks at this machine without changing it. Order: what everything needs first. */
export async function examine(options: ExamineOptions = {}): Promise<Finding[]> {
  const buildDir = options.buildDir ?? process.env["FORGE_BUILD_DIR"] ?? resolve(import.meta.dirname, "../../build");
  const machine = [examineRoot(), await examineDistribution(), examineNode()];
  const kernel = [
    examineTun(),
    examineTrafficControl(),
    examineBpfFileSystem(),
    examineCgroups(),
    examineVirtualisation(),
    examineWireguard(),
  ];
  const rest = [examineArtefacts(buildDir), examineMemory(), examineDisk(options.dataDir ?? "/var/lib/forge")];
  return [...machine, ...(await Promise.all(programs.map(examineProgram))), ...(await Promise.all(kernel)), ...(await Promise.all(rest))];
}

/** Throws UNSUPPORTED with one sentence per missing thing; degraded ones pass. */
export function requireNothingMissing(findings: readonly Finding[]): void {
  const missing = findings.filter(({ state }) => state === "missing");
  if (missing.length === 0) return;
  const sentences = missing.map(({ name, detail, meaning }) => `${name}: ${detail} (${meaning})`);
  throw new ForgeError("UNSUPPORTED", `this machine lacks ${missing.length} things: ${sentences.join("; ")}`, {
    details: { missing: sentences },
  });
}

function examineRoot(): Finding {
  const meaning = "the node's agent makes network namespaces, taps and cgroups";
  const isRoot = process.getuid?.() === 0;
  return { name: "root", state: isRoot ? "found" : "missing", detail: isRoot ? "running as root" : "not running as root", meaning };
}

async function examineDistribution(): Promise<Finding> {
  const meaning = "packages and their versions are known and tested there";
  const text = await readFile("/etc/os-release", "utf8").catch(() => "");
  const field = (name: string) => new RegExp(`^${name}="?([^"\n]*)"?$`, "m").exec(text)?.[1];
  const isKnown = field("ID") === "debian" && field("VERSION_ID") === "12";
  return { name: "distribution", state: isKnown ? "found" : "degraded", detail: field("PRETTY_NAME") ?? "unknown", meaning };
}

function examineNode(): Finding {
  const [major = 0, minor = 0] = process.versions.node.split(".").map(Number);
  const isNewEnough = major > 24 || (major === 24 && minor >= 12);
  const meaning = "runs Forge's TypeScript as it is; 24.12 is the least";
  return { name: "node", state: isNewEnough ? "found" : "missing", detail: process.versions.node, meaning };
}

interface Program {
  readonly name: string;
  readonly file: string;
  readonly meaning: string;
  /** Only for building sample images, or for tests. */
  readonly optional?: true;
}

const programs: readonly Program[] = [
  { name: "qemu", file: "qemu-system-x86_64", meaning: "runs the microVMs" },
  { name: "mkfs.erofs", file: "mkfs.erofs", meaning: "builds the root file systems of cells" },
  { name: "veritysetup", file: "veritysetup", meaning: "adds the hash tree that detects tampering" },
  { name: "skopeo", file: "skopeo", meaning: "fetches images from registries" },
  { name: "postgres", file: "postgres", meaning: "keeps the state of the control plane" },
  { name: "ip", file: "ip", meaning: "makes network namespaces" },
  { name: "nsenter", file: "nsenter", meaning: "enters the namespace of a cell" },
  { name: "socket-proxyd", file: "systemd-socket-proxyd", meaning: "carries published ports into cells" },
  { name: "clang", file: "clang", meaning: "compiles the packet filters" },
  { name: "musl-gcc", file: "musl-gcc", meaning: "compiles the guest's init" },
  { name: "umoci", file: "umoci", meaning: "builds the sample images", optional: true },
  { name: "mmdebstrap", file: "mmdebstrap", meaning: "fills the sample images with packages", optional: true },
  { name: "docker-registry", file: "docker-registry", meaning: "a real registry for the tests", optional: true },
  { name: "tcpdump", file: "tcpdump", meaning: "proves in tests that no packet leaves", optional: true },
];

async function examineProgram({ name, file, meaning, optional }: Program): Promise<Finding> {
  const versions = await readdir("/usr/lib/postgresql").catch(() => []);
  const folders = [
    ...(childEnvironment["PATH"] ?? "").split(":"),
    "/usr/lib/systemd",
    "/lib/systemd",
    ...versions.map((version) => `/usr/lib/postgresql/${version}/bin`),
  ];
  const path = folders.map((folder) => join(folder, file)).find(isExecutable);
  if (path !== undefined) return { name, state: "found", detail: path, meaning };
  return { name, state: optional === true ? "degraded" : "missing", detail: `the program ${file} is not installed`, meaning };
}

function isExecutable(path: string): boolean {
  try {
    accessSync(path, constants.X_OK);
    return true;
  } catch {
    return false;
  }
}

async function examineTun(): Promise<Finding> {
  const meaning = "a cell's only interface is a tap";
  try {
    await (await open("/dev/net/tun", "r+")).close();
    return { name: "tun", state: "found", detail: "/dev/net/tun", meaning };
  } catch (error) {
    return { name: "tun", state: "missing", detail: `/dev/net/tun cannot be opened (${messageOf(error)})`, meaning };
  }
}

/** Tried out in a network namespace of its own, which goes away with the program that is in it. */
async function examineTrafficControl(): Promise<Finding> {
  const meaning = "every cell has a network namespace, and a packet filter on its tap";
  const name = "netns and clsact";
  try {
    await run("unshare", ["--net", "tc", "qdisc", "add", "dev", "lo", "clsact"], { timeoutMs: 5000 });
    return { name, state: "found", detail: "a filter can be attached in a namespace of its own", meaning };
  } catch (error) {
    return { name, state: "missing", detail: messageOf(error), meaning };
  }
}

async function examineBpfFileSystem(): Promise<Finding> {
  const isKnown = /\tbpf$/m.test(await readFile("/proc/filesystems", "utf8").catch(() => ""));
  const detail = isKnown ? "the kernel has it" : "the kernel has no bpf file system";
  return {
    name: "bpf",
    state: isKnown ? "found" : "missing",
    detail,
    meaning: "the policy between cells is eBPF, its maps outlive the agent",
  };
}

async function examineCgroups(): Promise<Finding> {
  const meaning = "bounds a cell's memory and pins its CPUs";
  const mounts = (await readFile("/proc/self/mounts", "utf8").catch(() => "")).split("\n").map((line) => line.split(" "));
  const unified = mounts.find(([, , type]) => type === "cgroup2")?.[1];
  const cpuset = mounts.find(([, , type, flags]) => type === "cgroup" && flags?.split(",").includes("cpuset"))?.[1];
  const controllers = unified === undefined ? "" : await readFile(join(unified, "cgroup.controllers"), "utf8").catch(() => "");
  if (unified !== undefined && controllers.includes("cpuset"))
    return { name: "cgroups", state: "found", detail: `version 2 at ${unified}`, meaning };
  if (cpuset !== undefined) return { name: "cgroups", state: "found", detail: `version 1, cpuset at ${cpuset}`, meaning };
  if (unified === undefined) return { name: "cgroups", state: "missing", detail: "no cgroup hierarchy is mounted", meaning };
  return { name: "cgroups", state: "degraded", detail: "no cpuset controller: CPUs cannot be pinned", meaning };
}

async function examineVirtualisation(): Promise<Finding> {
  const meaning = "a microVM at native speed; without it emulation, for development only";
  const isCapable = /^flags\s*:.*\b(vmx|svm)\b/m.test(await readFile("/proc/cpuinfo", "utf8").catch(() => ""));
  const hasDevice = await exists("/dev/kvm");
  if (isCapable && hasDevice) return { name: "virtualisation", state: "found", detail: "/dev/kvm and CPU support", meaning };
  const detail = hasDevice ? "/dev/kvm exists, but the CPU reports no vmx or svm: emulated" : "no /dev/kvm: emulated";
  return { name: "virtualisation", state: "degraded", detail, meaning };
}

async function examineWireguard(): Promise<Finding> {
  const modules = `/lib/modules/${release()}`;
  const lists = await Promise.all(["modules.dep", "modules.builtin"].map((list) => readFile(join(modules, list), "utf8").catch(() => "")));
  const isKnown = (await exists("/sys/module/wireguard")) || lists.some((list) => list.includes("/wireguard.ko"));
  const detail = isKnown ? "the kernel has it" : "the kernel has no WireGuard: a mesh of several nodes would run in user space";
  return {
    name: "wireguard",
    state: isKnown ? "found" : "degraded",
    detail,
    meaning: "encrypts what cells say to each other across nodes",
  };
}

async function examineArtefacts(buildDir: string): Promise<Finding> {
  const meaning = "the guest's kernel, its initramfs, and the packet filters";
  const files = await readdir(buildDir, { recursive: true }).catch(() => []);
  const kinds = [/vmlinu[xz]/, /initramfs|initrd/, /\.bpf\.o$/];
  const absent = kinds.filter((kind) => !files.some((file) => kind.test(file)));
  if (absent.length === 0) return { name: "compiled parts", state: "found", detail: buildDir, meaning };
  return { name: "compiled parts", state: "missing", detail: `${buildDir} is not complete: run tools/setup`, meaning };
}

async function examineMemory(): Promise<Finding> {
  const totalMib = Math.floor(totalmem() / 1024 ** 2);
  const detail = `${totalMib} MiB, ${availableParallelism()} CPUs`;
  return {
    name: "memory",
    state: totalMib >= 2000 ? "found" : "degraded",
    detail,
    meaning: "2 GiB hold the runtime and a few small cells",
  };
}

async function examineDisk(dataDir: string): Promise<Finding> {
  let folder = dataDir;
  while (!(await exists(folder)) && dirname(folder) !== folder) folder = dirname(folder);
  const { bavail, bsize } = await statfs(folder);
  const freeMib = Math.floor((bavail * bsize) / 1024 ** 2);
  return {
    name: "disk",
    state: freeMib >= 5000 ? "found" : "degraded",
    detail: `${freeMib} MiB free at ${folder}`,
    meaning: "images, root file systems and logs; 5 GiB to start with",
  };
}

async function exists(path: string): Promise<boolean> {
  return await access(path).then(
    () => true,
    () => false,
  );
}

function messageOf(error: unknown): string {
  return error instanceof Error ? error.message : String(error);
}
