import { sql } from "kysely";
import type { Selectable } from "kysely";
import { durationMs, type ServiceSpec } from "../api/manifest.ts";
import { ForgeError } from "../base/errors.ts";
import { cellAddress, newCellIdentifier } from "../mesh/index.ts";
import { appendEvents, type Fact } from "./audit-log.ts";
import type { Control } from "./context.ts";
import type { Trx } from "./db/database.ts";
import type { CellTable } from "./db/schema.ts";
import { pickRoom, readRooms } from "./placement.ts";

/** One step of the flow. It runs in one transaction with the record that it is done, so it happens once or not at all. */
export interface Step {
  readonly name: string;
  /** `wait`: not yet; the job sleeps until a report wakes it, at most for `patienceMs`, then the step fails. */
  readonly do: (context: StepContext) => Promise<"done" | "wait">;
  readonly undo?: (context: StepContext) => Promise<void>;
  readonly patienceMs?: (context: StepContext) => Promise<number>;
  /** What a waiting step says when its patience ends. */
  readonly tooLate?: (context: StepContext) => ForgeError;
  /** Nobody outside the database learns of it: it shares the transaction, and the wait for the disk, of the step after it. */
  readonly internal?: boolean;
}

export interface StepContext {
  readonly trx: Trx;
  readonly control: Control;
  /** Its row is locked. */
  readonly cell: Selectable<CellTable>;
  /** What the step did, for the log: appended once, at the end of the transaction. */
  readonly facts: Fact[];
}

/** The life of a deploy, once per cell. On failure the steps that were done are undone, last first. */
export const deploySteps: readonly Step[] = [
  { name: "place", do: place, undo: giveBackRoom, internal: true, patienceMs: async () => 60_000, tooLate: leavingTooSlow },
  { name: "address", do: giveAddress, internal: true },
  { name: "assign", do: assign, undo: stopOnNode },
  { name: "ready", do: awaitReady, patienceMs: readyPatienceMs, tooLate: notReady },
  { name: "retire", do: retireOlderRevisions },
];

/** Reserves room on a node. Where cells that are stopping will make the room, it waits for them. */
async function place({ trx, cell, facts }: StepContext): Promise<"done" | "wait"> {
  const need = {
    jurisdiction: cell.jurisdiction,
    memoryMib: cell.memory_mib,
    vcpus: cell.vcpus,
    publish: cell.publish,
    serviceId: cell.service_id ?? cell.id,
  };
  let room;
  try {
    room = pickRoom(await readRooms(trx, { leaving: "count", lock: true }), need);
  } catch (error) {
    pickRoom(await readRooms(trx, { leaving: "ignore" }), need);
    if (error instanceof ForgeError) return "wait";
    throw error;
  }
  await trx.updateTable("cells").set({ node_id: room.nodeId, holds_room: true }).where("id", "=", cell.id).execute();
  facts.push(cellFact(cell, "cell.placed", { revision: cell.revision, node: room.nodeName }));
  return "done";
}

/** The node never heard of it: the room is free at once. A cell that was handed over keeps it until its node reports the end. */
async function giveBackRoom({ trx, cell }: StepContext): Promise<void> {
  if (cell.desired === "pending")
    await trx.updateTable("cells").set({ node_id: null, holds_room: false }).where("id", "=", cell.id).execute();
}

/** Draws the cell's address, which is its own for as long as it exists, on whichever node. */
async function giveAddress({ trx, control, cell }: StepContext): Promise<"done"> {
  const tenant = await trx.selectFrom("tenants").select("network").where("id", "=", cell.tenant_id).executeTakeFirstOrThrow();
  const address = cellAddress(control.installation.prefix, tenant.network, newCellIdentifier());
  await trx.updateTable("cells").set({ address }).where("id", "=", cell.id).execute();
  return "done";
}

/** Makes the cell part of its node's desired state, and wakes the node. */
async function assign({ trx, cell, facts }: StepContext): Promise<"done"> {
  const nodeId = cell.node_id ?? "";
  await trx.updateTable("cells").set({ desired: "running", state: "assigned" }).where("id", "=", cell.id).execute();
  await trx
    .insertInto("node_tenants")
    .values({ node_id: nodeId, tenant_id: cell.tenant_id })
    .onConflict((on) => on.doNothing())
    .execute();
  await changeNodes(trx, [nodeId]);
  facts.push(cellFact(cell, "cell.assigned", { revision: cell.revision, address: cell.address }));
  return "done";
}

/** The node stops the cell and keeps its logs until the service is deployed again or removed. */
async function stopOnNode({ trx, cell }: StepContext): Promise<void> {
  await trx.updateTable("cells").set({ desired: "stopped" }).where("id", "=", cell.id).where("desired", "=", "running").execute();
  await changeNodes(trx, [cell.node_id ?? ""]);
}

/** Ready is what the node reports. A program that ended well, and may, was ready too. */
async function awaitReady({ cell }: StepContext): Promise<"done" | "wait"> {
  if (cell.state === "running" || (cell.state === "stopped" && cell.exit_status === 0)) return "done";
  if (cell.state === "failed" || cell.state === "stopped")
    throw new ForgeError("CELL_FAILED", cell.reason ?? "the cell ended before it was ready");
  return "wait";
}

/** Fetching and preparing the image, booting, and the grace the manifest gives the program. */
async function readyPatienceMs({ trx, cell }: StepContext): Promise<number> {
  const row = await trx
    .selectFrom("revisions")
    .select("spec")
    .where("service_id", "=", cell.service_id)
    .where("revision", "=", cell.revision)
    .executeTakeFirst();
  const spec = row?.spec as ServiceSpec | undefined;
  return 240_000 + durationMs(spec?.health?.grace ?? "60s");
}

/** The last cell of a revision to get ready sends the older ones away: start first, then stop. */
async function retireOlderRevisions({ trx, control, cell }: StepContext): Promise<"done"> {
  if (cell.service_id === null) return "done";
  await sql`select pg_advisory_xact_lock(hashtextextended(${cell.service_id}, 0))`.execute(trx); // two last ones must not each see the other
  const unfinished = await trx
    .selectFrom("cells")
    .leftJoin("jobs", "jobs.cell_id", "cells.id")
    .select("cells.id")
    .where("cells.service_id", "=", cell.service_id)
    .where("cells.revision", "=", cell.revision)
    .where("cells.id", "!=", cell.id)
    .where((on) => on.or([on("jobs.id", "is not", null), on.and([on("cells.state", "=", "failed"), on("cells.desired", "!=", "removed")])]))
    .limit(1)
    .executeTakeFirst();
  if (unfinished !== undefined) return "done";
  await removeCells(
    trx,
    control,
    await trx.selectFrom("cells").select("id").where("service_id", "=", cell.service_id).where("revision", "<", cell.revision).execute(),
  );
  return "done";
}

/**
 * Takes cells out of the desired state of their nodes. Those no node ever knew are forgotten at once; the others when
 * their node reports that nothing of them is left.
 */
export async function removeCells(trx: Trx, control: Control, cells: readonly { id: string }[]): Promise<void> {
  if (cells.length === 0) return;
  const ids = cells.map((cell) => cell.id);
  const rows = await trx
    .updateTable("cells")
    .set({ desired: "removed", state: sql`case when state in ('stopped', 'failed') then state else 'stopping' end` })
    .where("id", "in", ids)
    .where("desired", "in", ["running", "stopped"])
    .returning("node_id")
    .execute();
  const forgotten = await trx.deleteFrom("cells").where("id", "in", ids).where("desired", "=", "pending").returningAll().execute();
  await trx.deleteFrom("jobs").where("cell_id", "in", ids).execute();
  await changeNodes(
    trx,
    rows.map((row) => row.node_id ?? ""),
  );
  if (forgotten.length > 0)
    await appendEvents(
      trx,
      control.signer,
      forgotten.map((cell) => cellFact(cell, "cell.removed", {})),
    );
}

/** Asks the nodes to stop the cells and keep their logs. */
export async function stopCells(trx: Trx, control: Control, serviceId: string): Promise<void> {
  await removeCells(
    trx,
    control,
    await trx.selectFrom("cells").select("id").where("service_id", "=", serviceId).where("desired", "=", "pending").execute(),
  );
  const rows = await trx
    .updateTable("cells")
    .set({ desired: "stopped", state: sql`case when state in ('stopped', 'failed') then state else 'stopping' end` })
    .where("service_id", "=", serviceId)
    .where("desired", "=", "running")
    .returning(["id", "node_id"])
    .execute();
  if (rows.length > 0)
    await trx
      .deleteFrom("jobs")
      .where(
        "cell_id",
        "in",
        rows.map((row) => row.id),
      )
      .execute();
  await changeNodes(
    trx,
    rows.map((row) => row.node_id ?? ""),
  );
}

/** A new generation for these nodes. The row lock makes generations visible in their order. */
export async function changeNodes(trx: Trx, nodeIds: readonly string[]): Promise<void> {
  const ids = [...new Set(nodeIds)].filter((id) => id !== "").toSorted();
  if (ids.length === 0) return;
  await trx
    .updateTable("nodes")
    .set((on) => ({ generation: on("generation", "+", 1) }))
    .where("id", "in", ids)
    .returning(sql`pg_notify('forge', 'node:' || id)`.as("wake"))
    .execute();
}

/** An event about a cell, by the platform. */
export function cellFact(
  cell: { id: string; tenant_id: string; service_name: string },
  kind: Fact["kind"],
  details: Fact["details"],
  outcome: Fact["outcome"] = "success",
): Fact {
  return {
    tenant: cell.tenant_id,
    kind,
    actor: "platform",
    outcome,
    subject: `cell/${cell.id}`,
    details: { service: cell.service_name, ...details },
  };
}

function leavingTooSlow(): ForgeError {
  return new ForgeError("NO_ROOM", "the cells whose room this one was to take did not stop in time");
}

function notReady({ cell }: StepContext): ForgeError {
  const reason = cell.reason === null ? "" : `: ${cell.reason}`;
  return new ForgeError("GUEST_NOT_READY", `the cell did not become ready in time; it is ${cell.state}${reason}`);
}
