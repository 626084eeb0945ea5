import { examine } from "../src/base/doctor.ts";

/** The end of tools/setup: only what is missing or degraded. `forge doctor` shows the whole table. */
const findings = await examine();
for (const { name, state, detail, meaning } of findings) {
  if (state !== "found") process.stdout.write(`${state.padEnd(9)} ${name}: ${detail} (${meaning})\n`);
}
if (findings.some(({ state }) => state === "missing")) process.exitCode = 10; // "this machine lacks something Forge needs"
