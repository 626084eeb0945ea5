import type { ColumnType, Generated } from "kysely";
import type { Role } from "../../api/resources.ts";

/** The rows behind everything. A time is a `timestamptz`, a document is `jsonb`; see migrations.ts for the constraints. */

type Time = ColumnType<Date, Date | string, Date | string>;
type GeneratedTime = ColumnType<Date, Date | string | undefined, Date | string>;
type MaybeTime = ColumnType<Date | null, Date | string | null | undefined, Date | string | null>;
/** A document: parsed when read, text when written. */
type Json<T> = ColumnType<T, string, string>;

export interface InstallationTable {
  id: number;
  region: string;
  prefix: string;
  audit_public_key_pem: string;
  created_at: GeneratedTime;
}

export interface TenantTable {
  id: string;
  name: string;
  /** 16 bits, unique in the installation; part of every address of the tenant's cells. 0 is the platform's own. */
  network: number;
  created_at: GeneratedTime;
}

export interface TokenTable {
  id: string;
  /** Null: the platform's operator. */
  tenant_id: string | null;
  name: string;
  role: Role;
  secret_hash: Buffer;
  created_at: GeneratedTime;
  expires_at: MaybeTime;
  last_used_at: MaybeTime;
}

export interface TrustedKeyTable {
  tenant_id: string;
  name: string;
  public_key_pem: string;
  fingerprint: string;
  created_at: GeneratedTime;
}

export interface StoredSignature {
  payload: string;
  signature: string;
}

export interface ImageTable {
  tenant_id: string;
  digest: string;
  reference: string;
  size_bytes: number;
  signed_by: string;
  signatures: Json<StoredSignature[]>;
  /** Every blob of the image, manifest and configuration included: what a node that runs it may fetch. */
  blobs: Json<string[]>;
  created_at: GeneratedTime;
}

/** Which blobs a tenant brought itself. */
export interface TenantBlobTable {
  tenant_id: string;
  digest: string;
  size_bytes: number;
}

export interface ServiceTable {
  id: string;
  tenant_id: string;
  name: string;
  jurisdiction: string;
  revision: number;
  desired: "running" | "stopped";
  created_at: GeneratedTime;
  updated_at: GeneratedTime;
}

export interface RevisionTable {
  tenant_id: string;
  service_id: string;
  revision: number;
  spec: Json<unknown>;
  image_digest: string;
  image_reference: string;
  signed_by: string;
}

export interface PublishedPort {
  name: string;
  address: string;
  port: number;
}

export interface CellTable {
  id: string;
  tenant_id: string;
  /** Null once the service is removed. */
  service_id: string | null;
  service_name: string;
  jurisdiction: string;
  revision: number;
  image_digest: string;
  memory_mib: number;
  vcpus: number;
  publish: number[];
  node_id: string | null;
  address: string | null;
  /** Only ever moves to the right. pending: not handed to its node yet. removed: the node has still to confirm that it is gone. */
  desired: "pending" | "running" | "stopped" | "removed";
  /** Memory, CPUs and ports of its node are reserved for it. */
  holds_room: Generated<boolean>;
  state: string;
  reason: string | null;
  measurement: string | null;
  vmm: string | null;
  emulated: boolean | null;
  restarts: Generated<number>;
  exit_status: number | null;
  started_at: MaybeTime;
  phases: ColumnType<Record<string, number>, string | undefined, string>;
  published: ColumnType<PublishedPort[], string | undefined, string>;
  created_at: GeneratedTime;
}

export interface JobTable {
  id: string;
  tenant_id: string;
  cell_id: string;
  /** Name of the last step that is done; null: none yet. */
  step: string | null;
  /** Set when a step failed: from here the job walks back, undoing. */
  failure: ColumnType<{ code: string; message: string } | null, string | null | undefined, string | null>;
  attempts: Generated<number>;
  run_at: GeneratedTime;
  lease_owner: string | null;
  lease_until: MaybeTime;
  /** When the waiting step gives up; set when it begins to wait. */
  deadline_at: MaybeTime;
  created_at: GeneratedTime;
}

export interface NodeTable {
  id: string;
  name: string;
  jurisdiction: string;
  site: string;
  rack: string;
  vmm: string;
  emulated: boolean;
  profile: "development" | "production";
  vcpus: number;
  memory_mib: number;
  /** Grows, under the row's lock, with every change of what the node should do. */
  generation: Generated<number>;
  certificate_fingerprint: string;
  spool_public_key_pem: string;
  spool_sequence: Generated<number>;
  spool_hash: string;
  last_seen_at: GeneratedTime;
  created_at: GeneratedTime;
}

export interface NodeTenantTable {
  node_id: string;
  tenant_id: string;
}

export interface JoinTokenTable {
  secret_hash: Buffer;
  /** SHA-256 of the request that consumed it: the same machine may ask again when the answer was lost. */
  csr_digest: Buffer | null;
  node_id: string | null;
  expires_at: Time;
}

export interface LogHeadTable {
  id: number;
  sequence: number;
  hash: string;
  time: Time;
}

export interface LogEntryTable {
  sequence: number;
  previous: string;
  event: string;
  hash: string;
  signature: string;
  /** Copies for searching only: what counts is in `event`, which the hash covers. */
  tenant_id: string | null;
  service: string | null;
}

export interface Schema {
  installation: InstallationTable;
  tenants: TenantTable;
  tokens: TokenTable;
  trusted_keys: TrustedKeyTable;
  images: ImageTable;
  tenant_blobs: TenantBlobTable;
  services: ServiceTable;
  revisions: RevisionTable;
  cells: CellTable;
  jobs: JobTable;
  nodes: NodeTable;
  node_tenants: NodeTenantTable;
  join_tokens: JoinTokenTable;
  log_head: LogHeadTable;
  log_entries: LogEntryTable;
}
