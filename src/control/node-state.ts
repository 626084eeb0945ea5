import { type Selectable, sql } from "kysely";
import { z } from "zod";
import {
  type CellAssignment,
  type CellReport,
  cellReportSchema,
  type DesiredState,
  type NodeFacts,
  type spoolEntrySchema,
} from "../api/node.ts";
import type { ServiceSpec } from "../api/manifest.ts";
import { auditEventSchema, type ChainEntry, verifyChain } from "../audit/index.ts";
import { ForgeError } from "../base/errors.ts";
import { appendEvents, type Fact } from "./audit-log.ts";
import type { Control } from "./context.ts";
import { query, transact, type Trx } from "./db/database.ts";
import type { NodeTable } from "./db/schema.ts";
import { cellFact } from "./deploy.ts";

/** What a node is told and what it tells, apart from how it travels. */

export type NodeRow = Selectable<NodeTable>;

/** A waiting node proves that it is alive this often. */
const heartbeatMs = 20_000;

/** The desired state once it is newer than `after`, or as it is when `waitMs` are over. */
export async function awaitDesired(
  control: Control,
  node: NodeRow,
  after: number,
  waitMs: number,
  signal: AbortSignal,
): Promise<DesiredState> {
  const changes = control.wakes.subscribe(`node:${node.id}`);
  try {
    const endMs = control.clock.monotonicMs() + waitMs;
    for (let row: NodeRow = node; ; row = await findNode(control, node.id)) {
      await touchNode(control, row);
      const leftMs = endMs - control.clock.monotonicMs();
      if (row.generation > after || leftMs <= 0 || signal.aborted) return await readDesired(control, row);
      await changes.wait(Math.min(leftMs, heartbeatMs), signal);
    }
  } finally {
    changes.close();
  }
}

/** Everything the node must run, whole. The generation was read before the rows, so nothing newer is ever missed. */
async function readDesired(control: Control, node: NodeRow): Promise<DesiredState> {
  const rows = await query(
    control.db
      .selectFrom("cells as cell")
      .innerJoin("revisions as revision", (on) =>
        on.onRef("revision.service_id", "=", "cell.service_id").onRef("revision.revision", "=", "cell.revision"),
      )
      .innerJoin("images as image", (on) =>
        on.onRef("image.tenant_id", "=", "cell.tenant_id").onRef("image.digest", "=", "cell.image_digest"),
      )
      .select(["cell.id", "cell.tenant_id", "cell.service_name", "cell.revision", "cell.desired", "cell.address", "cell.image_digest"])
      .select(["revision.spec", "revision.image_reference", "image.signatures"])
      .select(sql<string[]>`array(select public_key_pem from trusted_keys k where k.tenant_id = cell.tenant_id order by k.name)`.as("keys"))
      .where("cell.node_id", "=", node.id)
      .where("cell.desired", "in", ["running", "stopped"])
      .orderBy("cell.id")
      .execute(),
  );
  const cells = rows.map((row): CellAssignment => ({
    id: row.id,
    tenantId: row.tenant_id,
    service: row.service_name,
    revision: row.revision,
    desired: row.desired === "running" ? "running" : "stopped",
    image: { digest: row.image_digest, reference: row.image_reference, signatures: row.signatures, trustedKeysPem: row.keys },
    spec: row.spec as ServiceSpec,
    address: row.address ?? "",
  }));
  return { generation: node.generation, cells, sessions: control.sessions.requestsFor(node.id) };
}

/**
 * Takes over what the node says of its cells: `whole` means it has no others. Wakes the jobs that wait for it. What it
 * says of one cell and cannot be read leaves that cell as it was, and the others their reports.
 */
export async function takeReport(control: Control, node: NodeRow, said: readonly unknown[], whole: boolean): Promise<void> {
  const { reports, unread } = readReports(said);
  if (unread.length > 0) control.log.warn({ node: node.name, cells: unread.slice(0, 10) }, "a node's report of a cell cannot be read");
  await transact(control.db, async (trx) => {
    const changed = await writeReports(trx, node, reports);
    const ended = await endLeaving(trx, node, reports, whole ? unread : undefined);
    const freed = ended.length > 0 || changed.some((cell) => !cell.holds_room);
    const settled = changed.filter((cell) => ["running", "stopped", "failed"].includes(cell.state));
    await wakeJobs(
      trx,
      settled.map((cell) => cell.id),
      freed,
    );
    if (ended.length > 0)
      await appendEvents(
        trx,
        control.signer,
        ended.map((cell) => cellFact(cell, "cell.removed", {})),
      );
  });
  await touchNode(control, node);
}

/** The reports that have the shape of one, and the cells of those that have not. */
function readReports(said: readonly unknown[]): { reports: CellReport[]; unread: string[] } {
  const results = said.map((one) => ({ one, result: storableReportSchema.safeParse(one) }));
  return {
    reports: results.flatMap(({ result }) => (result.success ? [result.data] : [])),
    unread: results.flatMap(({ one, result }) =>
      result.success ? [] : [z.object({ id: storableText(64) }).safeParse(one).data?.id ?? "?"],
    ),
  };
}

/** Text that PostgreSQL holds and a terminal may print: no NUL, no other control character, no half of a surrogate pair. */
function storableText(maxLength: number): z.ZodType<string> {
  return z.string().transform((text) =>
    text
      .slice(0, maxLength)
      .replaceAll(/\p{Cc}+/gu, " ")
      .toWellFormed(),
  );
}

/** A report as the table can hold it. Only what merely informs is mended; a wrong identifier or state is not. */
const storableReportSchema = cellReportSchema.extend({
  id: storableText(64),
  reason: storableText(4000).nullable(),
  vmm: storableText(64).nullable(),
  restarts: z
    .int()
    .min(0)
    .max(2 ** 31 - 1)
    .catch(0),
  exitStatus: z.int().min(0).max(255).nullable().catch(null),
  startedAt: z.iso
    .datetime()
    .refine((time) => new Date(time).getUTCFullYear() >= 1970)
    .nullable()
    .catch(null),
  published: z.array(cellReportSchema.shape.published.element.extend({ address: storableText(64) })).max(256),
});

/**
 * One statement for all of them. A cell the flow gave up keeps its reason. A cell that ended gives its room back; one
 * that runs again, as after a node's stop and start, holds it again: memory and ports are taken whatever is desired.
 */
async function writeReports(
  trx: Trx,
  node: NodeRow,
  reports: readonly CellReport[],
): Promise<{ id: string; state: string; holds_room: boolean }[]> {
  const { rows } = await sql<{ id: string; state: string; holds_room: boolean }>`
    update cells set
      state = case when cells.state = 'failed' and cells.desired <> 'running' then 'failed' when cells.desired = 'running' or r.state in ('stopped', 'failed') then r.state else 'stopping' end,
      reason = case when cells.state = 'failed' and cells.desired <> 'running' then cells.reason else r.reason end,
      holds_room = r.state not in ('stopped', 'failed'),
      measurement = r.measurement, vmm = r.vmm, emulated = r.emulated, restarts = r.restarts, exit_status = r."exitStatus",
      started_at = r."startedAt", phases = r.phases, published = r.published
    from jsonb_to_recordset(${JSON.stringify(reports)}::jsonb) as r (
      id text, state text, reason text, measurement text, vmm text, emulated boolean, restarts int, "exitStatus" int,
      "startedAt" timestamptz, phases jsonb, published jsonb)
    where cells.id = r.id and cells.node_id = ${node.id} and cells.desired <> 'pending'
    returning cells.id, cells.state, cells.holds_room`.execute(trx);
  return rows;
}

/** Forgets removed cells of which nothing is left: those that ended, and, of a whole report, those it does not name. */
async function endLeaving(
  trx: Trx,
  node: NodeRow,
  reports: readonly CellReport[],
  unreadOfWhole: readonly string[] | undefined,
): Promise<{ id: string; tenant_id: string; service_name: string }[]> {
  const ended = reports.filter((report) => report.state === "stopped" || report.state === "failed").map((report) => report.id);
  const named = [...reports.map((report) => report.id), ...(unreadOfWhole ?? [])];
  const { rows } = await sql<{ id: string; tenant_id: string; service_name: string }>`
    delete from cells where node_id = ${node.id} and desired = 'removed'
      and (id = any(${ended}) or (${unreadOfWhole !== undefined} and not id = any(${named})))
    returning id, tenant_id, service_name`.execute(trx);
  return rows;
}

/** Jobs of these cells look again; where room was given back, so do those that wait for a place. */
async function wakeJobs(trx: Trx, cellIds: readonly string[], roomFreed: boolean): Promise<void> {
  await sql`
    with woken as (
      update jobs set run_at = now() where run_at > now() and (cell_id = any(${cellIds}) or (${roomFreed} and step is null)) returning 1
    )
    select pg_notify('forge', 'jobs') where exists (select from woken)`.execute(trx);
}

/** Appends the node's spool entries to the region's log, each exactly once; returns the last sequence the log holds. */
export async function takeEvents(control: Control, nodeId: string, entries: readonly z.infer<typeof spoolEntrySchema>[]): Promise<number> {
  return transact(control.db, async (trx) => {
    const node = await trx.selectFrom("nodes").selectAll().where("id", "=", nodeId).forUpdate().executeTakeFirstOrThrow();
    const fresh = entries.filter((entry) => entry.sequence > node.spool_sequence);
    const last = fresh.at(-1);
    if (last === undefined) return node.spool_sequence;
    const report = await verifyChain(fresh, node.spool_public_key_pem, undefined, { sequence: node.spool_sequence, hash: node.spool_hash });
    if (report.firstBad !== null) {
      throw new ForgeError(
        "AUDIT_BROKEN",
        `the spool of ${node.name} is not sound at entry ${report.firstBad.sequence}: ${report.firstBad.problem}`,
      );
    }
    const tenants = await trx.selectFrom("node_tenants").select("tenant_id").where("node_id", "=", nodeId).execute();
    const known = new Set(tenants.map((tenant) => tenant.tenant_id));
    await appendEvents(
      trx,
      control.signer,
      fresh.map((entry) => nodeFact(node, entry, known)),
    );
    await trx.updateTable("nodes").set({ spool_sequence: last.sequence, spool_hash: last.hash }).where("id", "=", nodeId).execute();
    return last.sequence;
  });
}

/**
 * The region's event for a node's entry. It says what the node said, under the node's name whatever actor it claims,
 * and names the entry it came from. A tenant that never had a cell there is not the node's to speak of.
 */
function nodeFact(node: NodeRow, entry: ChainEntry, knownTenants: ReadonlySet<string>): Fact {
  const parsed = auditEventSchema.safeParse(JSON.parse(entry.event));
  if (!parsed.success) throw new ForgeError("INVALID_INPUT", `entry ${entry.sequence} of the spool of ${node.name} is not an audit event`);
  const { id, time, ...said } = parsed.data;
  const mayName = said.tenant === null || knownTenants.has(said.tenant);
  const origin = {
    node: node.name,
    event: id,
    time,
    sequence: entry.sequence,
    hash: entry.hash,
    ...(mayName ? {} : { claimedTenant: said.tenant }),
  };
  return { ...said, actor: `node/${node.name}`, tenant: mayName ? said.tenant : null, details: { ...said.details, origin } };
}

/** The facts of a node may change at its start: more memory, another VMM. */
export async function updateFacts(control: Control, node: NodeRow, facts: NodeFacts): Promise<void> {
  if (facts.name !== node.name || facts.jurisdiction !== node.jurisdiction) {
    throw new ForgeError("CONFLICT", `this node joined as ${node.name} in ${node.jurisdiction}; a node that moves joins anew`);
  }
  const { site, rack, vmm, emulated, profile, vcpus, memoryMib } = facts;
  const change = { site, rack, vmm, emulated, profile, vcpus, memory_mib: memoryMib, last_seen_at: new Date() };
  await query(control.db.updateTable("nodes").set(change).where("id", "=", node.id).execute());
}

export async function findNode(control: Control, id: string): Promise<NodeRow> {
  const row = await query(control.db.selectFrom("nodes").selectAll().where("id", "=", id).executeTakeFirst());
  if (row === undefined) throw new ForgeError("UNAUTHENTICATED", "this node is not part of the region any more");
  return row;
}

/** Notes that the node lives, at most every five seconds, without waiting for the disk. */
async function touchNode(control: Control, node: NodeRow): Promise<void> {
  if (Date.now() - node.last_seen_at.getTime() < 5000) return;
  await query(
    sql`update nodes set last_seen_at = now() from set_config('synchronous_commit', 'off', true)
        where id = ${node.id} and last_seen_at < now() - interval '5 seconds'`.execute(control.db),
  );
}
