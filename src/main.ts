import { enableCompileCache } from "node:module";
import { fileURLToPath } from "node:url";

/** argv -> cli | control | agent, nothing else. Each entry point is loaded only when it is the one asked for. */
const [word, ...rest] = process.argv.slice(2);

// Stripping types and compiling took 0.6 s of a command's 0.9 s. The cache lies with the code, so that whoever may change one may
// change the other and nobody else; where it cannot be written Node goes on without.
enableCompileCache(fileURLToPath(new URL("../node_modules/.cache/forge", import.meta.url)));

if (word === "control" || word === "agent") {
  process.exitCode = await runDaemon(word, rest);
} else {
  const { runCli } = await import("./cli/index.ts");
  process.exitCode = await runCli(process.argv.slice(2));
}

/** `control --data DIR`, `agent --data DIR`: all else is in DATA/forge.json, as `forge up` left it. Returns the exit code. */
async function runDaemon(name: "control" | "agent", args: readonly string[]): Promise<number> {
  const { createLogger } = await import("./base/log.ts");
  const { toForgeError } = await import("./base/errors.ts");
  try {
    const { agentOptions, controlOptions, defaultDataDir } = await import("./cli/installation.ts");
    const dataDir = args[0] === "--data" && args[1] !== undefined ? args[1] : defaultDataDir;
    if (name === "control") {
      const options = await controlOptions(dataDir);
      await (await import("./control/main.ts")).runControl(options);
    } else {
      const options = await agentOptions(dataDir);
      await (await import("./agent/main.ts")).runAgent(options);
    }
    return 0;
  } catch (error) {
    const failure = toForgeError(error);
    createLogger(name).fatal({ err: failure, code: failure.code }, `${name} cannot go on`);
    return failure.exitCode;
  }
}
