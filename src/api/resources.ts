import { z } from "zod";
import { jurisdictionSchema, nameSchema, serviceSpecSchema } from "./manifest.ts";

/** What the API speaks of: one schema per resource, shared by server, client, CLI and OpenAPI. */

export const roleSchema = z.enum(["owner", "developer", "auditor", "operator"]);
/**
 * owner: all of the tenant. developer: services, images, logs, exec. auditor: reads state and events, changes nothing.
 * operator: the platform's machines; sees that cells exist and what they use, never a tenant's bytes (logs, exec, env).
 */
export type Role = z.infer<typeof roleSchema>;

export const digestSchema = z.string().regex(/^sha256:[0-9a-f]{64}$/, "must be sha256: and 64 hexadecimal digits");
const timeSchema = z.iso.datetime();
const idSchema = z.string().regex(/^[a-z]{2,4}_[0-9a-z]{24}$/);

export const errorBodySchema = z.object({
  code: z.string(),
  message: z.string(),
  remedy: z.string(),
  details: z.record(z.string(), z.unknown()).optional(),
});

/** One signature over an image digest in cosign's simple-signing form. Both fields are base64. */
export const imageSignatureSchema = z.strictObject({
  payload: z.base64().max(65_536),
  signature: z.base64().max(4096),
});
export type ImageSignature = z.infer<typeof imageSignatureSchema>;

export const imageSchema = z.object({
  digest: digestSchema,
  /** What the deployer called it. */
  reference: z.string(),
  sizeBytes: z.int(),
  /** Name of the trusted key whose signature was accepted. */
  signedBy: z.string(),
  createdAt: timeSchema,
});
export type Image = z.infer<typeof imageSchema>;

export const trustedKeySchema = z.object({
  name: nameSchema,
  /** SubjectPublicKeyInfo, PEM. ECDSA P-256 or Ed25519. */
  publicKeyPem: z.string(),
  /** SHA-256 of the SubjectPublicKeyInfo DER, hex. */
  fingerprint: z.string(),
  createdAt: timeSchema,
});
export type TrustedKey = z.infer<typeof trustedKeySchema>;

export const tokenSchema = z.object({
  id: idSchema,
  name: nameSchema,
  role: roleSchema,
  createdAt: timeSchema,
  expiresAt: timeSchema.nullable(),
  lastUsedAt: timeSchema.nullable(),
});
export type Token = z.infer<typeof tokenSchema>;

export const cellStateSchema = z.enum([
  "pending",
  "assigned",
  "preparing",
  "starting",
  "running",
  "backoff",
  "stopping",
  "stopped",
  "failed",
]);
export type CellState = z.infer<typeof cellStateSchema>;

/** How a deploy's time was spent on the node, in milliseconds; a phase not reached yet is absent. */
export const phasesSchema = z.object({
  prepareMs: z.number().optional(),
  attachMs: z.number().optional(),
  spawnMs: z.number().optional(),
  /** From the VMM's spawn to the guest init's first word. */
  kernelMs: z.number().optional(),
  /** From the guest init's first word to the entrypoint's start. */
  initMs: z.number().optional(),
  /** From the entrypoint's start to ready. */
  entrypointMs: z.number().optional(),
});
export type Phases = z.infer<typeof phasesSchema>;

export const cellSchema = z.object({
  id: idSchema,
  /** Name of the tenant it belongs to: the operator sees several. */
  tenant: nameSchema,
  service: nameSchema,
  revision: z.int(),
  nodeName: z.string().nullable(),
  state: cellStateSchema,
  /** Why it is in this state, where that needs words. */
  reason: z.string().nullable(),
  address: z.string().nullable(),
  imageDigest: digestSchema,
  /** SHA-256 over kernel, initramfs, root hash, command line and config of the running boot. */
  measurement: digestSchema.nullable(),
  vmm: z.string().nullable(),
  emulated: z.boolean().nullable(),
  restarts: z.int(),
  exitStatus: z.int().nullable(),
  startedAt: timeSchema.nullable(),
  createdAt: timeSchema,
  phases: phasesSchema,
  published: z.array(z.object({ name: nameSchema, address: z.string(), port: z.int() })),
});
export type Cell = z.infer<typeof cellSchema>;

export const serviceSchema = z.object({
  id: idSchema,
  /** Name of the tenant it belongs to: the operator sees several. */
  tenant: nameSchema,
  name: nameSchema,
  jurisdiction: jurisdictionSchema,
  revision: z.int(),
  image: z.object({ digest: digestSchema, reference: z.string(), signedBy: z.string() }),
  spec: serviceSpecSchema,
  desired: z.enum(["running", "stopped"]),
  readyCells: z.int(),
  createdAt: timeSchema,
  updatedAt: timeSchema,
  cells: z.array(cellSchema),
});
export type Service = z.infer<typeof serviceSchema>;

/** Body of POST /v1/services: creates the service, or makes a new revision of the one with this name. */
export const applyServiceSchema = z.strictObject({
  name: nameSchema,
  jurisdiction: jurisdictionSchema,
  /** Resolved to a digest before anything else; what the tag says later does not matter. */
  imageDigest: digestSchema,
  imageReference: z.string().min(1).max(512),
  spec: serviceSpecSchema,
  /** Only check and say what would happen. */
  dryRun: z.boolean().default(false),
});
export type ApplyService = z.input<typeof applyServiceSchema>;

/** One line of a plan: what an apply would do, or did. */
export const planSchema = z.object({
  action: z.enum(["create", "update", "unchanged"]),
  service: nameSchema,
  revision: z.int(),
  /** Human sentences, one a change: `memory: 256MiB -> 512MiB`. */
  changes: z.array(z.string()),
});
export type Plan = z.infer<typeof planSchema>;

export const nodeSchema = z.object({
  id: idSchema,
  name: z.string(),
  jurisdiction: jurisdictionSchema,
  site: z.string(),
  rack: z.string(),
  state: z.enum(["ready", "unreachable"]),
  vmm: z.string(),
  emulated: z.boolean(),
  /** development shares CPUs among cells and allows emulation; production pins them and refuses emulation. */
  profile: z.enum(["development", "production"]),
  vcpus: z.int(),
  vcpusFree: z.int(),
  memoryMib: z.int(),
  memoryFreeMib: z.int(),
  cells: z.int(),
  lastSeenAt: timeSchema,
});
export type Node = z.infer<typeof nodeSchema>;

/** One audited fact as a reader sees it. The chain's own form is in audit/. */
export const eventSchema = z.object({
  sequence: z.int(),
  time: timeSchema,
  tenant: z.string().nullable(),
  kind: z.string(),
  actor: z.string(),
  outcome: z.enum(["success", "failure", "denied"]),
  /** What it is about: `service/web`, `cell/cell_…`, `token/ci`. */
  subject: z.string(),
  details: z.record(z.string(), z.unknown()),
  hash: z.string(),
});
export type Event = z.infer<typeof eventSchema>;

export const auditReportSchema = z.object({
  ok: z.boolean(),
  entries: z.int(),
  /** Hash of the last entry, hex. */
  head: z.string(),
  /** The platform's public key, SPKI PEM. */
  publicKeyPem: z.string(),
  firstBad: z.object({ sequence: z.int(), problem: z.string() }).nullable(),
});
export type AuditReport = z.infer<typeof auditReportSchema>;

export const logLineSchema = z.object({
  cell: idSchema,
  time: timeSchema,
  stream: z.enum(["stdout", "stderr", "system"]),
  message: z.string(),
});
export type LogLine = z.infer<typeof logLineSchema>;

export const statusSchema = z.object({
  version: z.string(),
  region: z.string(),
  tenant: z.string().nullable(),
  role: roleSchema.nullable(),
  tokenName: z.string().nullable(),
  installationPrefix: z.string(),
});
export type Status = z.infer<typeof statusSchema>;
