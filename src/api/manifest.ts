import { z } from "zod";

/**
 * The manifest a developer writes (`forge.yaml`). The same schemas validate the API's bodies; the JSON Schema for
 * editors is generated from them. Every object is strict: an unknown key is an error, never ignored.
 */

const mebibyte = 1024 * 1024;
const namePattern = /^[a-z]([a-z0-9-]{0,38}[a-z0-9])?$/;

/** A DNS label: the name of a service, port or tenant. */
export const nameSchema = z
  .string()
  .regex(namePattern, "must be 1 to 40 lower-case letters, digits and inner hyphens, starting with a letter");

/** ISO 3166-1 alpha-2 in lower case, optionally with a subdivision: `de`, `fr`, `de-by`. */
export const jurisdictionSchema = z
  .string()
  .regex(/^[a-z]{2}(-[a-z0-9]{1,3})?$/, "must be a country code in lower case such as de, optionally with a region such as de-by");

/** `256MiB` or `2GiB`. Decimal units (MB, GB) are refused: memory is bought in powers of two. */
export const memorySchema = z
  .string()
  .regex(/^[1-9][0-9]{0,6}(MiB|GiB)$/, "must be a whole number with the unit MiB or GiB, such as 256MiB")
  // Below this the guest's kernel has no room to boot.
  .refine((text) => inRange(memoryBytes(text), 96 * mebibyte, 1024 * 1024 * mebibyte), "must be between 96MiB and 1024GiB");

/** `500ms`, `10s`, `5m`. */
export const durationSchema = z
  .string()
  .regex(/^[1-9][0-9]{0,6}(ms|s|m)$/, "must be a whole number with the unit ms, s or m, such as 10s")
  .refine((text) => inRange(durationMs(text), 100, 3_600_000), "must be between 100ms and 60m");

/** Bytes of a text that memorySchema accepted. */
export function memoryBytes(text: string): number {
  const value = Number.parseInt(text, 10);
  return text.endsWith("GiB") ? value * 1024 * mebibyte : value * mebibyte;
}

/** Milliseconds of a text that durationSchema accepted. */
export function durationMs(text: string): number {
  const value = Number.parseInt(text, 10);
  if (text.endsWith("ms")) return value;
  return text.endsWith("m") ? value * 60_000 : value * 1000;
}

const portNumberSchema = z.int().min(1).max(65_535);

export const portSchema = z.strictObject({
  name: nameSchema,
  /** The TCP port the application listens on, inside the cell. */
  port: portNumberSchema,
  /** The TCP port of the node that leads to it. Absent: not published. */
  publish: portNumberSchema.optional(),
});

/** Asked from inside the guest, on its loopback or its own address; the first success makes the cell ready. */
export const healthSchema = z.strictObject({
  /** Path of an HTTP GET; healthy is 200 to 399. Absent: a TCP connection is enough. */
  http: z
    .string()
    .regex(/^\/[!-~]{0,512}$/, "must be a path that starts with /")
    .optional(),
  port: portNumberSchema,
  interval: durationSchema.default("2s"),
  timeout: durationSchema.default("1s"),
  /** How long the cell may take from its start to its first success. */
  grace: durationSchema.default("60s"),
  /** Failures in a row, after readiness, that make the cell fail. */
  failures: z.int().min(1).max(100).default(3),
});

/** Who may open connections to this service, on which of its ports. Absent means denied. */
export const policySchema = z.strictObject({
  allow: z
    .array(z.strictObject({ from: nameSchema, port: nameSchema }))
    .max(256)
    .default([]),
});

const environmentSchema = z
  .record(
    z.string().regex(/^[A-Za-z_][A-Za-z0-9_]{0,127}$/, "must be a variable name: letters, digits and underscores"),
    z.string().max(32_768).refine(noNul, "must not contain NUL"),
  )
  .refine((env) => Object.keys(env).length <= 512, "must have at most 512 variables");

const argumentSchema = z.string().max(32_768).refine(noNul, "must not contain NUL");

/** What runs, apart from which image: shared by manifest and API. */
const serviceFields = {
  replicas: z.int().min(1).max(64).default(1),
  vcpus: z.int().min(1).max(64).default(1),
  memory: memorySchema.default("256MiB"),
  env: environmentSchema.default({}),
  /** Replaces the image's entrypoint and command together. */
  command: z.array(argumentSchema).min(1).max(256).optional(),
  /** `user`, `uid`, `user:group` or `uid:gid`; absent: the image's. */
  user: z
    .string()
    .regex(/^[A-Za-z0-9._-]{1,64}(:[A-Za-z0-9._-]{1,64})?$/, "must be user, uid, user:group or uid:gid")
    .optional(),
  ports: z.array(portSchema).max(64).default([]),
  health: healthSchema.optional(),
  restart: z.enum(["always", "on-failure", "never"]).default("always"),
  /** How long a graceful stop may take before the power is cut. */
  stopTimeout: durationSchema.default("10s"),
  policy: policySchema.default({ allow: [] }),
};

/** The desired shape of a service, as stored and as sent to a node. */
export const serviceSpecSchema = z.strictObject(serviceFields).superRefine(checkPorts);
export type ServiceSpec = z.output<typeof serviceSpecSchema>;

const manifestServiceSchema = z
  .strictObject({
    /** Folder or archive beside the manifest (`./image`, `oci-archive:…`, `docker-archive:…`) or a registry reference. */
    image: z.string().min(1).max(512),
    ...serviceFields,
  })
  .superRefine(checkPorts);

export const manifestSchema = z
  .strictObject({
    $schema: z.string().optional(),
    jurisdiction: jurisdictionSchema,
    services: z.record(nameSchema, manifestServiceSchema),
  })
  .superRefine(checkManifest);
export type Manifest = z.output<typeof manifestSchema>;
export type ManifestService = z.output<typeof manifestServiceSchema>;

function checkPorts(service: { ports: readonly z.output<typeof portSchema>[] }, context: z.RefinementCtx): void {
  for (const field of ["name", "port", "publish"] as const) {
    const seen = new Set<unknown>();
    for (const [index, port] of service.ports.entries()) {
      const value = port[field];
      if (value === undefined) continue;
      if (seen.has(value)) context.addIssue({ code: "custom", path: ["ports", index, field], message: `is used twice: ${value}` });
      seen.add(value);
    }
  }
}

interface ManifestShape {
  services: Record<
    string,
    { ports: { name: string; publish?: number | undefined }[]; policy: { allow: { from: string; port: string }[] } }
  >;
}

function checkManifest(manifest: ManifestShape, context: z.RefinementCtx): void {
  const names = Object.keys(manifest.services);
  if (names.length === 0) context.addIssue({ code: "custom", path: ["services"], message: "must have at least one service" });
  if (names.length > 64) context.addIssue({ code: "custom", path: ["services"], message: "must have at most 64 services" });
  const published = new Map<number, string>();
  for (const [name, service] of Object.entries(manifest.services)) {
    for (const [index, port] of service.ports.entries()) {
      if (port.publish === undefined) continue;
      const other = published.get(port.publish);
      if (other !== undefined) {
        context.addIssue({
          code: "custom",
          path: ["services", name, "ports", index, "publish"],
          message: `is already published by ${other}`,
        });
      }
      published.set(port.publish, name);
    }
    for (const [index, edge] of service.policy.allow.entries()) {
      if (!service.ports.some((port) => port.name === edge.port)) {
        const path = ["services", name, "policy", "allow", index, "port"];
        context.addIssue({ code: "custom", path, message: `names no port of ${name}: ${edge.port}` });
      }
    }
  }
}

function inRange(value: number, least: number, most: number): boolean {
  return value >= least && value <= most;
}

function noNul(text: string): boolean {
  return !text.includes("\0");
}
