import { z } from "zod";
import { nameSchema } from "./manifest.ts";
import {
  applyServiceSchema,
  auditReportSchema,
  cellSchema,
  digestSchema,
  eventSchema,
  imageSchema,
  imageSignatureSchema,
  logLineSchema,
  nodeSchema,
  planSchema,
  type Role,
  roleSchema,
  serviceSchema,
  statusSchema,
  tokenSchema,
  trustedKeySchema,
} from "./resources.ts";

/**
 * The route table: one entry per operation. The server registers handlers from it, OpenAPI is generated from it, the
 * client is typed by it, and the authorisation test walks it.
 */
export interface Route {
  readonly method: "GET" | "POST" | "PUT" | "DELETE";
  readonly path: string;
  /** One sentence for OpenAPI. */
  readonly summary: string;
  /** Who may call it; `public` needs no token. Absent roles are refused with FORBIDDEN. */
  readonly allow: readonly Role[] | "public";
  readonly params?: z.ZodObject;
  readonly query?: z.ZodObject;
  readonly body?: z.ZodType;
  readonly response: z.ZodType;
  /**
   * How bytes flow where it is not JSON in and JSON out. ndjson: the response is a stream of lines, each one `response`.
   * upload: the request body is raw bytes. websocket: binary frames, see session.ts.
   */
  readonly stream?: "ndjson" | "upload" | "websocket";
}

const everyone = ["owner", "developer", "auditor", "operator"] as const;
const tenantReaders = ["owner", "developer", "auditor"] as const;
const changers = ["owner", "developer"] as const;

const byName = z.strictObject({ name: nameSchema });
const byDigest = z.strictObject({ digest: digestSchema });
const done = z.object({ ok: z.literal(true) });
const listOf = <T extends z.ZodType>(item: T) => z.object({ items: z.array(item) });

export const routes = {
  getHealth: {
    method: "GET",
    path: "/v1/health",
    summary: "Is the control plane up, and can it reach its database and log?",
    allow: "public",
    response: z.object({ ok: z.literal(true), version: z.string() }),
  },
  getStatus: { method: "GET", path: "/v1/status", summary: "Who am I, and where.", allow: everyone, response: statusSchema },

  listServices: {
    method: "GET",
    path: "/v1/services",
    summary: "The tenant's services with their cells. The operator sees no environment and no command.",
    allow: everyone,
    response: listOf(serviceSchema),
  },
  getService: {
    method: "GET",
    path: "/v1/services/:name",
    summary: "One service with its cells.",
    allow: tenantReaders,
    params: byName,
    response: serviceSchema,
  },
  applyService: {
    method: "POST",
    path: "/v1/services",
    summary: "Create a service or a new revision of it.",
    allow: changers,
    body: applyServiceSchema,
    response: z.object({ plan: planSchema, service: serviceSchema.nullable() }),
  },
  stopService: {
    method: "POST",
    path: "/v1/services/:name/stop",
    summary: "Stop all cells of a service and keep its definition.",
    allow: changers,
    params: byName,
    response: done,
  },
  startService: {
    method: "POST",
    path: "/v1/services/:name/start",
    summary: "Run a stopped service again.",
    allow: changers,
    params: byName,
    response: done,
  },
  removeService: {
    method: "DELETE",
    path: "/v1/services/:name",
    summary: "Stop a service and forget its definition.",
    allow: changers,
    params: byName,
    response: done,
  },
  getLogs: {
    method: "GET",
    path: "/v1/services/:name/logs",
    summary: "Lines the service wrote, oldest first.",
    allow: changers,
    params: byName,
    query: z.strictObject({
      follow: z.stringbool().default(false),
      tail: z.coerce.number().int().min(0).max(100_000).default(1000),
      cell: z.string().optional(),
    }),
    response: logLineSchema,
    stream: "ndjson",
  },
  exec: {
    method: "GET",
    path: "/v1/services/:name/exec",
    summary: "Run a program in a cell of the service (WebSocket).",
    allow: changers,
    params: byName,
    query: z.strictObject({
      cell: z.string().optional(),
      tty: z.stringbool().default(false),
      argv: z.string().max(65_536),
      columns: z.coerce.number().int().min(1).max(1000).default(80),
      rows: z.coerce.number().int().min(1).max(1000).default(24),
    }),
    response: z.never(),
    stream: "websocket",
  },

  listCells: {
    method: "GET",
    path: "/v1/cells",
    summary: "The tenant's cells; the operator sees every tenant's.",
    allow: everyone,
    response: listOf(cellSchema),
  },

  putBlob: {
    method: "PUT",
    path: "/v1/blobs/:digest",
    summary: "Upload one blob of an image; refused when the bytes are not what the digest says.",
    allow: changers,
    params: byDigest,
    response: done,
    stream: "upload",
  },
  findBlobs: {
    method: "POST",
    path: "/v1/blobs/missing",
    summary: "Which of these blobs does the region not have yet?",
    allow: changers,
    body: z.strictObject({ digests: z.array(digestSchema).max(512) }),
    response: z.object({ missing: z.array(digestSchema) }),
  },
  addImage: {
    method: "POST",
    path: "/v1/images",
    summary: "Admit an uploaded image: its signature is verified against the tenant's trusted keys.",
    allow: changers,
    body: z.strictObject({
      digest: digestSchema,
      reference: z.string().min(1).max(512),
      signatures: z.array(imageSignatureSchema).max(16),
    }),
    response: imageSchema,
  },
  pullImage: {
    method: "POST",
    path: "/v1/images/pull",
    summary: "Resolve a registry reference to a digest, verify its signature, and fetch it.",
    allow: changers,
    body: z.strictObject({ reference: z.string().min(1).max(512) }),
    response: imageSchema,
  },
  listImages: {
    method: "GET",
    path: "/v1/images",
    summary: "The tenant's admitted images.",
    allow: tenantReaders,
    response: listOf(imageSchema),
  },

  listTrustedKeys: {
    method: "GET",
    path: "/v1/trust",
    summary: "Keys whose image signatures the tenant accepts.",
    allow: tenantReaders,
    response: listOf(trustedKeySchema),
  },
  addTrustedKey: {
    method: "POST",
    path: "/v1/trust",
    summary: "Trust a public key for image signatures.",
    allow: ["owner"],
    body: z.strictObject({ name: nameSchema, publicKeyPem: z.string().max(8192) }),
    response: trustedKeySchema,
  },
  removeTrustedKey: {
    method: "DELETE",
    path: "/v1/trust/:name",
    summary: "Stop trusting a key; running cells stay, new ones are refused.",
    allow: ["owner"],
    params: byName,
    response: done,
  },

  listTokens: {
    method: "GET",
    path: "/v1/tokens",
    summary: "The tenant's API tokens, without their secrets.",
    allow: ["owner"],
    response: listOf(tokenSchema),
  },
  createToken: {
    method: "POST",
    path: "/v1/tokens",
    summary: "Make an API token; its secret is shown once.",
    allow: ["owner"],
    body: z.strictObject({ name: nameSchema, role: roleSchema, ttlSeconds: z.int().min(60).max(31_536_000).optional() }),
    response: z.object({ token: tokenSchema, secret: z.string() }),
  },
  revokeToken: {
    method: "DELETE",
    path: "/v1/tokens/:name",
    summary: "Revoke a token at once.",
    allow: ["owner"],
    params: byName,
    response: done,
  },

  listEvents: {
    method: "GET",
    path: "/v1/events",
    summary: "The tenant's audit events, newest last; the operator sees the platform's.",
    allow: everyone,
    query: z.strictObject({
      after: z.coerce.number().int().min(0).default(0),
      limit: z.coerce.number().int().min(1).max(1000).default(200),
      newest: z.stringbool().default(false),
      follow: z.stringbool().default(false),
      service: z.string().max(64).optional(),
    }),
    response: eventSchema,
    stream: "ndjson",
  },
  verifyAudit: {
    method: "POST",
    path: "/v1/audit/verify",
    summary: "Check the whole chain and its signatures.",
    allow: ["owner", "auditor", "operator"],
    response: auditReportSchema,
  },

  listNodes: {
    method: "GET",
    path: "/v1/nodes",
    summary: "The region's nodes and their room.",
    allow: everyone,
    response: listOf(nodeSchema),
  },
} as const satisfies Record<string, Route>;

export type RouteName = keyof typeof routes;
