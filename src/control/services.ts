import { type Selectable, sql } from "kysely";
import type { z } from "zod";
import { memoryBytes, type ServiceSpec } from "../api/manifest.ts";
import type { applyServiceSchema, Plan } from "../api/resources.ts";
import { ForgeError } from "../base/errors.ts";
import { newId } from "../base/ids.ts";
import { verifySignatures } from "../isocell/image/index.ts";
import type { Control } from "./context.ts";
import type { Trx } from "./db/database.ts";
import type { ServiceTable } from "./db/schema.ts";
import { removeCells, stopCells } from "./deploy.ts";
import { occupy, pickRoom, readRooms } from "./placement.ts";
import { describeChanges, needsNewCells, type Shape } from "./plan.ts";

/** The intent of a service, written within the caller's transaction; cells follow through their jobs. */

export type ApplyRequest = z.output<typeof applyServiceSchema>;
export type ServiceRow = Selectable<ServiceTable>;

/** Creates the service, makes a new revision, changes its scale, or finds nothing to do. Refuses what is certain not to work. */
export async function applyService(trx: Trx, control: Control, tenantId: string, request: ApplyRequest): Promise<Plan> {
  const signedBy = await admitImage(trx, tenantId, request.imageDigest).catch((error: unknown) => {
    // A plan may come before the push: the deploy itself pushes, and verifies.
    if (request.dryRun && error instanceof ForgeError && error.code === "IMAGE_NOT_FOUND") return undefined;
    throw error;
  });
  const current = await lockService(trx, tenantId, request.name);
  const cells = current === undefined ? [] : await currentCells(trx, current);
  const change = await planChange(trx, current, cells, request);
  const { plan } = change;
  const serviceId = current?.id ?? newId("svc");
  const missing = change.newRevision ? request.spec.replicas : Math.max(request.spec.replicas - cells.length, 0);
  await checkRoom(trx, serviceId, request, missing);
  if (request.dryRun || signedBy === undefined || plan.action === "unchanged") return plan;

  const now = new Date();
  const service = { jurisdiction: request.jurisdiction, revision: plan.revision, desired: "running" as const, updated_at: now };
  if (current === undefined)
    await trx
      .insertInto("services")
      .values({ id: serviceId, tenant_id: tenantId, name: request.name, created_at: now, ...service })
      .execute();
  else await trx.updateTable("services").set(service).where("id", "=", serviceId).execute();
  await trx
    .insertInto("revisions")
    .values({
      tenant_id: tenantId,
      service_id: serviceId,
      revision: plan.revision,
      spec: JSON.stringify(request.spec),
      image_digest: request.imageDigest,
      image_reference: request.imageReference,
      signed_by: signedBy,
    })
    .onConflict((on) => on.columns(["service_id", "revision"]).doUpdateSet({ spec: JSON.stringify(request.spec) }))
    .execute();
  await removeCells(trx, control, change.surplus);
  await addCells(trx, { id: serviceId, tenant_id: tenantId, name: request.name, ...service }, request.spec, request.imageDigest, missing);
  return plan;
}

/** All cells stop; the definition stays. */
export async function stopService(trx: Trx, control: Control, tenantId: string, name: string): Promise<ServiceRow> {
  const service = await requireService(trx, tenantId, name);
  await trx.updateTable("services").set({ desired: "stopped", updated_at: new Date() }).where("id", "=", service.id).execute();
  await stopCells(trx, control, service.id);
  return service;
}

/** Fresh cells of the current revision take the place of the stopped ones. Its image must still be admitted. */
export async function startService(trx: Trx, control: Control, tenantId: string, name: string): Promise<ServiceRow> {
  const service = await requireService(trx, tenantId, name);
  if (service.desired === "running") return service;
  const revision = await readRevision(trx, service);
  await admitImage(trx, tenantId, revision.imageDigest);
  const spec = revision.spec;
  await checkRoom(trx, service.id, { jurisdiction: service.jurisdiction, spec }, spec.replicas);
  await trx.updateTable("services").set({ desired: "running", updated_at: new Date() }).where("id", "=", service.id).execute();
  await removeCells(trx, control, await trx.selectFrom("cells").select("id").where("service_id", "=", service.id).execute());
  await addCells(trx, service, spec, revision.imageDigest, spec.replicas);
  return service;
}

export async function removeService(trx: Trx, control: Control, tenantId: string, name: string): Promise<ServiceRow> {
  const service = await requireService(trx, tenantId, name);
  await removeCells(trx, control, await trx.selectFrom("cells").select("id").where("service_id", "=", service.id).execute());
  await trx.deleteFrom("services").where("id", "=", service.id).execute();
  return service;
}

/** The image is this tenant's, and a key trusted at this moment signed it; returns the key's name. */
export async function admitImage(trx: Trx, tenantId: string, digest: string): Promise<string> {
  const image = await trx
    .selectFrom("images")
    .select("signatures")
    .where("tenant_id", "=", tenantId)
    .where("digest", "=", digest)
    .executeTakeFirst();
  if (image === undefined)
    throw new ForgeError("IMAGE_NOT_FOUND", `the image ${digest} was not admitted for this tenant: push or pull it first`);
  return verifySignatures(digest, image.signatures, await readTrustedKeys(trx, tenantId)).keyName;
}

export async function readTrustedKeys(trx: Trx | Control["db"], tenantId: string): Promise<{ name: string; publicKeyPem: string }[]> {
  return trx
    .selectFrom("trusted_keys")
    .select(["name", "public_key_pem as publicKeyPem"])
    .where("tenant_id", "=", tenantId)
    .orderBy("name")
    .execute();
}

interface Change {
  readonly plan: Plan;
  readonly newRevision: boolean;
  /** Cells that are to go now, not when a new revision is ready. */
  readonly surplus: readonly { id: string }[];
}

interface CurrentCell {
  readonly id: string;
}

/** What an apply changes; nothing is written. */
async function planChange(
  trx: Trx,
  current: ServiceRow | undefined,
  healthy: readonly CurrentCell[],
  request: ApplyRequest,
): Promise<Change> {
  const { name: service, spec } = request;
  const after: Shape = { jurisdiction: request.jurisdiction, imageDigest: request.imageDigest, spec };
  if (current === undefined) {
    const changes = [`${spec.replicas} × ${spec.vcpus} vCPU, ${spec.memory} in ${request.jurisdiction}, image ${request.imageReference}`];
    return { plan: { action: "create", service, revision: 1, changes }, newRevision: true, surplus: [] };
  }
  const previous = await readRevision(trx, current);
  const before: Shape = { jurisdiction: current.jurisdiction, ...previous };
  const changes = describeChanges(before, after);
  const newRevision = needsNewCells(before, after);
  const revision = newRevision ? current.revision + 1 : current.revision;
  if (current.desired === "stopped") changes.push("desired: stopped -> running");
  const gone = newRevision ? [] : await endedCells(trx, current);
  const again = Math.min(spec.replicas, previous.spec.replicas) - healthy.length;
  if (!newRevision && current.desired === "running" && again > 0) changes.push(`cells: ${again} that ended or failed are started anew`);
  const surplus = newRevision ? [] : [...gone, ...healthy.slice(spec.replicas)];
  return { plan: { action: changes.length === 0 ? "unchanged" : "update", service, revision, changes }, newRevision, surplus };
}

/** Cells of the current revision that run or are about to, oldest first. */
async function currentCells(trx: Trx, service: ServiceRow): Promise<CurrentCell[]> {
  return trx
    .selectFrom("cells")
    .select("id")
    .where("service_id", "=", service.id)
    .where("revision", "=", service.revision)
    .where("desired", "in", ["pending", "running"])
    .where("state", "not in", ["failed", "stopped"])
    .orderBy("id")
    .execute();
}

/** Cells of the current revision that are of no more use: a new one takes their place. */
async function endedCells(trx: Trx, service: ServiceRow): Promise<CurrentCell[]> {
  return trx
    .selectFrom("cells")
    .select("id")
    .where("service_id", "=", service.id)
    .where("revision", "=", service.revision)
    .where((on) => on.or([on("desired", "=", "stopped"), on("state", "in", ["failed", "stopped"])]))
    .execute();
}

/** NO_ROOM or PORT_TAKEN when it is certain that so many cells find no place, even once what is stopping has stopped. */
async function checkRoom(trx: Trx, serviceId: string, request: Pick<ApplyRequest, "jurisdiction" | "spec">, count: number): Promise<void> {
  if (count === 0) return;
  const rooms = await readRooms(trx, { leaving: "ignore" });
  const size = sizeOf(request.spec);
  for (let index = 0; index < count; index++) {
    const need = { jurisdiction: request.jurisdiction, serviceId, ...size };
    occupy(pickRoom(rooms, need), need);
  }
}

/** Rows and jobs for new cells, and a wake for who runs the jobs. */
async function addCells(
  trx: Trx,
  service: Pick<ServiceRow, "id" | "tenant_id" | "name" | "jurisdiction" | "revision">,
  spec: ServiceSpec,
  imageDigest: string,
  count: number,
): Promise<void> {
  if (count === 0) return;
  const size = sizeOf(spec);
  const cells = Array.from({ length: count }, () => ({
    id: newId("cell"),
    tenant_id: service.tenant_id,
    service_id: service.id,
    service_name: service.name,
    jurisdiction: service.jurisdiction,
    revision: service.revision,
    image_digest: imageDigest,
    memory_mib: size.memoryMib,
    vcpus: size.vcpus,
    publish: size.publish,
    desired: "pending" as const,
    state: "pending",
  }));
  await trx.insertInto("cells").values(cells).execute();
  await trx
    .insertInto("jobs")
    .values(cells.map((cell) => ({ id: newId("job"), tenant_id: cell.tenant_id, cell_id: cell.id })))
    .returning(sql`pg_notify('forge', 'jobs')`.as("wake"))
    .execute();
}

async function lockService(trx: Trx, tenantId: string, name: string): Promise<ServiceRow | undefined> {
  return trx.selectFrom("services").selectAll().where("tenant_id", "=", tenantId).where("name", "=", name).forUpdate().executeTakeFirst();
}

async function requireService(trx: Trx, tenantId: string, name: string): Promise<ServiceRow> {
  const service = await lockService(trx, tenantId, name);
  if (service === undefined) throw new ForgeError("NOT_FOUND", `there is no service ${name}`);
  return service;
}

async function readRevision(trx: Trx, service: ServiceRow): Promise<{ spec: ServiceSpec; imageDigest: string }> {
  const row = await trx
    .selectFrom("revisions")
    .select(["spec", "image_digest"])
    .where("service_id", "=", service.id)
    .where("revision", "=", service.revision)
    .executeTakeFirstOrThrow();
  return { spec: row.spec as ServiceSpec, imageDigest: row.image_digest };
}

function sizeOf(spec: ServiceSpec): { memoryMib: number; vcpus: number; publish: number[] } {
  return {
    memoryMib: memoryBytes(spec.memory) / (1024 * 1024),
    vcpus: spec.vcpus,
    publish: spec.ports.flatMap((port) => (port.publish === undefined ? [] : [port.publish])),
  };
}
