import { z } from "zod";
import { nameSchema, serviceSpecSchema, jurisdictionSchema } from "./manifest.ts";
import { cellStateSchema, digestSchema, imageSignatureSchema, phasesSchema } from "./resources.ts";

/**
 * What a node's agent and the control plane say to each other, over mutual TLS on its own port. The agent always
 * dials: a node needs no way in. Reports and events are idempotent; the desired state is whole each time.
 */

/** A cell the node must run, complete: the agent needs nothing else to start it. */
export const cellAssignmentSchema = z.object({
  id: z.string(),
  tenantId: z.string(),
  service: nameSchema,
  revision: z.int(),
  desired: z.enum(["running", "stopped"]),
  image: z.object({
    digest: digestSchema,
    reference: z.string(),
    /** Verified again on the node: the control plane's word is not enough. */
    signatures: z.array(imageSignatureSchema),
    trustedKeysPem: z.array(z.string()),
  }),
  spec: serviceSpecSchema,
  /** The cell's own IPv6 address, without prefix length. */
  address: z.string(),
});
export type CellAssignment = z.infer<typeof cellAssignmentSchema>;

/** A request that a person waits for; the agent answers by dialling /node/v1/sessions/:id as a WebSocket. */
export const sessionRequestSchema = z.discriminatedUnion("kind", [
  z.object({
    kind: z.literal("exec"),
    id: z.string(),
    cell: z.string(),
    argv: z.array(z.string()),
    tty: z.boolean(),
    columns: z.int(),
    rows: z.int(),
  }),
  z.object({ kind: z.literal("logs"), id: z.string(), cells: z.array(z.string()), follow: z.boolean(), tail: z.int() }),
]);
export type SessionRequest = z.infer<typeof sessionRequestSchema>;

export const desiredStateSchema = z.object({
  /** Grows with every change; the agent asks for what comes after the one it has. */
  generation: z.int(),
  cells: z.array(cellAssignmentSchema),
  sessions: z.array(sessionRequestSchema),
});
export type DesiredState = z.infer<typeof desiredStateSchema>;

export const cellReportSchema = z.object({
  id: z.string(),
  revision: z.int(),
  state: cellStateSchema,
  /** May repeat what a guest said: bounded, and without the NUL that no text of PostgreSQL holds. */
  reason: z
    .string()
    .max(4000)
    .refine((reason) => !reason.includes("\0"), "holds a NUL")
    .nullable(),
  measurement: digestSchema.nullable(),
  vmm: z.string().nullable(),
  emulated: z.boolean().nullable(),
  restarts: z.int(),
  /** Of the entrypoint, as a shell tells it: 128 and the number where a signal killed it. */
  exitStatus: z.int().min(0).max(255).nullable(),
  startedAt: z.iso.datetime().nullable(),
  phases: phasesSchema,
  published: z.array(z.object({ name: nameSchema, address: z.string(), port: z.int() })),
});
export type CellReport = z.infer<typeof cellReportSchema>;

export const nodeFactsSchema = z.object({
  name: z.string(),
  jurisdiction: jurisdictionSchema,
  site: z.string(),
  rack: z.string(),
  vmm: z.string(),
  emulated: z.boolean(),
  profile: z.enum(["development", "production"]),
  vcpus: z.int(),
  memoryMib: z.int(),
});
export type NodeFacts = z.infer<typeof nodeFactsSchema>;

/** An entry of the node's spool, exactly as the node chained and signed it (audit/spool.ts). */
export const spoolEntrySchema = z.object({
  sequence: z.int(),
  previous: z.string(),
  event: z.string(),
  hash: z.string(),
  signature: z.string(),
});

export const nodeRoutes = {
  /** On the API's own port, with a one-time token instead of a client certificate. */
  join: {
    method: "POST",
    path: "/node/v1/join",
    body: z.strictObject({
      joinToken: z.string(),
      csrPem: z.string().max(8192),
      spoolPublicKeyPem: z.string().max(2048),
      facts: nodeFactsSchema,
    }),
    response: z.object({ nodeId: z.string(), certificatePem: z.string(), caPem: z.string(), installationPrefix: z.string() }),
  },
  hello: {
    method: "POST",
    path: "/node/v1/hello",
    body: z.object({ facts: nodeFactsSchema }),
    response: z.object({ installationPrefix: z.string(), spoolSequence: z.int() }),
  },
  desired: {
    method: "GET",
    path: "/node/v1/desired",
    query: z.strictObject({ after: z.coerce.number().int(), waitMs: z.coerce.number().int().min(0).max(60_000) }),
    response: desiredStateSchema,
  },
  report: {
    method: "POST",
    path: "/node/v1/report",
    body: z.object({ cells: z.array(cellReportSchema).max(4096), whole: z.boolean() }),
    response: z.object({ ok: z.literal(true) }),
  },
  events: {
    method: "POST",
    path: "/node/v1/events",
    body: z.object({ entries: z.array(spoolEntrySchema).max(1000) }),
    response: z.object({ acceptedThrough: z.int() }),
  },
  blob: { method: "GET", path: "/node/v1/blobs/:digest", params: z.strictObject({ digest: digestSchema }), response: z.never() },
  session: { method: "GET", path: "/node/v1/sessions/:id", params: z.strictObject({ id: z.string() }), response: z.never() },
} as const;
