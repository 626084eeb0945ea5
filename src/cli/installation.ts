import { mkdir } from "node:fs/promises";
import { hostname } from "node:os";
import { join, resolve } from "node:path";
import { fileURLToPath } from "node:url";
import { z } from "zod";
import { jurisdictionSchema } from "../api/manifest.ts";
import { makeDirectory, readIfExists, writeDurable } from "../base/durable.ts";
import { ForgeError } from "../base/errors.ts";

const portSchema = z.int().min(1).max(65_535);
const placeName = z
  .string()
  .regex(/^[a-z0-9]([a-z0-9.-]{0,61}[a-z0-9])?$/, "must be 1 to 63 lower-case letters, digits, dots and inner hyphens");

/** What `forge up` was told about this machine, kept in DATA/forge.json; control plane and agent start from it. */
const installationSchema = z.strictObject({
  jurisdiction: jurisdictionSchema.default("de"),
  site: placeName.default("local"),
  rack: placeName.default("r1"),
  nodeName: placeName.default(() => defaultNodeName()),
  profile: z.enum(["development", "production"]).default("development"),
  publishAddress: z.union([z.ipv4(), z.ipv6()], "must be an IP address of this machine").default("127.0.0.1"),
  apiPort: portSchema.default(7443),
  nodePort: portSchema.default(7444),
});
export type Installation = z.output<typeof installationSchema>;
export type InstallationChanges = { readonly [K in keyof Installation]?: Installation[K] | undefined };

export const defaultDataDir = "/var/lib/forge";
/** One machine is a region of its own, reached from itself alone. */
const regionName = "local";
const loopback = "127.0.0.1";

/** Where tools/setup puts what it compiles; a packaged installation names its own place. */
export const buildDir = process.env["FORGE_BUILD_DIR"] ?? fileURLToPath(new URL("../../build", import.meta.url));

/** The installation in a data folder, or undefined where there is none. */
export async function readInstallation(dataDir: string): Promise<Installation | undefined> {
  const path = join(dataDir, "forge.json");
  const bytes = await readIfExists(path);
  return bytes === undefined ? undefined : parseInstallation(parseJson(bytes.toString()), path);
}

export async function requireInstallation(dataDir: string): Promise<Installation> {
  const installation = await readInstallation(dataDir);
  if (installation === undefined)
    throw new ForgeError("NOT_FOUND", `no installation in ${dataDir}: \`forge up --data ${dataDir}\` makes one`);
  return installation;
}

/** Creates the data folder where needed and keeps the changes. Others may pass through it, to the folders that are theirs. */
export async function writeInstallation(dataDir: string, changes: InstallationChanges): Promise<Installation> {
  const given = Object.fromEntries(Object.entries(changes).filter(([, value]) => value !== undefined));
  const installation = parseInstallation({ ...(await readInstallation(dataDir)), ...given }, "the options");
  if (installation.apiPort === installation.nodePort) throw new ForgeError("USAGE", "--api-port and --node-port must differ");
  await mkdir(dataDir, { recursive: true, mode: 0o711 });
  for (const folder of ["log", "run"]) await makeDirectory(join(dataDir, folder), 0o700);
  await writeDurable(join(dataDir, "forge.json"), `${JSON.stringify(installation, null, 2)}\n`, 0o644);
  return installation;
}

/** Where everything of an installation is reached. */
export function apiUrlOf(installation: Installation): string {
  return `https://${loopback}:${installation.apiPort}`;
}

/** What `control` starts with. */
export async function controlOptions(dataDir: string) {
  const { apiPort, nodePort, jurisdiction } = await requireInstallation(dataDir);
  const databaseUrl = process.env["FORGE_DATABASE_URL"];
  const database = databaseUrl === undefined ? {} : { databaseUrl };
  return { dataDir, apiAddress: loopback, apiPort, nodePort, region: regionName, jurisdiction, ...database };
}

/** What `agent` starts with. */
export async function agentOptions(dataDir: string) {
  const installation = await requireInstallation(dataDir);
  const { jurisdiction, site, rack, nodeName, profile, publishAddress, nodePort } = installation;
  const controlUrl = `https://${loopback}:${nodePort}`;
  return { dataDir, buildDir, controlUrl, apiUrl: apiUrlOf(installation), jurisdiction, site, rack, nodeName, profile, publishAddress };
}

/** The data folder a command means: the one named, else the one used last, else the default. */
export function dataDirOf(flag: string | undefined, context: { dataDir?: string | undefined } | undefined): string {
  return resolve(flag ?? context?.dataDir ?? defaultDataDir);
}

function parseInstallation(value: unknown, source: string): Installation {
  const parsed = installationSchema.safeParse(value);
  if (parsed.success) return parsed.data;
  const problems = parsed.error.issues.map(({ path, message }) => `${path.join(".")} ${message}`);
  throw new ForgeError("INVALID_INPUT", `${source}: ${problems.join("; ")}`);
}

function defaultNodeName(): string {
  const name = hostname()
    .toLowerCase()
    .replace(/[^a-z0-9.-]/g, "-")
    .replace(/^[^a-z0-9]+|[^a-z0-9]+$/g, "")
    .slice(0, 40);
  return placeName.safeParse(name).success ? name : "node-1";
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}
