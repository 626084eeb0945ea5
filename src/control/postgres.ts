import { readdir } from "node:fs/promises";
import { userInfo } from "node:os";
import { join } from "node:path";
import { makeDirectory, readIfExists, writeDurable } from "../base/durable.ts";
import { ForgeError } from "../base/errors.ts";
import { run } from "../base/exec.ts";
import type { DatabaseAddress } from "./db/database.ts";

/**
 * A PostgreSQL cluster of our own, made of the distribution's binaries: no network, one unix socket in a private
 * folder, peer authentication. pg_ctl starts it in a session of its own, so it outlives a control plane that is killed,
 * and the next one finds it again.
 */
export interface Cluster {
  readonly address: DatabaseAddress;
  /** Starts it where it does not run; also after it died. */
  ensureRunning(): Promise<void>;
  /** Disconnects everyone and shuts down cleanly. */
  stop(): Promise<void>;
}

export interface ClusterOptions {
  /** Holds pg/, run/ and pglog/; belongs to the user we run as. */
  readonly folder: string;
  /** Only for tests that do not test durability. */
  readonly fsync?: boolean;
}

const databaseName = "forge";
/** sun_path of sockaddr_un, less the final NUL (unix(7)). */
const socketPathMax = 107;

export async function openCluster({ folder, fsync = true }: ClusterOptions): Promise<Cluster> {
  const binaries = await findBinaries();
  const data = join(folder, "pg");
  const socketDirectory = join(folder, "run");
  const socket = join(socketDirectory, ".s.PGSQL.5432");
  if (Buffer.byteLength(socket) > socketPathMax) {
    throw new ForgeError(
      "UNSUPPORTED",
      `the path of the database's socket is longer than ${socketPathMax} bytes, choose a shorter data folder: ${socket}`,
    );
  }
  await makeDirectory(socketDirectory);
  await makeDirectory(join(folder, "pglog"));
  const isNew = (await readIfExists(join(data, "PG_VERSION"))) === undefined;
  if (isNew) await initialise(binaries, data, fsync);
  await writeDurable(join(data, "postgresql.conf"), settings(folder, fsync));
  const pgCtl = (...args: string[]): Promise<string> =>
    run(join(binaries, "pg_ctl"), ["--pgdata", data, ...args], { cwd: folder, timeoutMs: 120_000 });
  const cluster: Cluster = {
    address: { socketDirectory, database: databaseName, user: userInfo().username }, // peer authentication: who we are now
    ensureRunning: async () => {
      if (await isRunning(pgCtl)) return;
      await pgCtl("--wait", "--timeout=60", "--log", join(folder, "pglog", "start.log"), "start").catch(async (error: unknown) => {
        const log = (await readIfExists(join(folder, "pglog", "start.log")))?.toString().trim().split("\n").slice(-3).join(" / ") ?? "";
        throw new ForgeError("DATABASE_UNAVAILABLE", `PostgreSQL did not start: ${log}`, { cause: error });
      });
    },
    stop: async () => {
      if (await isRunning(pgCtl)) await pgCtl("--wait", "--timeout=60", "--mode=fast", "stop");
    },
  };
  await cluster.ensureRunning();
  await createDatabase(binaries, socketDirectory, folder);
  return cluster;
}

/** Newest first of /usr/lib/postgresql/VERSION/bin, as Debian lays them out. */
async function findBinaries(): Promise<string> {
  const root = "/usr/lib/postgresql";
  const versions = (await readdir(root).catch(() => []))
    .filter((name) => /^[0-9]+$/.test(name))
    .toSorted((left, right) => Number(right) - Number(left));
  const newest = versions[0];
  if (newest === undefined) throw new ForgeError("UNSUPPORTED", `PostgreSQL is not installed: nothing in ${root}`);
  return join(root, newest, "bin");
}

/** initdb into a folder without PG_VERSION; what an interrupted one left there, initdb itself refuses, so it is told to clean up. */
async function initialise(binaries: string, data: string, fsync: boolean): Promise<void> {
  const options = [
    "--auth=peer",
    "--data-checksums",
    "--encoding=UTF8",
    "--locale=C.UTF-8",
    "--no-instructions",
    ...(fsync ? [] : ["--no-sync"]),
  ];
  await run("/bin/rm", ["-rf", "--one-file-system", data]); // no PG_VERSION: nothing in it was ever a database
  await run(join(binaries, "initdb"), ["--pgdata", data, ...options], { timeoutMs: 120_000, cwd: "/" });
}

/** Small, for one machine: the control plane's data is megabytes. */
function settings(folder: string, fsync: boolean): string {
  return [
    "listen_addresses = ''",
    `unix_socket_directories = '${join(folder, "run").replaceAll("'", "''")}'`,
    "unix_socket_permissions = 0700",
    "port = 5432",
    "max_connections = 60",
    "shared_buffers = 64MB",
    `fsync = ${fsync ? "on" : "off"}`,
    "full_page_writes = on",
    "synchronous_commit = on",
    "timezone = 'UTC'",
    "log_timezone = 'UTC'",
    "logging_collector = on",
    `log_directory = '${join(folder, "pglog").replaceAll("'", "''")}'`,
    "log_filename = 'postgresql-%a.log'", // seven files, each begun anew after a week
    "log_truncate_on_rotation = on",
    "log_rotation_age = 1d",
    "log_rotation_size = 0",
    "log_parameter_max_length = 0", // no values in the log: a tenant's variables are among them
    "log_parameter_max_length_on_error = 0",
    "",
  ].join("\n");
}

async function isRunning(pgCtl: (...args: string[]) => Promise<string>): Promise<boolean> {
  return pgCtl("status").then(
    () => true,
    (error: unknown) => {
      if (error instanceof ForgeError && error.details?.["exitCode"] === 3) return false; // pg_ctl(1): 3 is "not running"
      throw error;
    },
  );
}

async function createDatabase(binaries: string, socketDirectory: string, cwd: string): Promise<void> {
  const exists = await run(
    join(binaries, "psql"),
    [...psqlTo(socketDirectory), "--command", `select 1 from pg_database where datname = '${databaseName}'`],
    { cwd },
  );
  if (exists.trim() !== "1") await run(join(binaries, "createdb"), ["--host", socketDirectory, databaseName], { cwd });
}

function psqlTo(socketDirectory: string): string[] {
  return ["--host", socketDirectory, "--dbname", "postgres", "--no-psqlrc", "--tuples-only", "--no-align"];
}
