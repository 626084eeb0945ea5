import { mkdir, rm } from "node:fs/promises";
import { connect } from "node:net";
import { join } from "node:path";
import { text } from "node:stream/consumers";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { run } from "../../src/base/exec.ts";
import { eventually, Runtime } from "../support/runtime.ts";
import { freePorts } from "../../tools/free-ports.ts";

/**
 * Images nobody here wrote: Debian's nginx, PostgreSQL and redis, made into OCI images by mmdebstrap and umoci. They
 * are deployed unchanged; what differs from a container is only the command, where the package expects an init.
 */

let runtime: Runtime;
let ports: number[] = [];

beforeAll(async () => {
  runtime = await Runtime.start();
  ports = await freePorts(3);
}, 120_000);
afterAll(() => runtime?.destroy(), 120_000);

/** A root file system from packages, packed by umoci with the given config. */
async function makeImage(name: string, packages: string, config: readonly string[]): Promise<void> {
  const layout = join(runtime.folder, name);
  const bundle = join(runtime.folder, `${name}-bundle`);
  await mkdir(bundle);
  await run("umoci", ["init", "--layout", layout]);
  await run("umoci", ["new", "--image", `${layout}:latest`]);
  await run("umoci", ["unpack", "--image", `${layout}:latest`, bundle]);
  const options = [
    "--quiet",
    "--variant=minbase",
    `--include=${packages}`,
    "--dpkgopt=path-exclude=/usr/share/doc/*",
    "--dpkgopt=path-exclude=/usr/share/man/*",
  ];
  await run("mmdebstrap", [...options, "bookworm", join(bundle, "root.tar")], { timeoutMs: 300_000 });
  await run(
    "tar",
    ["--extract", "--file", join(bundle, "root.tar"), "--directory", join(bundle, "rootfs"), "--xattrs", "--exclude=./dev/*"],
    { timeoutMs: 120_000 },
  );
  await run("umoci", ["repack", "--image", `${layout}:latest`, bundle], { timeoutMs: 300_000 });
  await run("umoci", ["config", "--image", `${layout}:latest`, ...config]);
  await rm(bundle, { recursive: true, force: true });
  await runtime.ok("image", "sign", `oci:${layout}:latest`);
}

async function deploy(name: string, service: Record<string, unknown>): Promise<void> {
  await runtime.ok(
    "deploy",
    "--timeout",
    "170s",
    await runtime.manifest({ [name]: { image: `oci:./${name}:latest`, memory: "512MiB", ...service } }, `${name}.yaml`),
  );
}

const published = (index: number, port: number) => ({
  ports: [{ name: "main", port, publish: ports[index] }],
  health: { port, grace: "120s" },
});

describe("Debian's own packages", () => {
  test("nginx serves its page", async () => {
    await makeImage("nginx", "nginx-light", ["--config.cmd=nginx", "--config.cmd=-g", "--config.cmd=daemon off;"]);
    await deploy("nginx", published(0, 80));
    const page = await (await fetch(`http://127.0.0.1:${ports[0]}/`)).text();
    expect(page).toContain("Welcome to nginx");
  }, 420_000);

  test("redis keeps a value", async () => {
    await makeImage("redis", "redis-server", [
      "--config.user=redis",
      "--config.cmd=redis-server",
      "--config.cmd=--bind",
      "--config.cmd=*",
      "--config.cmd=-::*",
      "--config.cmd=--protected-mode",
      "--config.cmd=no",
    ]);
    await deploy("redis", published(1, 6379));
    expect(await talk(ports[1] ?? 0, "SET patient 7\r\nGET patient\r\nQUIT\r\n")).toContain("+OK\r\n$1\r\n7\r\n");
  }, 420_000);

  test("PostgreSQL answers psql", async () => {
    const server = "/usr/lib/postgresql/15/bin/postgres";
    const flags = [
      "-D",
      "/var/lib/postgresql/15/main",
      "-c",
      "config_file=/etc/postgresql/15/main/postgresql.conf",
      "-c",
      "listen_addresses=*",
      "-c",
      "hba_file=/tmp/hba",
      "-c",
      "unix_socket_directories=/tmp",
    ];
    const start = `echo 'host all all all trust' > /tmp/hba; exec ${server} ${flags.map((flag) => `'${flag}'`).join(" ")}`;
    await makeImage("postgres", "postgresql-15", ["--config.user=postgres", "--config.cmd=sh", "--config.cmd=-c", `--config.cmd=${start}`]);
    await deploy("postgres", published(2, 5432));
    const ask = (sql: string): Promise<string> =>
      run("psql", ["-At", "-h", "127.0.0.1", "-p", String(ports[2]), "-U", "postgres", "-c", sql], { timeoutMs: 30_000 });
    await eventually("it takes connections", 60_000, () => ask("select 1"));
    await ask("create table images(id int primary key, note text)");
    await ask("insert into images select n, 'slice ' || n from generate_series(1, 1000) n");
    expect((await ask("select count(*), max(note) from images")).trim()).toBe("1000|slice 999");
  }, 420_000);
});

/** Says something and listens until the other side has nothing more to say. */
async function talk(port: number, words: string): Promise<string> {
  const socket = connect({ port, host: "127.0.0.1", timeout: 10_000 });
  socket.write(words);
  return text(socket);
}
