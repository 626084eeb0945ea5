import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { expect, test } from "vitest";
import { run } from "../../src/base/exec.ts";
import { Runtime } from "../support/runtime.ts";
import { freePorts } from "../../tools/free-ports.ts";

/** The README's commands do what it says, word for word; only the folder and the ports are this test's own. */

const root = join(import.meta.dirname, "../..");

test("the README's session", async () => {
  const readme = await readFile(join(root, "README.md"), "utf8");
  const block = /<!-- executed by [^>]*-->\n```sh\n([\s\S]*?)```/.exec(readme)?.[1] ?? "";
  const commands = block.trim().split("\n");
  expect(commands.length).toBeGreaterThan(8);
  const runtime = await Runtime.start();
  try {
    const [port = 0] = await freePorts(1);
    for (const command of commands) {
      const [program, ...args] = command.split(" ");
      expect(program).toBe("./forge");
      if (["up", "down"].includes(args[0] ?? "")) continue; // by Runtime, with this test's folder and ports
      const output = await runtime.ok(...(await Promise.all(args.map((arg) => inThisPlace(arg, runtime, port)))));
      expect(output.length, command).toBeGreaterThan(0);
      if (args[0] === "deploy") expect(await run("curl", ["--silent", "--fail", `http://127.0.0.1:${port}/`])).toContain("Forge");
    }
  } finally {
    await runtime.destroy();
  }
}, 300_000);

/** The sample's manifest with this test's port; other paths relative to the repository. */
async function inThisPlace(arg: string, runtime: Runtime, port: number): Promise<string> {
  if (!arg.startsWith("examples/")) return arg;
  if (!arg.endsWith(".yaml")) return join(root, arg);
  const text = (await readFile(join(root, arg), "utf8"))
    .replace(/publish: *8080/, `publish: ${port}`)
    .replace("./image", join(root, "examples/web/image"));
  return runtime.writeFile("readme.yaml", text);
}
