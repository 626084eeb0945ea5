import { join } from "node:path";
import type { Node } from "../api/resources.ts";
import { examine, requireNothingMissing } from "../base/doctor.ts";
import { readIfExists, removeDurable } from "../base/durable.ts";
import { ForgeError } from "../base/errors.ts";
import { Connection, type Context, ForgeHome } from "./context.ts";
import { findDaemon, logPath, startDaemon, type StartedDaemon, waitForDaemon } from "./daemons.ts";
import { apiUrlOf, buildDir, dataDirOf, type Installation, readInstallation, writeInstallation } from "./installation.ts";
import type { Cli } from "./index.ts";
import { trustLocalKey } from "./signing-key.ts";

export interface UpFlags {
  readonly data?: string;
  readonly jurisdiction?: string;
  readonly site?: string;
  readonly rack?: string;
  readonly name?: string;
  readonly profile?: "development" | "production";
  readonly publishAddress?: string;
  readonly apiPort?: number;
  readonly nodePort?: number;
}

const readyTimeoutMs = 60_000;

/** `forge up`: control plane, then agent, each only where it is not running; then this person's context. */
export async function up(cli: Cli, flags: UpFlags): Promise<void> {
  const home = new ForgeHome(cli.env);
  const dataDir = dataDirOf(flags.data, await home.read());
  if (process.getuid?.() !== 0)
    throw new ForgeError("UNSUPPORTED", "`forge up` makes network namespaces, cgroups and microVMs: it must run as root");
  const { data: _data, name: nodeName, ...place } = flags;
  const { json: _json, ...changes } = { ...place, nodeName } as typeof place & { nodeName?: string; json?: boolean };
  const before = await readInstallation(dataDir);
  const installation = await writeInstallation(dataDir, changes);
  const runs = await Promise.all([findDaemon(dataDir, "control"), findDaemon(dataDir, "agent")]);
  if (runs.includes(undefined)) requireNothingMissing(await examine({ buildDir, dataDir }));
  if (before !== undefined && JSON.stringify(before) !== JSON.stringify(installation) && runs[0] !== undefined) {
    cli.terminal.note("note: changed options take effect after `forge down` and `forge up`");
  }
  const { context, node, started } = await bringUp(cli, home, dataDir, installation);
  cli.terminal.document({ apiUrl: context.apiUrl, dataDir, node, started });
  describeRuntime(cli, dataDir, context, node, started);
}

/** Starts what is not running, waits until it is of use, and keeps the context. Also the first half of a `down` after a crash. */
export async function bringUp(
  cli: Cli,
  home: ForgeHome,
  dataDir: string,
  installation: Installation,
): Promise<{ context: Context; node: Node; started: string[] }> {
  const started: string[] = [];
  const control = await ensureControl(cli, dataDir);
  if (control !== undefined) started.push("control");
  const context = await keepContext(home, dataDir, installation);
  const api = new Connection(context, cli.signal);
  try {
    await waitForHealth(cli, dataDir, api, control);
    await trustLocalKey(api, home);
    const { node, isNew } = await ensureAgent(cli, dataDir, installation, api);
    if (isNew) started.push("agent");
    return { context, node, started };
  } finally {
    api.close();
  }
}

async function ensureControl(cli: Cli, dataDir: string): Promise<StartedDaemon | undefined> {
  const ready = join(dataDir, "control", "run", "ready.json");
  const isRunning = (await findDaemon(dataDir, "control")) !== undefined;
  if (!isRunning) await removeDurable(ready).catch(ignoreAbsentFolder); // left by one that was killed
  const started = isRunning ? undefined : await startDaemon(dataDir, "control");
  if (started !== undefined) cli.terminal.progress(["starting the control plane …"]);
  await waitForDaemon({ dataDir, name: "control", started, timeoutMs: readyTimeoutMs, signal: cli.signal }, () => readIfExists(ready));
  return started;
}

/** A control plane that runs may have lost its database a moment ago: it brings it back itself. */
async function waitForHealth(cli: Cli, dataDir: string, api: Connection, started: StartedDaemon | undefined): Promise<void> {
  await waitForDaemon({ dataDir, name: "control", started, timeoutMs: readyTimeoutMs, signal: cli.signal }, () =>
    api.call("getHealth", {}).catch((error: unknown) => {
      if (error instanceof ForgeError && error.httpStatus === 503) return undefined;
      throw error;
    }),
  );
}

async function ensureAgent(
  cli: Cli,
  dataDir: string,
  installation: Installation,
  api: Connection,
): Promise<{ node: Node; isNew: boolean }> {
  const isRunning = (await findDaemon(dataDir, "agent")) !== undefined;
  const sinceMs = Date.now();
  const started = isRunning ? undefined : await startDaemon(dataDir, "agent");
  if (started !== undefined) cli.terminal.progress(["the control plane runs", "starting the agent …"]);
  const node = await waitForDaemon({ dataDir, name: "agent", started, timeoutMs: readyTimeoutMs, signal: cli.signal }, async () => {
    const { items } = await api.call("listNodes", {});
    // A node that was there before counts once it was heard of again.
    return items.find(
      ({ name, state, lastSeenAt }) =>
        name === installation.nodeName && state === "ready" && (isRunning || Date.parse(lastSeenAt) >= sinceMs),
    );
  });
  cli.terminal.progress([]);
  return { node, isNew: started !== undefined };
}

/** The owner's token waits in the data folder for the first `forge up`; it moves into this person's context. */
async function keepContext(home: ForgeHome, dataDir: string, installation: Installation): Promise<Context> {
  const bootstrap = join(dataDir, "control", "bootstrap");
  const caPem = (await readIfExists(join(dataDir, "control", "ca.pem")))?.toString();
  if (caPem === undefined) throw new ForgeError("UNAVAILABLE", `the control plane left no CA certificate in ${dataDir}/control/ca.pem`);
  const fresh = (await readIfExists(join(bootstrap, "owner-token")))?.toString().trim();
  const stored = await home.read();
  const token = fresh ?? (stored?.dataDir === dataDir ? stored.token : undefined);
  if (token === undefined) {
    const message = `the owner's token of ${dataDir} went to another FORGE_HOME when it was set up; ${home.folder} has none for it`;
    throw new ForgeError("UNAUTHENTICATED", message);
  }
  const context = { apiUrl: apiUrlOf(installation), caPem, token, dataDir };
  await home.write(context);
  await removeDurable(join(bootstrap, "owner-token")).catch(ignoreAbsentFolder);
  const operator = await readIfExists(join(bootstrap, "operator-token"));
  if (operator !== undefined) {
    await home.writeFile("operator-token", operator.toString());
    await removeDurable(join(bootstrap, "operator-token"));
  }
  return context;
}

function describeRuntime({ terminal }: Cli, dataDir: string, context: Context, node: Node, started: readonly string[]): void {
  const done = started.length === 0 ? "Forge was already up" : `Forge is up (${started.map((name) => `${name} started`).join(", ")})`;
  terminal.print(terminal.paint("bold", done));
  terminal.print(`  API    ${context.apiUrl}`);
  const place = `${node.jurisdiction}/${node.site}/${node.rack}`;
  const vmm = node.emulated ? `${node.vmm} (emulated: for development)` : node.vmm;
  terminal.print(`  node   ${node.name} in ${place}, ${node.vcpus} vCPUs, ${node.memoryMib} MiB, ${vmm}`);
  terminal.print(`  data   ${dataDir}`);
  terminal.print(`  logs   ${logPath(dataDir, "control")}, ${logPath(dataDir, "agent")}`);
  terminal.print("");
  terminal.print("Next: forge image build examples/web && forge deploy examples/web/forge.yaml");
}

function ignoreAbsentFolder(error: unknown): void {
  if ((error as { code?: string }).code !== "ENOENT") throw error;
}
