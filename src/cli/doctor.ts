import { type Finding, examine } from "../base/doctor.ts";
import { errorCodes } from "../base/errors.ts";
import { ForgeHome } from "./context.ts";
import { buildDir, dataDirOf } from "./installation.ts";
import type { Cli } from "./index.ts";
import type { Style } from "./terminal.ts";

const styles: Record<Finding["state"], Style> = { found: "green", degraded: "yellow", missing: "red" };

/** `forge doctor`: exits 10 where Forge cannot work here. */
export async function doctor({ terminal, env }: Cli): Promise<number> {
  const dataDir = dataDirOf(undefined, await new ForgeHome(env).read());
  const findings = await examine({ buildDir, dataDir });
  const count = (state: Finding["state"]): number => findings.filter((finding) => finding.state === state).length;
  terminal.document({ items: findings });
  terminal.table<Finding>(
    [
      { title: "WHAT", value: (finding) => finding.name },
      { title: "STATE", value: (finding) => finding.state, paint: (finding) => terminal.painter(styles[finding.state]) },
      { title: "SEEN", value: (finding) => finding.detail, shrink: true },
      { title: "FOR", value: (finding) => finding.meaning, shrink: true },
    ],
    findings,
  );
  terminal.print(`\n${count("found")} found, ${count("degraded")} degraded, ${count("missing")} missing`);
  return count("missing") === 0 ? 0 : errorCodes.UNSUPPORTED.exit;
}
