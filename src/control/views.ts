import { type Selectable, sql } from "kysely";
import type { ServiceSpec } from "../api/manifest.ts";
import type { Cell, CellState, Node, Service } from "../api/resources.ts";
import { type Database, query, type Trx } from "./db/database.ts";
import type { CellTable, ImageTable, NodeTable, TokenTable, TrustedKeyTable } from "./db/schema.ts";
import { readRooms, unreachableAfterMs } from "./placement.ts";

/** Rows as the API's resources. `tenantId: null` means every tenant's: the operator's view, without env and command. */

export async function listServices(db: Database | Trx, tenantId: string | null, name?: string): Promise<Service[]> {
  const rows = await query(
    db
      .selectFrom("services as service")
      .innerJoin("revisions as revision", (on) =>
        on.onRef("revision.service_id", "=", "service.id").onRef("revision.revision", "=", "service.revision"),
      )
      .innerJoin("tenants as tenant", "tenant.id", "service.tenant_id")
      .selectAll("service")
      .select(["revision.spec", "revision.image_digest", "revision.image_reference", "revision.signed_by", "tenant.name as tenant_name"])
      .$if(tenantId !== null, (q) => q.where("service.tenant_id", "=", tenantId ?? ""))
      .$if(name !== undefined, (q) => q.where("service.name", "=", name ?? ""))
      .orderBy("service.name")
      .orderBy("service.id")
      .execute(),
  );
  if (rows.length === 0) return [];
  const cells = await listCellRows(
    db,
    tenantId,
    rows.map((row) => row.id),
  );
  return rows.map((row) => {
    const own = cells.filter((cell) => cell.service_id === row.id);
    const spec = row.spec as ServiceSpec;
    return {
      id: row.id,
      tenant: row.tenant_name,
      name: row.name,
      jurisdiction: row.jurisdiction,
      revision: row.revision,
      image: { digest: row.image_digest, reference: row.image_reference, signedBy: row.signed_by },
      spec: tenantId === null ? withoutTenantBytes(spec) : spec,
      desired: row.desired,
      readyCells: own.filter((cell) => cell.state === "running" && cell.revision === row.revision).length,
      createdAt: row.created_at.toISOString(),
      updatedAt: row.updated_at.toISOString(),
      cells: own.map(cellView),
    };
  });
}

export async function listCells(db: Database, tenantId: string | null): Promise<Cell[]> {
  return (await listCellRows(db, tenantId)).map(cellView);
}

/** Cells that exist, and those whose end their node has not reported yet. */
async function listCellRows(db: Database | Trx, tenantId: string | null, serviceIds?: readonly string[]): Promise<CellRow[]> {
  return query(
    db
      .selectFrom("cells as cell")
      .innerJoin("tenants as tenant", "tenant.id", "cell.tenant_id")
      .leftJoin("nodes as node", "node.id", "cell.node_id")
      .selectAll("cell")
      .select(["tenant.name as tenant_name", "node.name as node_name"])
      .where((on) => on.or([on("cell.desired", "!=", "removed"), on("cell.holds_room", "=", true)]))
      .$if(tenantId !== null, (q) => q.where("cell.tenant_id", "=", tenantId ?? ""))
      .$if(serviceIds !== undefined, (q) => q.where("cell.service_id", "in", [...(serviceIds ?? [])]))
      .orderBy("cell.id")
      .execute(),
  );
}

type CellRow = Selectable<CellTable> & { tenant_name: string; node_name: string | null };

function cellView(row: CellRow): Cell {
  return {
    id: row.id,
    tenant: row.tenant_name,
    service: row.service_name,
    revision: row.revision,
    nodeName: row.node_name,
    state: row.state as CellState,
    reason: row.reason,
    address: row.address,
    imageDigest: row.image_digest,
    measurement: row.measurement,
    vmm: row.vmm,
    emulated: row.emulated,
    restarts: row.restarts,
    exitStatus: row.exit_status,
    startedAt: row.started_at?.toISOString() ?? null,
    createdAt: row.created_at.toISOString(),
    phases: row.phases,
    published: row.published,
  };
}

/** An operator sees that a service exists and what it uses, not what its tenant put into it. */
function withoutTenantBytes({ command: _, ...spec }: ServiceSpec): ServiceSpec {
  return { ...spec, env: {} };
}

export async function listNodes(db: Database): Promise<Node[]> {
  const [nodes, rooms, counts] = await query(
    Promise.all([
      db.selectFrom("nodes").selectAll().orderBy("name").execute(),
      readRooms(db, { leaving: "count" }),
      db
        .selectFrom("cells")
        .select(["node_id", sql<number>`count(*)`.as("count")])
        .where("holds_room", "=", true)
        .groupBy("node_id")
        .execute(),
    ]),
  );
  return nodes.map((node) => {
    const room = rooms.find((candidate) => candidate.nodeId === node.id);
    return nodeView(node, room?.memoryFreeMib ?? 0, room?.vcpusFree ?? 0, counts.find((count) => count.node_id === node.id)?.count ?? 0);
  });
}

function nodeView(row: Selectable<NodeTable>, memoryFreeMib: number, vcpusFree: number, cells: number): Node {
  const reachable = Date.now() - row.last_seen_at.getTime() < unreachableAfterMs;
  return {
    id: row.id,
    name: row.name,
    jurisdiction: row.jurisdiction,
    site: row.site,
    rack: row.rack,
    state: reachable ? "ready" : "unreachable",
    vmm: row.vmm,
    emulated: row.emulated,
    profile: row.profile,
    vcpus: row.vcpus,
    vcpusFree: Math.max(vcpusFree, 0),
    memoryMib: row.memory_mib,
    memoryFreeMib: Math.max(memoryFreeMib, 0),
    cells,
    lastSeenAt: row.last_seen_at.toISOString(),
  };
}

export function imageView(row: Selectable<ImageTable>): {
  digest: string;
  reference: string;
  sizeBytes: number;
  signedBy: string;
  createdAt: string;
} {
  return {
    digest: row.digest,
    reference: row.reference,
    sizeBytes: row.size_bytes,
    signedBy: row.signed_by,
    createdAt: row.created_at.toISOString(),
  };
}

export function trustedKeyView(row: Selectable<TrustedKeyTable>): {
  name: string;
  publicKeyPem: string;
  fingerprint: string;
  createdAt: string;
} {
  return { name: row.name, publicKeyPem: row.public_key_pem, fingerprint: row.fingerprint, createdAt: row.created_at.toISOString() };
}

export function tokenView(row: Omit<Selectable<TokenTable>, "secret_hash">): {
  id: string;
  name: string;
  role: TokenTable["role"];
  createdAt: string;
  expiresAt: string | null;
  lastUsedAt: string | null;
} {
  return {
    id: row.id,
    name: row.name,
    role: row.role,
    createdAt: row.created_at.toISOString(),
    expiresAt: row.expires_at?.toISOString() ?? null,
    lastUsedAt: row.last_used_at?.toISOString() ?? null,
  };
}
