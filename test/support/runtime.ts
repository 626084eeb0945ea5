import { execa } from "execa";
import { chmod, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { stringify } from "yaml";
import { childEnvironment } from "../../src/base/exec.ts";
import { freePorts } from "../../tools/free-ports.ts";

const root = dirname(dirname(import.meta.dirname));

export interface ForgeResult {
  readonly code: number;
  readonly stdout: string;
  readonly stderr: string;
}

/** A whole runtime of one node with a data folder and ports of its own, driven through the real command line. */
export class Runtime {
  readonly folder: string;
  readonly dataDir: string;
  readonly apiPort: number;
  readonly nodePort: number;
  /** Words before every command: how it gets into another network namespace. */
  readonly #prefix: readonly string[];

  /** `netns`: the named network namespace that is the host's, for this runtime. `folder`: where its own folder is made. */
  static async start(options: { up?: readonly string[]; netns?: string; folder?: string } = {}): Promise<Runtime> {
    const [apiPort = 0, nodePort = 0] = await freePorts(2);
    const prefix = options.netns === undefined ? [] : ["nsenter", `--net=/run/netns/${options.netns}`];
    const folder = await mkdtemp(join(options.folder ?? tmpdir(), "forge-e2e-"));
    await chmod(folder, 0o711); // the control plane's user must get to its own folder below
    const runtime = new Runtime(folder, apiPort, nodePort, prefix);
    await runtime.up(...(options.up ?? []));
    return runtime;
  }

  private constructor(folder: string, apiPort: number, nodePort: number, prefix: readonly string[]) {
    this.folder = folder;
    this.dataDir = join(folder, "data");
    this.apiPort = apiPort;
    this.nodePort = nodePort;
    this.#prefix = prefix;
  }

  /** Starts what does not run. */
  async up(...args: string[]): Promise<void> {
    const ports = ["--api-port", String(this.apiPort), "--node-port", String(this.nodePort)];
    await this.ok("up", "--data", this.dataDir, ...ports, ...args);
  }

  /** Runs `forge …`; never throws for its exit code. */
  async forge(...args: string[]): Promise<ForgeResult> {
    return this.forgeWithInput(undefined, ...args);
  }

  async forgeWithInput(input: string | undefined, ...args: string[]): Promise<ForgeResult> {
    const [program = "", ...words] = [...this.#prefix, join(root, "forge"), ...args];
    const result = await execa(program, words, {
      cwd: this.folder,
      env: { ...childEnvironment, FORGE_HOME: join(this.folder, "home"), NO_COLOR: "1" },
      extendEnv: false,
      reject: false,
      timeout: 180_000,
      ...(input === undefined ? { stdin: "ignore" as const } : { input }),
    });
    return { code: result.exitCode ?? -1, stdout: result.stdout, stderr: result.stderr };
  }

  /** Runs `forge …` and gives its stdout; anything but success is an error that shows what it said. */
  async ok(...args: string[]): Promise<string> {
    const result = await this.forge(...args);
    if (result.code !== 0)
      throw new Error(`forge ${args.join(" ")} ended with ${result.code}\n${result.stdout}\n${result.stderr}\n${await this.#logs()}`);
    return result.stdout;
  }

  async json<T>(...args: string[]): Promise<T> {
    return JSON.parse(await this.ok("--json", ...args)) as T;
  }

  /** Writes a manifest into the runtime's folder and gives its path. */
  async manifest(services: Record<string, unknown>, name = "forge.yaml"): Promise<string> {
    return this.writeFile(name, stringify({ jurisdiction: "de", services }));
  }

  /** A file in the runtime's folder; gives its path. */
  async writeFile(name: string, text: string): Promise<string> {
    const path = join(this.folder, name);
    await writeFile(path, text);
    return path;
  }

  /** Process number of `control` or `agent`. */
  async pid(process: "control" | "agent"): Promise<number> {
    const text = await readFile(join(this.dataDir, "run", `${process}.json`), "utf8");
    return (JSON.parse(text) as { pid: number }).pid;
  }

  /** Takes everything down and removes the folder. */
  async destroy(): Promise<void> {
    const down = await this.forge("down", "--data", this.dataDir);
    if (down.code !== 0) throw new Error(`forge down ended with ${down.code}\n${down.stdout}\n${down.stderr}\n${await this.#logs()}`);
    await rm(this.folder, { recursive: true, force: true });
  }

  async #logs(): Promise<string> {
    const texts = await Promise.all(
      ["control", "agent"].map((name) => readFile(join(this.dataDir, "log", `${name}.log`), "utf8").catch(() => "")),
    );
    return texts.map((text) => text.split("\n").slice(-15).join("\n")).join("\n---\n");
  }
}

/** Runs until it gives something else than undefined; the last failure is told when time is up. */
export async function eventually<T>(what: string, timeoutMs: number, attempt: () => Promise<T | undefined>): Promise<T> {
  const deadline = Date.now() + timeoutMs;
  let last = "";
  while (Date.now() < deadline) {
    try {
      const found = await attempt();
      if (found !== undefined) return found;
    } catch (error) {
      last = error instanceof Error ? `: ${error.message}` : "";
    }
    await new Promise((resolve) => setTimeout(resolve, 50));
  }
  throw new Error(`not within ${timeoutMs} ms: ${what}${last}`);
}
