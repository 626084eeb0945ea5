import { Kysely, PostgresDialect, type Transaction } from "kysely";
import pg from "pg";
import { errnoOf, ForgeError, toForgeError } from "../../base/errors.ts";
import type { Schema } from "./schema.ts";

export type Database = Kysely<Schema>;
export type Trx = Transaction<Schema>;

/** Where the database is: a URL, or the folder of a unix socket. */
export type DatabaseAddress =
  | { readonly url: string }
  | { readonly socketDirectory: string; readonly database: string; readonly user: string };

/** A pool of connections; nothing is dialled yet. */
export function openDatabase(address: DatabaseAddress): Database {
  const pool = new pg.Pool({
    ...connectionOptions(address),
    max: 16,
    min: 2,
    connectionTimeoutMillis: 5000,
    idleTimeoutMillis: 60_000,
    statement_timeout: 30_000,
    idle_in_transaction_session_timeout: 30_000,
  });
  // A connection that breaks, idle or not, says so by an event as well: the query it fails, or the next one, reports it.
  pool.on("error", () => undefined);
  pool.on("connect", (client) => client.on("error", () => undefined));
  return new Kysely<Schema>({ dialect: new PostgresDialect({ pool }) });
}

/** What both the pool and the listening connection dial. */
export function connectionOptions(address: DatabaseAddress): pg.ClientConfig {
  const target =
    "url" in address
      ? { connectionString: address.url }
      : { host: address.socketDirectory, database: address.database, user: address.user };
  return { ...target, application_name: "forge-control", keepAlive: true, types: { getTypeParser } };
}

/**
 * Runs `work` in one transaction: all of it or nothing. Runs again, up to three times, when PostgreSQL chose this
 * transaction to break a deadlock; so `work` touches nothing but the transaction.
 */
export async function transact<T>(db: Database, work: (trx: Trx) => Promise<T>): Promise<T> {
  for (let attempt = 1; ; attempt++) {
    try {
      return await db.transaction().execute(work);
    } catch (error) {
      if (attempt < 3 && isRetryable(error)) continue;
      throw databaseError(error);
    }
  }
}

/** A read outside any transaction, with its failures named. */
export async function query<T>(work: Promise<T>): Promise<T> {
  try {
    return await work;
  } catch (error) {
    throw databaseError(error);
  }
}

/** The error a person should see; what is not the database's stays as it is. */
export function databaseError(thrown: unknown): ForgeError {
  if (thrown instanceof ForgeError) return thrown;
  const code = errnoOf(thrown) ?? "";
  const message = thrown instanceof Error ? thrown.message : String(thrown);
  if (code === "53100") return new ForgeError("DISK_FULL", "the database has no space left on its disk", { cause: thrown });
  if (code === "23505") return new ForgeError("CONFLICT", "something with this name exists already", { cause: thrown });
  if (/^22[0-9A-Z]{3}$/.test(code))
    return new ForgeError("INVALID_INPUT", `the database cannot hold a value of the request: ${message}`, { cause: thrown });
  if (isUnreachable(code, message))
    return new ForgeError("DATABASE_UNAVAILABLE", `the database does not answer: ${message}`, { cause: thrown });
  return toForgeError(thrown);
}

/** SQLSTATE classes 08 (connection), 53 (resources), 57 (operator intervention), 58 (system), and socket errors. */
function isUnreachable(code: string, message: string): boolean {
  if (/^(08|53|57|58)[0-9A-Z]{3}$/.test(code)) return true;
  if (["ECONNREFUSED", "ECONNRESET", "ENOENT", "EPIPE", "ETIMEDOUT", "EHOSTUNREACH", "ENOTFOUND", "EAI_AGAIN"].includes(code)) return true;
  return (
    /^(Connection terminated|Client has encountered a connection error|timeout exceeded when trying to connect|Query read timeout|Cannot use a pool after)/i.test(
      message,
    ) || message.startsWith("Client was closed")
  );
}

function isRetryable(thrown: unknown): boolean {
  return ["40001", "40P01"].includes(errnoOf(thrown) ?? "");
}

/** Sequences and sizes stay below 2^53: a bigint is a number here. */
function getTypeParser(oid: number, format?: "text" | "binary"): (text: string) => unknown {
  if (oid === pg.types.builtins.INT8 && format !== "binary") return Number;
  return pg.types.getTypeParser(oid, "text") as (text: string) => unknown;
}
