import { errorCodes } from "../base/errors.ts";
import { withApi } from "./context.ts";
import type { Cli } from "./index.ts";
import { printable } from "./text.ts";

/** `forge audit verify`: the exit code is the answer, for scripts. */
export async function verify({ terminal, ...cli }: Cli): Promise<number> {
  const report = await withApi(cli, (api) => api.call("verifyAudit", {}, 600_000));
  terminal.document(report);
  if (report.ok) {
    terminal.print(`${terminal.paint("green", "the chain verifies")}: ${report.entries} entries`);
    terminal.print(`head ${report.head}`);
    return 0;
  }
  const bad = report.firstBad === null ? "" : ` at entry ${report.firstBad.sequence}: ${printable(report.firstBad.problem)}`;
  terminal.print(`${terminal.paint("red", "the chain is broken")}${bad}`);
  terminal.print(errorCodes.AUDIT_BROKEN.remedy);
  return errorCodes.AUDIT_BROKEN.exit;
}
