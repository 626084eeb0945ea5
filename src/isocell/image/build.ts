import { createHash } from "node:crypto";
import { createReadStream, createWriteStream } from "node:fs";
import { chmod, chown, copyFile, mkdir, mkdtemp, readdir, realpath, rename, rm, stat, writeFile } from "node:fs/promises";
import { dirname, join, resolve, sep } from "node:path";
import { pipeline } from "node:stream/promises";
import { createGzip } from "node:zlib";
import { renameDurable, writeDurable } from "../../base/durable.ts";
import { errnoOf, ForgeError, toForgeError } from "../../base/errors.ts";
import { run } from "../../base/exec.ts";
import { hostSources } from "./apt.ts";
import { hostArchitecture, mediaTypes } from "./manifest.ts";
import { type ImageRecipe, readRecipe } from "./recipe.ts";
import { digestOf, hexOf } from "./store.ts";
import { isDiskFull } from "./unpack.ts";

export interface BuiltImage {
  /** The OCI layout's folder. */
  readonly layout: string;
  readonly digest: string;
  readonly sizeBytes: number;
}

export interface BuildOptions {
  /** Where the layout goes; default `image` in the recipe's folder. */
  readonly output?: string;
  /** No file of the image is younger. Same packages, files and epoch: same digest. */
  readonly sourceDateEpoch?: number;
}

const defaultEpoch = 1_735_689_600; // 2025-01-01: any fixed moment does
const bootstrapTimeoutMs = 20 * 60_000;
const archiveTimeoutMs = 10 * 60_000;

/** Builds the image that `image.yaml` in `folder` describes, from the distribution's packages, into an OCI layout. */
export async function buildImage(folder: string, options: BuildOptions = {}): Promise<BuiltImage> {
  if (process.getuid?.() !== 0)
    throw new ForgeError(
      "UNSUPPORTED",
      "building an image from packages needs root: files get owners, and maintainer scripts run in a chroot",
    );
  const recipe = await readRecipe(folder);
  const epoch = options.sourceDateEpoch ?? defaultEpoch;
  const output = resolve(options.output ?? join(folder, "image"));
  await refuseForeign(output);
  // On the output's file system: /tmp may be small.
  await mkdir(dirname(output), { recursive: true });
  const work = await mkdtemp(join(dirname(output), ".image-build-"));
  try {
    const rootfs = join(work, "rootfs");
    await bootstrap(recipe, rootfs, epoch);
    await makeReproducible(rootfs);
    for (const file of recipe.files) await addFile(folder, rootfs, file);
    const archive = join(work, "layer.tar");
    await packFolder(rootfs, archive, epoch);
    const image = await writeLayout(join(work, "layout"), archive, recipe, epoch);
    await rm(output, { recursive: true, force: true });
    await renameDurable(join(work, "layout"), output);
    return { layout: output, ...image };
  } catch (error) {
    const known = toForgeError(error);
    throw isDiskFull(known)
      ? new ForgeError("DISK_FULL", `no space left in ${dirname(output)} to build the image`, { cause: error })
      : known;
  } finally {
    await rm(work, { recursive: true, force: true });
  }
}

/** Only what Forge could have written is replaced. */
async function refuseForeign(output: string): Promise<void> {
  const names = await readdir(output).catch((error: unknown): string[] => {
    if (errnoOf(error) === "ENOENT") return [];
    throw errnoOf(error) === "ENOTDIR" ? new ForgeError("CONFLICT", `${output} is a file`) : error;
  });
  if (names.length > 0 && !names.includes("oci-layout"))
    throw new ForgeError("CONFLICT", `${output} exists and is no image layout: not replaced`);
}

async function bootstrap(recipe: ImageRecipe, rootfs: string, epoch: number): Promise<void> {
  const sources = await hostSources(recipe.suite);
  const args = [
    "--quiet",
    "--mode=root",
    "--format=directory",
    "--variant=minbase",
    `--include=${recipe.packages.join(",")}`,
    recipe.suite,
    rootfs,
  ];
  const env = { SOURCE_DATE_EPOCH: String(epoch), DEBIAN_FRONTEND: "noninteractive" };
  // Without sources of its own for the suite, mmdebstrap knows the distribution's.
  const input = sources.length === 0 ? {} : { input: `${sources.join("\n")}\n` };
  await run("mmdebstrap", sources.length === 0 ? args : [...args, "-"], { ...input, env, timeoutMs: bootstrapTimeoutMs });
}

/** Removes what differs between two runs or tells of the machine that built it. */
async function makeReproducible(rootfs: string): Promise<void> {
  const leftovers = [
    "var/cache/ldconfig/aux-cache",
    "var/cache/debconf/config.dat-old",
    "var/cache/debconf/templates.dat-old",
    "var/lib/dbus/machine-id",
    "etc/passwd-",
    "etc/group-",
    "etc/shadow-",
    "etc/gshadow-",
  ];
  for (const path of leftovers) await rm(join(rootfs, path), { force: true });
  for (const folder of ["var/cache/apt", "var/lib/apt/lists", "var/log/apt", "tmp", "run/lock"]) await emptyFolder(join(rootfs, folder));
  for (const name of ["alternatives.log", "bootstrap.log", "dpkg.log", "faillog", "lastlog"])
    await rm(join(rootfs, "var/log", name), { force: true });
  await rm(join(rootfs, "etc/resolv.conf"), { force: true });
  for (const [path, content] of [
    ["etc/machine-id", ""],
    ["etc/resolv.conf", ""],
    ["etc/hostname", "localhost\n"],
  ] as const) {
    await writeFile(join(rootfs, path), content);
    await chmod(join(rootfs, path), 0o644);
  }
}

async function emptyFolder(path: string): Promise<void> {
  const names = await readdir(path).catch((error: unknown): string[] => {
    if (errnoOf(error) === "ENOENT") return [];
    throw error;
  });
  for (const name of names) await rm(join(path, name), { recursive: true, force: true });
}

async function addFile(folder: string, rootfs: string, file: ImageRecipe["files"][number]): Promise<void> {
  const target = join(rootfs, file.to);
  await mkdir(dirname(target), { recursive: true, mode: 0o755 });
  // A link such as /var/run -> /run would lead to this machine's own /run.
  const parent = await realpath(dirname(target));
  const root = await realpath(rootfs);
  if (parent !== root && !parent.startsWith(root + sep))
    throw new ForgeError("INVALID_INPUT", `${file.to} lies behind a symbolic link that leads out of the image`);
  await rm(target, { force: true });
  await copyFile(resolve(folder, file.from), target).catch((error: unknown) => {
    throw errnoOf(error) === "ENOENT" ? new ForgeError("INVALID_INPUT", `there is no file ${resolve(folder, file.from)}`) : error;
  });
  const [uid, gid] = file.owner.split(":").map(Number);
  await chown(target, uid ?? 0, gid ?? 0);
  await chmod(target, Number.parseInt(file.mode, 8));
}

async function packFolder(rootfs: string, archive: string, epoch: number): Promise<void> {
  const form = [
    "--format=pax",
    "--pax-option=delete=atime,delete=ctime",
    "--sort=name",
    "--numeric-owner",
    "--xattrs",
    "--xattrs-include=*",
  ];
  await run("tar", [...form, "--clamp-mtime", `--mtime=@${epoch}`, "--create", "--file", archive, "--directory", rootfs, "."], {
    timeoutMs: archiveTimeoutMs,
  });
}

async function writeLayout(
  layout: string,
  archive: string,
  recipe: ImageRecipe,
  epoch: number,
): Promise<{ digest: string; sizeBytes: number }> {
  const blobs = join(layout, "blobs", "sha256");
  await mkdir(blobs, { recursive: true, mode: 0o755 });
  const { diffId, descriptor: layer } = await writeLayer(archive, blobs);
  const put = async (document: object, mediaType: string): Promise<{ mediaType: string; digest: string; size: number }> => {
    const bytes = Buffer.from(JSON.stringify(document));
    const digest = digestOf(bytes);
    await writeDurable(join(blobs, hexOf(digest)), bytes, 0o644);
    return { mediaType, digest, size: bytes.length };
  };
  const created = new Date(epoch * 1000).toISOString();
  const config = await put(
    { created, architecture: hostArchitecture(), os: "linux", config: runConfig(recipe), rootfs: { type: "layers", diff_ids: [diffId] } },
    mediaTypes.ociConfig,
  );
  const manifest = await put({ schemaVersion: 2, mediaType: mediaTypes.ociManifest, config, layers: [layer] }, mediaTypes.ociManifest);
  await writeDurable(join(layout, "oci-layout"), JSON.stringify({ imageLayoutVersion: "1.0.0" }), 0o644);
  const entry = { ...manifest, annotations: { "org.opencontainers.image.ref.name": "latest" } };
  await writeDurable(join(layout, "index.json"), JSON.stringify({ schemaVersion: 2, manifests: [entry] }), 0o644);
  return { digest: manifest.digest, sizeBytes: layer.size + config.size };
}

/** Compresses the tar into a blob, hashing both sides of the compressor. */
async function writeLayer(
  archive: string,
  blobs: string,
): Promise<{ diffId: string; descriptor: { mediaType: string; digest: string; size: number } }> {
  const plain = createHash("sha256");
  const packed = createHash("sha256");
  const tap = (hash: typeof plain) =>
    async function* (source: AsyncIterable<Buffer>): AsyncGenerator<Buffer> {
      for await (const chunk of source) {
        hash.update(chunk);
        yield chunk;
      }
    };
  const temporary = join(blobs, ".layer.tmp");
  await pipeline(
    createReadStream(archive, { highWaterMark: 1024 * 1024 }),
    tap(plain),
    createGzip({ level: 6 }),
    tap(packed),
    createWriteStream(temporary, { flush: true }),
  );
  const digest = `sha256:${packed.digest("hex")}`;
  await rename(temporary, join(blobs, hexOf(digest)));
  const { size } = await stat(join(blobs, hexOf(digest)));
  return { diffId: `sha256:${plain.digest("hex")}`, descriptor: { mediaType: mediaTypes.ociLayerGzip, digest, size } };
}

const defaultPath = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

function runConfig(recipe: ImageRecipe): object {
  return {
    User: recipe.user,
    Env: Object.entries({ PATH: defaultPath, ...recipe.env }).map(([name, value]) => `${name}=${value}`),
    Entrypoint: recipe.entrypoint,
    Cmd: recipe.cmd,
    WorkingDir: recipe.workdir,
    ExposedPorts: Object.fromEntries(recipe.ports.map((port) => [`${port}/tcp`, {}])),
    StopSignal: recipe.stopSignal,
  };
}
