import { sql } from "kysely";
import {
  type AuditEvent,
  type ChainEntry,
  type ChainReport,
  type Head,
  linkEntry,
  newEvent,
  type Signer,
  verifyChain,
} from "../audit/index.ts";
import type { Event } from "../api/resources.ts";
import { ForgeError } from "../base/errors.ts";
import type { Control } from "./context.ts";
import { type Database, databaseError, query, transact, type Trx } from "./db/database.ts";

/**
 * The region's log: one hash chain, in the database, so that an intent and its event commit together. Appending takes
 * the head's row lock, which orders all writers; it comes last in a transaction, so the lock is held only to commit.
 */

/** A fact as its author states it; identifier and time are added here. */
export type Fact = Omit<AuditEvent, "id" | "time">;

/** Appends within the caller's transaction. Nothing is changed when this fails: AUDIT_UNAVAILABLE. */
export async function appendEvents(trx: Trx, signer: Signer, facts: readonly Fact[]): Promise<void> {
  try {
    const head = await trx
      .selectFrom("log_head")
      .select(["sequence", "hash", "time"])
      .where("id", "=", 1)
      .forUpdate()
      .executeTakeFirstOrThrow();
    const time = new Date(Math.max(Date.now(), head.time.getTime())); // time never runs backwards within the log
    const entries: ChainEntry[] = [];
    const events = facts.map((fact) => newEvent(fact, time));
    for (const event of events) entries.push(linkEntry(entries.at(-1) ?? head, event, signer));
    await insertEntries(trx, entries, events, time);
  } catch (error) {
    throw auditError(error);
  }
}

/** A denial in a transaction of its own: what was refused has no other change to commit with. */
export async function appendDenial(control: Pick<Control, "db" | "signer">, fact: Omit<Fact, "outcome">): Promise<void> {
  await transact(control.db, (trx) => appendEvents(trx, control.signer, [{ ...fact, outcome: "denied" }]));
}

export interface EventQuery {
  /** Null: the platform's own events. */
  readonly tenantId: string | null;
  readonly after: number;
  readonly limit: number;
  /** Begin with the last `limit` instead of the first after `after`. */
  readonly newest: boolean;
  readonly follow: boolean;
  readonly service: string | undefined;
}

/** Events in order; with `follow`, the first `limit` and then every later one until the signal aborts. */
export async function* readEvents(control: Pick<Control, "db" | "wakes">, wanted: EventQuery, signal: AbortSignal): AsyncGenerator<Event> {
  const changes = control.wakes.subscribe("log");
  try {
    const first = await query(selectEvents(control.db, wanted));
    yield* first;
    let after = first.at(-1)?.sequence ?? wanted.after;
    while (wanted.follow && !signal.aborted) {
      const next = await query(selectEvents(control.db, { ...wanted, after, limit: 500, newest: false }));
      yield* next;
      after = next.at(-1)?.sequence ?? after;
      if (next.length === 0) await changes.wait(60_000, signal);
    }
  } finally {
    changes.close();
  }
}

/** Checks the whole chain up to the head as it is now, page by page. */
export async function verifyLog(db: Database, publicKeyPem: string): Promise<ChainReport> {
  const head = await query(db.selectFrom("log_head").select(["sequence", "hash"]).where("id", "=", 1).executeTakeFirstOrThrow());
  return verifyChain(readChain(db, head), publicKeyPem, head);
}

async function* readChain(db: Database, head: Head): AsyncGenerator<ChainEntry> {
  for (let after = 0; ;) {
    const page = await query(
      db
        .selectFrom("log_entries")
        .select(["sequence", "previous", "event", "hash", "signature"])
        .where("sequence", ">", after)
        .where("sequence", "<=", head.sequence)
        .orderBy("sequence")
        .limit(1000)
        .execute(),
    );
    yield* page;
    const last = page.at(-1);
    if (last === undefined) return;
    after = last.sequence;
  }
}

async function selectEvents(db: Database, wanted: EventQuery): Promise<Event[]> {
  let select = db.selectFrom("log_entries").select(["sequence", "event", "hash"]).where("sequence", ">", wanted.after);
  select = wanted.tenantId === null ? select.where("tenant_id", "is", null) : select.where("tenant_id", "=", wanted.tenantId);
  if (wanted.service !== undefined) select = select.where("service", "=", wanted.service);
  const rows = await select
    .orderBy("sequence", wanted.newest ? "desc" : "asc")
    .limit(wanted.limit)
    .execute();
  return (wanted.newest ? rows.toReversed() : rows).map(({ sequence, event, hash }) => {
    const { id: _, ...fact } = JSON.parse(event) as AuditEvent;
    return { sequence, ...fact, hash };
  });
}

/** Entries, head and wake in one round trip. */
async function insertEntries(trx: Trx, entries: readonly ChainEntry[], events: readonly AuditEvent[], time: Date): Promise<void> {
  const last = entries.at(-1);
  if (last === undefined) return;
  const rows = entries.map((entry, index) => ({ ...entry, tenant_id: events[index]?.tenant ?? null, service: serviceOf(events[index]) }));
  await sql`
    with entry as (
      insert into log_entries (sequence, previous, event, hash, signature, tenant_id, service)
      select sequence, previous, event, hash, signature, tenant_id, service
      from jsonb_to_recordset(${JSON.stringify(rows)}::jsonb)
        as row (sequence bigint, previous text, event text, hash text, signature text, tenant_id text, service text)
    ), head as (
      update log_head set sequence = ${last.sequence}, hash = ${last.hash}, time = ${time} where id = 1
    )
    select pg_notify('forge', 'log')`.execute(trx);
}

function serviceOf(event: AuditEvent | undefined): string | null {
  if (event === undefined) return null;
  if (event.subject.startsWith("service/")) return event.subject.slice("service/".length);
  const service = event.details["service"];
  return typeof service === "string" ? service : null;
}

function auditError(thrown: unknown): ForgeError {
  const error = databaseError(thrown);
  if (error.code === "DATABASE_UNAVAILABLE" || error.code === "DISK_FULL") return error;
  return new ForgeError("AUDIT_UNAVAILABLE", `the audit log did not accept the event: ${error.message}`, { cause: thrown });
}
