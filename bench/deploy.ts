import { spawn } from "node:child_process";
import { copyFile, mkdtemp, readFile, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import type { Cell, Phases } from "../src/api/resources.ts";
import { run } from "../src/base/exec.ts";
import { Connection, ForgeHome } from "../src/cli/context.ts";
import { GuestChannel } from "../src/isocell/channel.ts";
import { writeBusyboxImage } from "../test/support/busybox-image.ts";
import { Runtime } from "../test/support/runtime.ts";
import { median, quantiles, table } from "./statistics.ts";

/**
 * What a deploy costs above the bare VMM: from the API call to the entrypoint's start, the image cached, against the same
 * QEMU command line (same kernel, initramfs, root file system, config drive, a tap) started by hand and measured to the
 * same moment. The two take turns, so that a noisy machine is noisy for both.
 *
 *   node bench/deploy.ts [PAIRS]
 */
const pairs = Number(process.argv[2] ?? 12);
const service = { imageReference: "bench", jurisdiction: "de" } as const;
const spec = { memory: "128MiB", restart: "never", stopTimeout: "1s", command: ["sleep", "1000"] } as const;

interface Deploy {
  readonly totalMs: number;
  readonly admitMs: number;
  readonly phases: Phases;
}

const runtime = await Runtime.start();
const folder = await mkdtemp(join(tmpdir(), "forge-bench-"));
const tap = `fb${process.pid}`;
try {
  const api = new Connection(await new ForgeHome({ FORGE_HOME: join(runtime.folder, "home") }).effective(), new AbortController().signal);
  const imageDigest = await writeBusyboxImage(join(runtime.folder, "web"));
  await runtime.ok("image", "sign", join(runtime.folder, "web"));
  await runtime.ok("deploy", await runtime.manifest({ warm: { image: "./web", ...spec } }));
  await run("ip", ["tuntap", "add", tap, "mode", "tap"]);
  await run("ip", ["link", "set", tap, "up"]);
  const bareCommand = await commandOfRunningCell();
  await runtime.ok("rm", "warm");
  await deploy(api, imageDigest, "first");
  const deploys: Deploy[] = [];
  const bares: number[] = [];
  for (let n = 0; n < pairs; n++) {
    bares.push(await bootBare(bareCommand));
    deploys.push(await deploy(api, imageDigest, `bench-${n}`));
    process.stderr.write(
      `pair ${n + 1} of ${pairs}: bare ${Math.round(bares.at(-1) ?? 0)} ms, deploy ${Math.round(deploys.at(-1)?.totalMs ?? 0)} ms\n`,
    );
  }
  print(deploys, bares);
} finally {
  await run("ip", ["link", "delete", tap]).catch(() => undefined);
  await rm(folder, { recursive: true, force: true });
  await runtime.destroy();
}

function print(deploys: readonly Deploy[], bares: readonly number[]): void {
  const overheads = deploys.map(({ totalMs }, n) => totalMs - (bares[n] ?? 0));
  // What Forge does before the VMM runs: free of the emulation's noise, which is larger than the overhead itself.
  const own = deploys.map(({ totalMs, phases }) => totalMs - (phases.kernelMs ?? 0) - (phases.initMs ?? 0));
  const phase = (name: keyof Phases): number[] => deploys.map(({ phases }) => phases[name] ?? 0);
  const rows: [string, number[]][] = [
    ["admit (the API call)", deploys.map(({ admitMs }) => admitMs)],
    ["prepare (image cached)", phase("prepareMs")],
    ["attach", phase("attachMs")],
    ["spawn", phase("spawnMs")],
    ["kernel", phase("kernelMs")],
    ["init", phase("initMs")],
    ["deploy: call to entrypoint", deploys.map(({ totalMs }) => totalMs)],
    ["bare VMM: spawn to entrypoint", [...bares]],
    ["overhead, pair by pair", overheads],
    ["deploy less kernel and init", own],
  ];
  console.log(
    table(
      ["ms", "min", "median", "max"],
      rows.map(([name, values]) => [name, ...quantiles(values).map((value) => value.toFixed(1))]),
    ),
  );
  console.log(`ratio of medians, deploy / bare: ${(median(deploys.map(({ totalMs }) => totalMs)) / median(bares)).toFixed(3)}`);
}

/**
 * One deploy through the API, to the entrypoint's start, and its removal. Plans before it warm what idled while the bare
 * VMM booted: a host that takes idle memory away makes the first call slow, and that is not a deploy's cost.
 */
async function deploy(api: Connection, imageDigest: string, name: string): Promise<Deploy> {
  const body = { ...service, name, imageDigest, spec: { ...spec, command: [...spec.command] } };
  for (let n = 0; n < 20; n++) await api.call("applyService", { body: { ...body, dryRun: true } });
  const begunMs = Date.now();
  await api.call("applyService", { body });
  const admitMs = Date.now() - begunMs;
  const cell = await untilRunning(api, name);
  await api.call("removeService", { params: { name } });
  for (let gone = false; !gone; await delay(50)) gone = (await api.call("listCells", {})).items.every(({ service: of }) => of !== name);
  const entrypointAtMs = Date.parse(cell.startedAt ?? "") - (cell.phases.entrypointMs ?? 0);
  return { totalMs: entrypointAtMs - begunMs, admitMs, phases: cell.phases };
}

async function untilRunning(api: Connection, name: string): Promise<Cell> {
  for (;;) {
    const cell = (await api.call("listCells", {})).items.find(
      ({ service: of, state }) => of === name && (state === "running" || state === "failed"),
    );
    if (cell?.state === "failed") throw new Error(`the cell failed: ${cell.reason}`);
    if (cell !== undefined) return cell;
    await delay(100);
  }
}

/** What a person would type: the cell's own QEMU line without confinement, on files and a tap of its own. */
async function commandOfRunningCell(): Promise<string[]> {
  const pids = (await run("pgrep", ["-f", `qemu-system.*${runtime.dataDir}/agent/cells`])).trim().split("\n");
  const args = (await readFile(`/proc/${pids[0]}/cmdline`, "utf8")).split("\0").slice(0, -1);
  const cellDir = /=(\/\S+?\/cells\/[^/,]+)/.exec(args.find((arg) => arg.includes("path=") && arg.includes("/cells/")) ?? "")?.[1] ?? "";
  await copyFile(join(cellDir, "config"), join(folder, "config"));
  const without = new Set(["-chroot", "-runas", "-sandbox"]);
  const kept = args.filter((arg, index) => !without.has(arg) && !without.has(args[index - 1] ?? ""));
  return kept.map((arg) => arg.replaceAll(cellDir, folder).replace("tap,id=net,fd=3", `tap,id=net,ifname=${tap},script=no,downscript=no`));
}

/** From the spawn to the entrypoint's start, by the guest's own word. */
async function bootBare([program = "", ...args]: readonly string[]): Promise<number> {
  const started = Promise.withResolvers<void>();
  const begunMs = performance.now();
  const vmm = spawn(program, args, { stdio: "ignore" });
  try {
    const channel = await GuestChannel.connect(join(folder, "channel"), {
      lastLogSequence: 0,
      timeoutMs: 60_000,
      handlers: { started: () => started.resolve() },
    });
    await started.promise;
    const tookMs = performance.now() - begunMs;
    await channel.close();
    return tookMs;
  } finally {
    vmm.kill("SIGKILL");
    await new Promise((resolve) => vmm.once("exit", resolve));
    for (const name of ["channel", "console"]) await rm(join(folder, name), { force: true });
  }
}
