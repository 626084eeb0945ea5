import { chown, mkdtemp, readdir, rm } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { run } from "../../src/base/exec.ts";

/**
 * A real PostgreSQL for one test file. Unless asked, it does not sync to disk: tests of durability use the product's own
 * cluster.
 */
export interface TestPostgres {
  /** A fresh, empty database. */
  createDatabase(): Promise<string>;
  /** Kills the server as a power cut would. */
  crash(): Promise<void>;
  start(): Promise<void>;
  stop(): Promise<void>;
}

export async function startPostgres({ fsync = false }: { fsync?: boolean } = {}): Promise<TestPostgres> {
  const folder = await mkdtemp(join(tmpdir(), "forge-pg-"));
  const user = await unprivilegedUser();
  if (user !== undefined) await chown(folder, user.uid, user.gid);
  const binaries = join("/usr/lib/postgresql", (await readdir("/usr/lib/postgresql")).toSorted().at(-1) ?? "", "bin");
  const asUser = (program: string, ...args: string[]): Promise<string> => {
    const command = [join(binaries, program), ...args];
    const [first = "", ...rest] =
      user === undefined ? command : ["setpriv", `--reuid=${user.uid}`, `--regid=${user.gid}`, "--clear-groups", ...command];
    return run(first, rest, { cwd: folder });
  };
  const data = join(folder, "pg");
  await asUser(
    "initdb",
    "--pgdata",
    data,
    "--auth=trust",
    "--username=postgres",
    "--no-sync",
    "--encoding=UTF8",
    "--locale=C.UTF-8",
    "--no-instructions",
  );
  const bounds = `-c fsync=${fsync ? "on" : "off"} -c max_connections=100 -c shared_buffers=32MB`;
  const options = `-c listen_addresses='' -c unix_socket_directories='${folder}' ${bounds}`;
  const start = async (): Promise<void> =>
    void (await asUser("pg_ctl", "--pgdata", data, "--wait", "--log", join(folder, "log"), "--options", options, "start"));
  await start();
  let databases = 0;
  return {
    createDatabase: async () => {
      const name = `test${++databases}`;
      await asUser("createdb", "--host", folder, "--username=postgres", name);
      return `postgresql://postgres@${encodeURIComponent(folder)}/${name}`;
    },
    crash: async () => void (await asUser("pg_ctl", "--pgdata", data, "--mode=immediate", "--wait", "stop")),
    start,
    stop: async () => {
      await asUser("pg_ctl", "--pgdata", data, "--mode=immediate", "--wait", "stop").catch(() => undefined); // it may be down already
      await rm(folder, { recursive: true, force: true });
    },
  };
}

/** PostgreSQL refuses root; as anybody else we stay who we are. */
async function unprivilegedUser(): Promise<{ uid: number; gid: number } | undefined> {
  if (process.getuid?.() !== 0) return undefined;
  const [, , uid = 0, gid = 0] = (await run("getent", ["passwd", "postgres"])).trim().split(":").map(Number);
  return { uid, gid };
}
