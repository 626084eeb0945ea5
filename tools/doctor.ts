import { examine } from "../src/base/doctor.ts";

/** The end of tools/setup: only what is missing or degraded. `forge doctor` shows the whole table. */
const findings = await examine();
for (const { name, state, detail, meaning } of findings) {
  if (state !== "found") process.stdout.write(`${state.padEnd(9)} ${name}: ${detail} (${meaning})\n`);
}
const isReady = findings.every(({ state }) => state !== "missing");
process.stdout.write(isReady ? "This machine is ready for Forge.\n" : "This machine is not ready for Forge.\n");
if (!isReady) process.exitCode = 10; // "this machine lacks something Forge needs"
