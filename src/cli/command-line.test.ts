import { spawn } from "node:child_process";
import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";
import type { Command } from "commander";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { errorCodes, exitFamilies } from "../base/errors.ts";
import { commands } from "./commands.ts";
import { exitCodesText } from "./exit-codes.ts";
import { buildProgram, runCli } from "./index.ts";
import { Terminal } from "./terminal.ts";

let folder = "";
beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "forge-cli-"));
});
afterAll(() => rm(folder, { recursive: true, force: true }));

function collector() {
  const texts: string[] = [];
  return { isTTY: false, write: (text: string | Uint8Array) => texts.push(String(text)) > 0, text: () => texts.join("") };
}

function allCommands(parent: Command): Command[] {
  return parent.commands.flatMap((command) => (command.commands.length === 0 ? [command] : allCommands(command)));
}

function program(): Command {
  const terminal = new Terminal({ stdout: collector(), stderr: collector(), env: {}, json: false });
  return buildProgram({ terminal, env: {}, signal: new AbortController().signal });
}

describe("help", () => {
  test("every command has --json, a summary, and examples that start with its words", () => {
    const found = allCommands(program());
    expect(found.length).toBe(commands.length + 1);
    for (const command of found) {
      expect(command.summary(), command.name()).not.toBe("");
      expect(
        command.options.map(({ long }) => long),
        command.name(),
      ).toContain("--json");
    }
    for (const { group, words, examples } of commands) {
      const name = `forge ${group === undefined ? "" : `${group} `}${words.split(" ")[0]}`;
      expect(
        examples.some((example) => example.includes(name)),
        name,
      ).toBe(true);
    }
  });

  test("is printed with its examples and exits 0", async () => {
    for (const { group, words, examples } of commands) {
      const [stdout, stderr] = [collector(), collector()];
      const path = [group, words.split(" ")[0]].filter((word) => word !== undefined);
      expect(await runCli([...path, "--help"], { stdout, stderr })).toBe(0);
      expect(stdout.text()).toContain("Examples:");
      expect(stdout.text()).toContain(examples[0]);
      expect(stderr.text()).toBe("");
    }
  });

  test("explains every exit code", () => {
    const text = exitCodesText();
    for (const meaning of Object.values(exitFamilies)) expect(text).toContain(meaning);
    for (const code of Object.keys(errorCodes)) expect(text).toContain(code);
  });
});

describe("wrong usage exits 2 and says what was meant", () => {
  test.each([
    [["dpeloy"], "Did you mean deploy?"],
    [["ps", "--al"], "Did you mean --all?"],
    [["token", "craete"], "Did you mean create?"],
    [["token"], "needs one of its commands"],
    [["logs"], "missing required argument 'service'"],
    [["logs", "web", "--tail", "many"], "whole number from 0 to 100000"],
    [["token", "create", "--name", "ci", "--ttl", "1"], "with the unit s, m, h or d"],
    [["token", "create", "--name", "ci", "--role", "king"], "Allowed choices are owner, developer, auditor"],
    [["exec", "web"], "which program?"],
    [["help", "nope"], "there is no command"],
  ])("%j", async (argv, words) => {
    const [stdout, stderr] = [collector(), collector()];
    expect(await runCli(argv, { stdout, stderr })).toBe(2);
    expect(stderr.text()).toContain(words);
    expect(stderr.text()).toContain("(USAGE, exit 2)");
    expect(stdout.text()).toBe("");
  });

  test("with --json as an error body", async () => {
    const [stdout, stderr] = [collector(), collector()];
    expect(await runCli(["ps", "--al", "--json"], { stdout, stderr })).toBe(2);
    expect(JSON.parse(stderr.text())).toMatchObject({ code: "USAGE", remedy: expect.any(String) as string });
  });
});

describe("./forge as a process", { timeout: 60_000 }, () => {
  const wrapper = fileURLToPath(new URL("../../forge", import.meta.url));

  async function forge(
    args: readonly string[],
    env: Record<string, string> = {},
  ): Promise<{ exit: number | null; stdout: string; stderr: string }> {
    const child = spawn(wrapper, args, {
      env: { PATH: process.env["PATH"] ?? "", FORGE_HOME: folder, ...env },
      stdio: ["ignore", "pipe", "pipe"],
      timeout: 50_000,
    });
    const [stdout, stderr] = await Promise.all(
      [child.stdout, child.stderr].map(async (stream) => Buffer.concat(await stream.toArray()).toString()),
    );
    const exit = child.exitCode ?? (await new Promise<number | null>((resolve) => child.once("close", resolve)));
    return { exit, stdout: stdout ?? "", stderr: stderr ?? "" };
  }

  test("prints its version", async () => {
    expect(await forge(["--version"])).toMatchObject({ exit: 0, stdout: expect.stringMatching(/^\d+\.\d+\.\d+\n$/) as string });
  });

  test("an unknown command", async () => {
    expect(await forge(["dpeloy"])).toMatchObject({ exit: 2, stderr: expect.stringContaining("Did you mean deploy?") as string });
  });

  test("a broken manifest, before anything is asked of the region", async () => {
    const path = join(folder, "forge.yaml");
    await writeFile(path, "jurisdiction: de\nservices:\n  web: { image: ./i, memory: 256MB }\n");
    const { exit, stderr } = await forge(["deploy", path]);
    expect(exit).toBe(2);
    expect(stderr).toContain(
      `${path}:3:30: services.web.memory: must be a whole number with the unit MiB or GiB, such as 256MiB; write 256MiB`,
    );
  });

  test("no control plane", async () => {
    const ca = join(folder, "ca.pem");
    await writeFile(ca, "");
    const env = { FORGE_API: "https://127.0.0.1:1", FORGE_TOKEN: "none", FORGE_CA: ca };
    const { exit, stderr } = await forge(["ps", "--json"], env);
    expect(exit).toBe(8);
    expect(JSON.parse(stderr)).toMatchObject({ code: "UNAVAILABLE", message: expect.stringContaining("nothing listens there") as string });
  });
});
