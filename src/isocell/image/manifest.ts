import { arch } from "node:process";
import { z } from "zod";
import { digestSchema } from "../../api/resources.ts";
import { ForgeError } from "../../base/errors.ts";

/**
 * The JSON documents of an image, OCI image specification 1.1 and Docker's schema 2: read with sizes bounded and only
 * the members Forge acts on. https://github.com/opencontainers/image-spec
 */

export const maximumDocumentBytes = 4 * 1024 * 1024;
const maximumLayers = 128;

export const mediaTypes = {
  index: ["application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"],
  manifest: ["application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"],
  ociManifest: "application/vnd.oci.image.manifest.v1+json",
  ociConfig: "application/vnd.oci.image.config.v1+json",
  ociLayer: "application/vnd.oci.image.layer.v1.tar",
  ociLayerGzip: "application/vnd.oci.image.layer.v1.tar+gzip",
  simpleSigning: "application/vnd.dev.cosign.simplesigning.v1+json",
} as const;

const annotationsSchema = z.record(z.string(), z.string()).optional();

const descriptorSchema = z.object({
  mediaType: z.string().max(255),
  digest: digestSchema,
  size: z.int().min(0),
  annotations: annotationsSchema,
  platform: z.object({ architecture: z.string(), os: z.string(), variant: z.string().optional() }).optional(),
});
export type Descriptor = z.infer<typeof descriptorSchema>;

const indexSchema = z.object({
  schemaVersion: z.literal(2),
  mediaType: z.string().optional(),
  manifests: z.array(descriptorSchema).max(4096),
});
export type ImageIndex = z.infer<typeof indexSchema>;

const manifestSchema = z.object({
  schemaVersion: z.literal(2),
  mediaType: z.string().optional(),
  config: descriptorSchema,
  layers: z.array(descriptorSchema).max(maximumLayers),
});
export type ManifestDocument = z.infer<typeof manifestSchema>;

const stringList = z.array(z.string().max(131_072)).max(4096).nullish();

const configSchema = z.object({
  architecture: z.string(),
  os: z.string(),
  config: z
    .object({
      User: z.string().max(256).nullish(),
      Env: stringList,
      Entrypoint: stringList,
      Cmd: stringList,
      WorkingDir: z.string().max(4096).nullish(),
      ExposedPorts: z.record(z.string(), z.unknown()).nullish(),
      StopSignal: z.string().max(32).nullish(),
    })
    .nullish(),
  rootfs: z.object({ type: z.literal("layers"), diff_ids: z.array(digestSchema).max(maximumLayers) }),
});

/** How the image wants to be run. Absent members are empty. */
export interface OciImageConfig {
  readonly user: string;
  readonly env: readonly string[];
  readonly entrypoint: readonly string[];
  readonly cmd: readonly string[];
  readonly workingDir: string;
  /** As the image writes them: `80/tcp`. */
  readonly exposedPorts: readonly string[];
  readonly stopSignal: string;
}

export interface ImageLayer {
  readonly descriptor: Descriptor;
  /** Digest of the uncompressed tar. */
  readonly diffId: string;
}

/** One platform's image, complete. */
export interface ImageManifest {
  /** The digest it was asked by: of an index, or of the manifest itself. */
  readonly digest: string;
  readonly manifestDigest: string;
  readonly configDescriptor: Descriptor;
  readonly config: OciImageConfig;
  readonly layers: readonly ImageLayer[];
  /** Of config and layers as stored. */
  readonly sizeBytes: number;
}

/** Either kind of document, told apart by its members and its media type, which must agree. */
export function parseDocument(
  bytes: Uint8Array,
  name: string,
): { kind: "index"; index: ImageIndex } | { kind: "manifest"; manifest: ManifestDocument } {
  const value = parseJson(bytes, name);
  const isIndex = typeof value === "object" && value !== null && "manifests" in value;
  // One body must not be both: https://github.com/advisories/GHSA-77vh-xpmg-72qh
  if (isIndex && ("layers" in value || "config" in value)) throw new ForgeError("IMAGE_REFUSED", `${name} is both an index and a manifest`);
  if (isIndex) return { kind: "index", index: validate(indexSchema, value, name, mediaTypes.index) };
  return { kind: "manifest", manifest: validate(manifestSchema, value, name, mediaTypes.manifest) };
}

export function parseIndex(bytes: Uint8Array, name: string): ImageIndex {
  return validate(indexSchema, parseJson(bytes, name), name, mediaTypes.index);
}

/** The config with one diff_id a layer. */
export function parseConfig(bytes: Uint8Array, name: string, layerCount: number): { config: OciImageConfig; diffIds: readonly string[] } {
  const document = validate(configSchema, parseJson(bytes, name), name);
  const diffIds = document.rootfs.diff_ids;
  if (diffIds.length !== layerCount)
    throw new ForgeError("IMAGE_CORRUPT", `${name} lists ${diffIds.length} diff_ids for ${layerCount} layers`);
  if (document.os !== "linux" || document.architecture !== hostArchitecture()) {
    throw new ForgeError(
      "IMAGE_REFUSED",
      `the image is for ${document.os}/${document.architecture}; this machine is linux/${hostArchitecture()}`,
    );
  }
  const run = document.config ?? {};
  const config: OciImageConfig = {
    user: run.User ?? "",
    env: run.Env ?? [],
    entrypoint: run.Entrypoint ?? [],
    cmd: run.Cmd ?? [],
    workingDir: run.WorkingDir ?? "",
    exposedPorts: Object.keys(run.ExposedPorts ?? {}),
    stopSignal: run.StopSignal ?? "",
  };
  return { config, diffIds };
}

/** The entry of an index for this machine. */
export function selectPlatform(index: ImageIndex, name: string): Descriptor {
  const found = index.manifests.find(({ platform }) => platform?.os === "linux" && platform.architecture === hostArchitecture());
  if (found === undefined) throw new ForgeError("IMAGE_REFUSED", `${name} has no image for linux/${hostArchitecture()}`);
  return found;
}

/** GOARCH of this machine, as image platforms are named. */
export function hostArchitecture(): string {
  return arch === "x64" ? "amd64" : arch;
}

function parseJson(bytes: Uint8Array, name: string): unknown {
  if (bytes.length > maximumDocumentBytes) throw new ForgeError("IMAGE_REFUSED", `${name} is larger than ${maximumDocumentBytes} bytes`);
  try {
    return JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(bytes));
  } catch {
    throw new ForgeError("IMAGE_CORRUPT", `${name} is not JSON`);
  }
}

function validate<T extends { mediaType?: string | undefined }>(
  schema: z.ZodType<T>,
  value: unknown,
  name: string,
  allowed: readonly string[],
): T;
function validate<T>(schema: z.ZodType<T>, value: unknown, name: string): T;
function validate<T extends { mediaType?: string | undefined }>(
  schema: z.ZodType<T>,
  value: unknown,
  name: string,
  allowed?: readonly string[],
): T {
  const result = schema.safeParse(value);
  if (!result.success) {
    const issue = result.error.issues[0];
    throw new ForgeError("IMAGE_CORRUPT", `${name} is malformed at ${issue?.path.join(".") || "its top"}: ${issue?.message ?? "unknown"}`);
  }
  const mediaType = result.data.mediaType;
  if (allowed !== undefined && mediaType !== undefined && !allowed.includes(mediaType))
    throw new ForgeError("IMAGE_REFUSED", `${name} has the media type ${mediaType}`);
  return result.data;
}
