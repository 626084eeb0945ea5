import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { readIfExists } from "../base/durable.ts";
import { errnoOf } from "../base/errors.ts";
import { ForgeHome } from "./context.ts";
import { findDaemon, stopDaemon } from "./daemons.ts";
import { dataDirOf, type Installation, requireInstallation } from "./installation.ts";
import type { Cli } from "./index.ts";
import { bringUp } from "./up.ts";

/** A cell's own stop may take its stopTimeout; they stop side by side. */
const agentTimeoutMs = 180_000;
const controlTimeoutMs = 60_000;

/** `forge down`: the agent stops every cell and cleans up, then the control plane stops its database. What was desired stays desired. */
export async function down(cli: Cli, flags: { data?: string }): Promise<void> {
  const home = new ForgeHome(cli.env);
  const dataDir = dataDirOf(flags.data, await home.read());
  const installation = await requireInstallation(dataDir);
  await reviveAfterCrash(cli, home, dataDir, installation);
  const stopped: string[] = [];
  cli.terminal.progress(["stopping the cells …"]);
  if (await stopDaemon(dataDir, "agent", "SIGUSR2", agentTimeoutMs)) stopped.push("agent");
  cli.terminal.progress(["stopping the control plane …"]);
  if (await stopDaemon(dataDir, "control", "SIGTERM", controlTimeoutMs)) stopped.push("control");
  cli.terminal.progress([]);
  cli.terminal.document({ dataDir, stopped });
  const done =
    stopped.length === 0 ? `nothing ran for ${dataDir}` : `Forge is down: all cells, ${stopped.join(", ")} and its database stopped`;
  cli.terminal.print(`${done}. \`forge up\` brings the services back.`);
}

/** Cells and the database outlive the processes that own them: these must run once more to take their own down in order. */
async function reviveAfterCrash(cli: Cli, home: ForgeHome, dataDir: string, installation: Installation): Promise<void> {
  const agentDied = (await findDaemon(dataDir, "agent")) === undefined && (await isFilled(join(dataDir, "agent", "records")));
  const postmaster = await readIfExists(join(dataDir, "control", "pg", "postmaster.pid"));
  const controlDied = (await findDaemon(dataDir, "control")) === undefined && postmaster !== undefined;
  if (!agentDied && !controlDied) return;
  cli.terminal.note("the runtime had died: starting it once more, so that it stops what it left running");
  await bringUp(cli, home, dataDir, installation);
}

async function isFilled(folder: string): Promise<boolean> {
  try {
    return (await readdir(folder)).length > 0;
  } catch (error) {
    if (errnoOf(error) === "ENOENT") return false;
    throw error;
  }
}
