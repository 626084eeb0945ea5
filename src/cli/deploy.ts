import { dirname, resolve } from "node:path";
import { type Manifest, type ManifestService, memoryBytes, type ServiceSpec } from "../api/manifest.ts";
import type { ApplyService, Image, Plan, Service } from "../api/resources.ts";
import { readIfExists } from "../base/durable.ts";
import { ForgeError } from "../base/errors.ts";
import { parseImageReference, verifySignatures } from "../isocell/image/index.ts";
import { Connection, ForgeHome } from "./context.ts";
import { awaitCells } from "./await-cells.ts";
import type { Cli } from "./index.ts";
import { uploadImage, withLocalImage, withOfferedImage } from "./local-images.ts";
import { parseManifest } from "./manifest.ts";
import { published } from "./ps.ts";
import { formatBytes, printable, shortDigest } from "./text.ts";

export interface DeployFlags {
  readonly dryRun?: boolean;
  readonly wait?: boolean;
  /** Milliseconds. */
  readonly timeout?: number;
}

interface Applied {
  readonly plan: Plan;
  readonly service: Service | null;
}

const defaultTimeoutMs = 300_000;
const pullTimeoutMs = 900_000;

/** `forge deploy`: manifest -> images (digest, signature, upload) -> services -> cells that run. */
export async function deploy(cli: Cli, file: string, flags: DeployFlags): Promise<void> {
  const manifest = parseManifest(await readManifest(file), file);
  const home = new ForgeHome(cli.env);
  const api = new Connection(await home.effective(), cli.signal);
  try {
    const work = { cli, home, api, folder: dirname(resolve(file)) };
    const images = await bringImages(work, manifest, flags.dryRun === true);
    const applied: Applied[] = [];
    for (const [name, service] of Object.entries(manifest.services)) {
      const image = images.get(service.image);
      if (image === undefined) throw new ForgeError("INTERNAL", `no image was brought for ${name}`);
      applied.push(await api.call("applyService", { body: applyBody(name, service, manifest, image, flags.dryRun === true) }));
    }
    await finish(work, applied, flags);
  } finally {
    api.close();
  }
}

interface Work {
  readonly cli: Cli;
  readonly home: ForgeHome;
  readonly api: Connection;
  /** Relative image paths start here. */
  readonly folder: string;
}

async function readManifest(file: string): Promise<string> {
  try {
    const bytes = await readIfExists(file);
    if (bytes !== undefined) return new TextDecoder("utf-8", { fatal: true }).decode(bytes);
  } catch (error) {
    if (error instanceof TypeError) throw new ForgeError("MANIFEST_INVALID", `${file} is not UTF-8 text`);
    throw new ForgeError("NOT_FOUND", `${file} cannot be read: ${error instanceof Error ? error.message : String(error)}`);
  }
  throw new ForgeError("NOT_FOUND", `there is no manifest ${file}`);
}

type BroughtImage = Pick<Image, "digest" | "reference">;

/** Each image of the manifest once, admitted by the region; with a dry run only its digest is found out. */
async function bringImages(work: Work, manifest: Manifest, isDryRun: boolean): Promise<Map<string, BroughtImage>> {
  const brought = new Map<string, BroughtImage>();
  for (const { image } of Object.values(manifest.services)) {
    if (!brought.has(image)) brought.set(image, await bringImage(work, image, isDryRun));
  }
  return brought;
}

export async function bringImage({ cli, home, api, folder }: Work, text: string, isDryRun: boolean): Promise<BroughtImage> {
  const { terminal } = cli;
  const reference = parseImageReference(text, folder);
  if (reference.kind === "registry") {
    if (isDryRun) return { digest: reference.digest ?? (await knownDigest(api, text)), reference: text };
    terminal.progress([`${text}: pulling …`]);
    const image = await api.call("pullImage", { body: { reference: text } }, pullTimeoutMs);
    describeImage(cli, text, image);
    return image;
  }
  terminal.progress([`${text}: reading …`]);
  if (isDryRun) {
    return withLocalImage(home, reference, async ({ digest, signatures }) => {
      verifySignatures(digest, signatures, (await api.call("listTrustedKeys", {})).items);
      return { digest, reference: text };
    });
  }
  return withOfferedImage(home, api, reference, async (local) => {
    const image = await uploadImage(api, local, (sent, total) =>
      terminal.progress([`${text}: sending ${formatBytes(sent)} of ${formatBytes(total)}`]),
    );
    describeImage(cli, text, image);
    return image;
  });
}

/** A dry run pulls nothing: only what the region has of this name can be planned with. */
async function knownDigest(api: Connection, text: string): Promise<string> {
  const { items } = await api.call("listImages", {});
  const known = items
    .filter(({ reference }) => reference === text)
    .toSorted((one, other) => other.createdAt.localeCompare(one.createdAt))[0];
  if (known !== undefined) return known.digest;
  throw new ForgeError(
    "IMAGE_NOT_FOUND",
    `the region has no image ${text} yet, and a dry run pulls none: \`forge image push ${text}\` brings it in, or name it by its digest`,
  );
}

function describeImage({ terminal }: Cli, text: string, image: Image): void {
  terminal.note(`${printable(text)}: ${shortDigest(image.digest)}, ${formatBytes(image.sizeBytes)}, signed by ${image.signedBy}`);
}

function applyBody(name: string, service: ManifestService, manifest: Manifest, image: BroughtImage, dryRun: boolean): ApplyService {
  const { image: _image, ...spec } = service;
  return { name, jurisdiction: manifest.jurisdiction, imageDigest: image.digest, imageReference: image.reference, spec, dryRun };
}

async function finish({ cli, api }: Work, applied: readonly Applied[], flags: DeployFlags): Promise<void> {
  const { terminal } = cli;
  const plans = applied.map(({ plan }) => plan);
  terminal.progress([]);
  for (const plan of plans) printPlan(cli, plan, flags.dryRun === true);
  if (flags.dryRun === true) {
    terminal.document({ dryRun: true, plans });
    terminal.note("nothing was changed (--dry-run)");
    return;
  }
  if (flags.wait === false) {
    terminal.document({ plans, services: applied.map(({ service }) => service) });
    terminal.note("not waiting for the cells: `forge ps` shows them");
    return;
  }
  const services = await awaitCells(cli, api, plans, flags.timeout ?? defaultTimeoutMs);
  terminal.document({ plans, services });
  for (const service of services) printService(cli, service);
}

function printPlan({ terminal }: Cli, plan: Plan, isDryRun: boolean): void {
  const words = {
    create: isDryRun ? "would be created" : "created",
    update: `${isDryRun ? "would become" : "is now"} revision ${plan.revision}`,
    unchanged: "unchanged",
  };
  const say = isDryRun ? terminal.print.bind(terminal) : terminal.note.bind(terminal); // the plan is what a dry run is asked for
  say(`${terminal.paint("bold", plan.service)}: ${words[plan.action]}`);
  for (const change of plan.changes) say(`  ${printable(change)}`);
}

function printService({ terminal }: Cli, service: Service): void {
  const cells = service.cells.filter(({ revision, state }) => revision === service.revision && state === "running");
  const places = [...new Set(cells.map(published).filter((text) => text !== ""))];
  const where = places.length === 0 ? "" : `, published at ${places.join(", ")}`;
  const resources = `${cells.length} × ${vcpus(service.spec)}, ${memoryBytes(service.spec.memory) / (1024 * 1024)} MiB`;
  terminal.print(`${terminal.paint("green", "✓")} ${terminal.paint("bold", service.name)} runs: ${resources}${where}`);
}

function vcpus(spec: ServiceSpec): string {
  return spec.vcpus === 1 ? "1 vCPU" : `${spec.vcpus} vCPUs`;
}
