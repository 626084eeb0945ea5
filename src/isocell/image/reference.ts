import { isAbsolute, resolve } from "node:path";
import { ForgeError } from "../../base/errors.ts";

/** An OCI image layout in a folder. */
export interface FolderReference {
  readonly kind: "folder";
  readonly path: string;
  readonly tag?: string;
}

/** A tar of an OCI image layout, or what `docker save` writes. */
export interface ArchiveReference {
  readonly kind: "oci-archive" | "docker-archive";
  readonly path: string;
  readonly tag?: string;
}

/** `host[:port]/name[:tag][@digest]`. The host is always named: Forge assumes no registry. */
export interface RegistryReference {
  readonly kind: "registry";
  /** Host and port as written. */
  readonly registry: string;
  readonly repository: string;
  readonly tag?: string;
  readonly digest?: string;
}

export type LocalReference = FolderReference | ArchiveReference;
export type ImageReference = LocalReference | RegistryReference;

/** The distribution specification's grammar, with lengths bounded. */
const tagPattern = /^[A-Za-z0-9_][A-Za-z0-9._-]{0,127}$/;
const digestPattern = /^sha256:[0-9a-f]{64}$/;
const repositoryComponent = "[a-z0-9]+(?:(?:[._]|__|-+)[a-z0-9]+)*";
const repositoryPattern = new RegExp(`^${repositoryComponent}(?:/${repositoryComponent})*$`);
const hostLabel = "[A-Za-z0-9](?:[A-Za-z0-9-]{0,61}[A-Za-z0-9])?";
const registryPattern = new RegExp(`^(${hostLabel}(?:\\.${hostLabel})*|\\[[0-9A-Fa-f:.]{2,45}\\])(?::([0-9]{1,5}))?$`);
const maximumLength = 512;

/**
 * What an `image:` of a manifest or an argument of the CLI names. Relative paths are taken from `baseFolder`.
 * Throws INVALID_INPUT with the part that is wrong.
 */
export function parseImageReference(text: string, baseFolder: string): ImageReference {
  if (text === "" || text.length > maximumLength || /[\p{Cc}\p{Zs}]/u.test(text))
    throw invalid(text, `it must be 1 to ${maximumLength} characters without blanks`);
  const transport = /^(oci|oci-archive|docker-archive):(.*)$/.exec(text);
  if (transport !== null)
    return parseLocal(transport[1] === "oci" ? "folder" : (transport[1] as ArchiveReference["kind"]), transport[2] ?? "", text, baseFolder);
  if (text.startsWith("./") || text.startsWith("../") || text === "." || text === ".." || isAbsolute(text))
    return { kind: "folder", path: resolve(baseFolder, text) };
  return parseRegistry(text);
}

/** The reference in the form parseImageReference reads back. */
export function formatImageReference(reference: ImageReference): string {
  const tag = reference.tag === undefined ? "" : `:${reference.tag}`;
  if (reference.kind === "registry")
    return `${reference.registry}/${reference.repository}${tag}${reference.digest === undefined ? "" : `@${reference.digest}`}`;
  return `${reference.kind === "folder" ? "oci" : reference.kind}:${reference.path}${tag}`;
}

/** Is this registry on this machine itself, where plain HTTP crosses no wire? */
export function isLoopback(reference: RegistryReference): boolean {
  const host = registryPattern.exec(reference.registry)?.[1] ?? "";
  return host === "localhost" || host === "[::1]" || /^127(\.[0-9]{1,3}){3}$/.test(host);
}

function parseLocal(kind: LocalReference["kind"], rest: string, text: string, baseFolder: string): LocalReference {
  const colon = rest.lastIndexOf(":");
  const path = colon === -1 ? rest : rest.slice(0, colon);
  if (path === "") throw invalid(text, "the path is missing");
  if (path.includes(":")) throw invalid(text, "the path must not contain a colon: what follows a colon is the tag");
  if (colon === -1) return { kind, path: resolve(baseFolder, path) };
  return { kind, path: resolve(baseFolder, path), tag: matching(rest.slice(colon + 1), tagPattern, text, "tag") };
}

function parseRegistry(text: string): RegistryReference {
  const at = text.indexOf("@");
  const named = at === -1 ? text : text.slice(0, at);
  const slash = named.indexOf("/");
  const registry = slash === -1 ? "" : named.slice(0, slash);
  const isHost = registry === "localhost" || /[.:\]]/.test(registry);
  if (!isHost)
    throw invalid(text, "name the registry's host (host/name:tag), or write ./ before a folder's path: there is no default registry");
  const port = registryPattern.exec(registry)?.[2];
  if (!registryPattern.test(registry) || (port !== undefined && (Number(port) < 1 || Number(port) > 65_535)))
    throw invalid(text, "the registry's host or port is malformed");
  const rest = named.slice(slash + 1);
  const colon = rest.indexOf(":");
  const repository = matching(colon === -1 ? rest : rest.slice(0, colon), repositoryPattern, text, "repository");
  const tag = colon === -1 ? {} : { tag: matching(rest.slice(colon + 1), tagPattern, text, "tag") };
  const digest = at === -1 ? {} : { digest: matching(text.slice(at + 1), digestPattern, text, "digest") };
  return { kind: "registry", registry, repository, ...tag, ...digest };
}

function matching(part: string, pattern: RegExp, text: string, name: string): string {
  if (!pattern.test(part)) throw invalid(text, `the ${name} is malformed`);
  return part;
}

function invalid(text: string, why: string): ForgeError {
  return new ForgeError("INVALID_INPUT", `not an image reference: ${JSON.stringify(text.slice(0, 100))}: ${why}`);
}
