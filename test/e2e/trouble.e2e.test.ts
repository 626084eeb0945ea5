import { mkdtemp, rm, truncate, writeFile } from "node:fs/promises";
import { createServer } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { run } from "../../src/base/exec.ts";
import type { Cell } from "../../src/api/resources.ts";
import { writeBusyboxImage } from "../support/busybox-image.ts";
import { eventually, type ForgeResult, Runtime } from "../support/runtime.ts";
import { freePorts } from "../../tools/free-ports.ts";

/** What goes wrong is told in one sentence with a stable code and the documented exit status; and then it goes on. */

let runtime: Runtime;
const at = (name: string): string => join(runtime.folder, name);
const small = (more: Record<string, unknown> = {}) => ({ image: "./web", memory: "128MiB", restart: "never", ...more });
const cellOf = async (service: string): Promise<Cell | undefined> =>
  (await runtime.json<{ items: Cell[] }>("ps", "--all")).items.find((cell) => cell.service === service);

async function deploy(name: string, service: Record<string, unknown>, ...flags: string[]): Promise<ForgeResult> {
  return runtime.forge("deploy", ...flags, await runtime.manifest({ [name]: service }, `${name}.yaml`));
}

function expectError(result: ForgeResult, exit: number, code: string): void {
  expect(result.stderr).toContain(code);
  expect(result.code).toBe(exit);
}

beforeAll(async () => {
  runtime = await Runtime.start();
  await writeBusyboxImage(at("web"));
  await runtime.ok("image", "sign", at("web"));
}, 120_000);
afterAll(() => runtime?.destroy(), 120_000);

describe("what a person gets wrong", () => {
  test("broken YAML: line and column", async () => {
    await writeFile(at("broken.yaml"), "services:\n  web: [\n");
    const result = await runtime.forge("deploy", at("broken.yaml"));
    expectError(result, 2, "MANIFEST_INVALID");
    expect(result.stderr).toMatch(/broken\.yaml:[0-9]+/);
  });

  test("a wrong unit and an unknown key: both are named, each with its line", async () => {
    await writeFile(at("wrong.yaml"), "jurisdiction: de\nservices:\n  web:\n    image: ./web\n    memory: 256MB\n    replica: 2\n");
    const result = await runtime.forge("deploy", at("wrong.yaml"));
    expectError(result, 2, "MANIFEST_INVALID");
    expect(result.stderr).toMatch(/wrong\.yaml:5.*memory/);
    expect(result.stderr).toMatch(/wrong\.yaml:6.*replica/);
  });

  test("an image that is not there", async () => {
    expectError(await deploy("absent", small({ image: "./absent" })), 3, "IMAGE_NOT_FOUND");
  });

  test("a corrupt archive", async () => {
    await run("tar", ["-cf", at("web.tar"), "-C", at("web"), "."]);
    await truncate(at("web.tar"), 500_000);
    expectError(await deploy("corrupt", small({ image: "oci-archive:./web.tar" })), 5, "IMAGE_CORRUPT");
  });

  test("more memory than there is", async () => {
    expectError(await deploy("huge", small({ memory: "1000GiB" })), 7, "NO_ROOM");
    expect(await cellOf("huge")).toBeUndefined();
  });

  test("a port of another service, and a port of somebody else", async () => {
    const [port = 0, taken = 0] = await freePorts(2);
    const ports = (publish: number) => [{ name: "http", port: 80, publish }];
    expect((await deploy("first", small({ ports: ports(port) }))).code).toBe(0);
    expectError(await deploy("second", small({ ports: ports(port) })), 7, "PORT_TAKEN");
    const foreigner = createServer().listen(taken, "127.0.0.1");
    try {
      const result = await deploy("third", small({ ports: ports(taken) }));
      expectError(result, 9, "PORT_TAKEN");
    } finally {
      foreigner.close();
    }
    for (const name of ["first", "third"]) await runtime.ok("rm", name);
  }, 120_000);

  test("a token of another role, a wrong token, no runtime", async () => {
    const made = await runtime.json<{ secret: string }>("token", "create", "--name", "reader", "--role", "auditor");
    const withToken = (token: string, ...args: string[]) =>
      run("env", [`FORGE_TOKEN=${token}`, `FORGE_HOME=${at("home")}`, "./forge", ...args], { cwd: join(import.meta.dirname, "../..") });
    await expect(withToken(made.secret, "stop", "web")).rejects.toThrow(/FORBIDDEN/);
    await expect(withToken(`${made.secret}x`, "ps")).rejects.toThrow(/UNAUTHENTICATED/);
    expect(await withToken(made.secret, "ps")).toBeDefined();
  }, 60_000);
});

describe("what a guest does wrong", () => {
  test("an init that exits at once", async () => {
    const result = await deploy("brief", small({ command: ["sh", "-c", "echo last words; exit 3"], health: { port: 80, grace: "20s" } }));
    expect(result.code).toBe(9);
    expect(result.stdout + result.stderr).toContain("last words");
    expect(await cellOf("brief")).toMatchObject({ state: "failed", exitStatus: 3 });
    await runtime.ok("rm", "brief");
  }, 60_000);

  test("a program that is not in the image", async () => {
    const result = await deploy("nothing", small({ command: ["/no/such/program"] }));
    expect(result.code).toBe(9);
    expect(result.stderr + result.stdout).toContain("/no/such/program");
    await runtime.ok("rm", "nothing");
  }, 60_000);

  test("one that never gets ready", async () => {
    const result = await deploy("mute", small({ command: ["sleep", "1000"], health: { port: 80, grace: "5s" } }));
    expectError(result, 9, "GUEST_NOT_READY");
    await runtime.ok("rm", "mute");
  }, 60_000);

  test("one that writes without end: its log is bounded and the node goes on", async () => {
    const result = await deploy(
      "noisy",
      small({ command: ["sh", "-c", "yes aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa"] }),
      "--no-wait",
    );
    expect(result.code).toBe(0);
    await eventually("it runs", 60_000, async () => ((await cellOf("noisy"))?.state === "running" ? true : undefined));
    await new Promise((resolve) => setTimeout(resolve, 5000));
    const used = Number((await run("du", ["-sm", join(runtime.dataDir, "agent/logs")])).split("\t")[0]);
    expect(used).toBeLessThan(64);
    expect((await runtime.ok("exec", "noisy", "--", "echo", "alive")).trim()).toBe("alive");
    await runtime.ok("rm", "noisy");
  }, 90_000);
});

describe("what the machine does wrong", () => {
  test("the database is gone: a clear answer, cells run on, and it mends itself", async () => {
    expect((await deploy("web", small())).code).toBe(0);
    const postmaster = Number((await run("cat", [join(runtime.dataDir, "control/pg/postmaster.pid")])).split("\n")[0]);
    process.kill(postmaster, "SIGKILL");
    expectError(await runtime.forge("ps"), 8, "DATABASE_UNAVAILABLE");
    await runtime.up();
    await eventually("it answers again", 30_000, async () => ((await runtime.forge("ps")).code === 0 ? true : undefined));
    expect((await runtime.ok("exec", "web", "--", "echo", "still here")).trim()).toBe("still here");
    await runtime.ok("audit", "verify");
    await runtime.ok("rm", "web");
  }, 120_000);
});

test("a full disk: refused with its code, and it goes on when there is room", async () => {
  const mount = await mkdtemp(join(tmpdir(), "forge-full-"));
  await run("mount", ["-t", "tmpfs", "-o", "size=260m,mode=0755", "tmpfs", mount]);
  let full: Runtime | undefined;
  try {
    full = await Runtime.start({ folder: mount });
    await writeBusyboxImage(join(full.folder, "web"));
    await full.ok("image", "sign", join(full.folder, "web"));
    const manifest = await full.manifest({ web: small() });
    const { free, blockSize } = await spaceOf(mount);
    await run("dd", ["if=/dev/zero", `of=${join(mount, "filler")}`, `bs=${blockSize}`, `count=${Math.max(0, free - 300)}`]);
    const refused = await full.forge("deploy", manifest);
    expect(refused.code).toBe(7);
    expect(refused.stderr).toContain("DISK_FULL");
    await rm(join(mount, "filler"));
    expect((await full.forge("deploy", manifest)).code).toBe(0);
    await full.ok("audit", "verify");
  } finally {
    await full?.destroy();
    await run("umount", [mount]);
    await rm(mount, { recursive: true, force: true });
  }
}, 180_000);

async function spaceOf(path: string): Promise<{ free: number; blockSize: number }> {
  const [free = 0, blockSize = 4096] = (await run("stat", ["-f", "-c", "%a %S", path])).trim().split(" ").map(Number);
  return { free, blockSize };
}
