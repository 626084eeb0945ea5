import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join, resolve } from "node:path";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { run } from "../src/base/exec.ts";

/** Each machine is pretended in a mount namespace of its own; set-up gives up before it changes anything. */
const root = resolve(import.meta.dirname, "..");
let folder = "";

beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), "forge-setup-"));
  await writeFile(join(folder, "os-release"), 'ID=plan9\nVERSION_ID="4"\n');
});
afterEach(async () => {
  await rm(folder, { recursive: true, force: true });
});

describe.skipIf(process.getuid?.() !== 0)("tools/setup", () => {
  const noPostgres = "mount -t tmpfs none /usr/lib/postgresql";

  test("on an unknown distribution says what to install, and why", async () => {
    const lacks = await setUpFails(`mount --bind ${folder}/os-release /etc/os-release; ${noPostgres}; tools/setup`);
    expect(lacks).toContain("postgresql-15 is missing (keeps the state of the control plane; Forge runs its own cluster)");
    expect(lacks).toContain("Plan9 4 is not a distribution Forge knows");
  });

  test("without root says what root has to do", async () => {
    const lacks = await setUpFails(`${noPostgres}; setpriv --reuid=65534 --regid=65534 --clear-groups tools/setup`);
    expect(lacks).toContain("run tools/setup as root once");
  });
});

/** Runs the commands as set-up's machine; expects exit code 10 and returns what was said. */
async function setUpFails(commands: string): Promise<string> {
  const env = { FORGE_BUILD_DIR: join(folder, "build") };
  const failure: unknown = await run(
    "unshare",
    ["--mount", "sh", "-c", `umask 0; mkdir ${folder}/build; chmod 755 ${folder}; ${commands}`],
    { cwd: root, env },
  ).then(
    () => undefined,
    (error: unknown) => error,
  );
  expect(failure).toMatchObject({ code: "EXEC_FAILED", details: { exitCode: 10 } });
  return (failure as { details: { stderr: string } }).details.stderr;
}
