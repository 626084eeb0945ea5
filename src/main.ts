import { enableCompileCache } from "node:module";
import { fileURLToPath } from "node:url";

/** argv -> cli | control | agent, nothing else. Each entry point is loaded only when it is the one asked for. */
const [word, ...rest] = process.argv.slice(2);

// Stripping types and compiling took 0.6 s of a command's 0.9 s. The cache lies with the code, so that whoever may change one may
// change the other and nobody else; where it cannot be written Node goes on without.
enableCompileCache(fileURLToPath(new URL("../node_modules/.cache/forge", import.meta.url)));

if (word === "control") {
  const { dataDir, installation } = await installationNamedBy(rest);
  const { runControl } = await import("./control/main.ts");
  await runControl({ dataDir, apiPort: installation.apiPort, nodePort: installation.nodePort });
} else if (word === "agent") {
  const { dataDir, installation } = await installationNamedBy(rest);
  const { runAgent } = await import("./agent/main.ts");
  const { apiUrlOf, buildDir, nodeUrlOf } = await import("./cli/installation.ts");
  const { jurisdiction, site, rack, nodeName, profile, publishAddress } = installation;
  const urls = { apiUrl: apiUrlOf(installation), controlUrl: nodeUrlOf(installation) };
  await runAgent({ dataDir, buildDir, ...urls, jurisdiction, site, rack, nodeName, profile, publishAddress });
} else {
  const { runCli } = await import("./cli/index.ts");
  process.exitCode = await runCli(process.argv.slice(2));
}

/** `control --data DIR`, `agent --data DIR`: all else is in DATA/forge.json, as `forge up` left it. */
async function installationNamedBy(args: readonly string[]) {
  const { defaultDataDir, requireInstallation } = await import("./cli/installation.ts");
  const dataDir = args[0] === "--data" && args[1] !== undefined ? args[1] : defaultDataDir;
  return { dataDir, installation: await requireInstallation(dataDir) };
}
