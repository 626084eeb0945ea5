import type { Status } from "../api/resources.ts";
import { errorCodes, type ErrorBody, toForgeError } from "../base/errors.ts";
import { ForgeHome, withApi } from "./context.ts";
import { findDaemon } from "./daemons.ts";
import { dataDirOf } from "./installation.ts";
import type { Cli } from "./index.ts";

interface Answer {
  readonly status?: Status;
  readonly error?: ErrorBody;
}

/** `forge status`: exits 0 when the control plane answers. */
export async function status(cli: Cli, flags: { data?: string }): Promise<number> {
  const context = await new ForgeHome(cli.env).read();
  const dataDir = dataDirOf(flags.data, context);
  const [control, agent] = await Promise.all([findDaemon(dataDir, "control"), findDaemon(dataDir, "agent")]);
  const answer = await ask(cli);
  const apiUrl = cli.env["FORGE_API"] ?? context?.apiUrl ?? null;
  cli.terminal.document({
    apiUrl,
    dataDir,
    processes: { control: control ?? null, agent: agent ?? null },
    status: answer.status ?? null,
    error: answer.error ?? null,
  });
  const { terminal } = cli;
  const running = (pid: number | undefined): string =>
    pid === undefined ? terminal.paint("red", "not running") : `${terminal.paint("green", "running")} (pid ${pid})`;
  terminal.print(`control   ${running(control)}`);
  terminal.print(`agent     ${running(agent)}`);
  terminal.print(`data      ${dataDir}`);
  if (apiUrl !== null) terminal.print(`API       ${apiUrl}`);
  if (answer.status !== undefined) describe(cli, answer.status);
  if (answer.error !== undefined) terminal.print(`API       ${terminal.paint("red", answer.error.code)}: ${answer.error.message}`);
  return answer.error === undefined ? 0 : errorCodes[answer.error.code].exit;
}

async function ask(cli: Cli): Promise<Answer> {
  try {
    return { status: await withApi(cli, (api) => api.call("getStatus", {})) };
  } catch (error) {
    return { error: toForgeError(error).toBody() };
  }
}

function describe({ terminal }: Cli, found: Status): void {
  terminal.print(`version   ${found.version}`);
  terminal.print(`region    ${found.region}, addresses in ${found.installationPrefix}`);
  terminal.print(`you       ${found.tokenName ?? "?"}, ${found.role ?? "no role"} of ${found.tenant ?? "the platform"}`);
}
