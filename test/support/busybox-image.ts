import { createHash } from "node:crypto";
import { mkdir, readFile, writeFile } from "node:fs/promises";
import { join } from "node:path";
import { buffer } from "node:stream/consumers";
import { gzipSync } from "node:zlib";
import { pack } from "tar-stream";

/** A small real image: the distribution's static busybox with links, an index page, and what the test asks for. */
export interface BusyboxImage {
  readonly argv?: readonly string[];
  readonly user?: string;
  readonly env?: readonly string[];
  readonly workingDir?: string;
  /** Path in the image to its text. */
  readonly files?: Readonly<Record<string, string>>;
}

const applets = [
  "sh",
  "httpd",
  "sleep",
  "cat",
  "echo",
  "ls",
  "id",
  "env",
  "ip",
  "ping",
  "nc",
  "wget",
  "uname",
  "ps",
  "kill",
  "head",
  "dd",
  "nslookup",
  "printf",
  "test",
  "date",
  "stty",
  "hostname",
  "yes",
  "grep",
  "wc",
  "sync",
  "true",
  "false",
];
const serve = ["httpd", "-f", "-vv", "-p", "[::]:80", "-h", "/www"];

/** Writes an OCI layout to `folder` with one image tagged `latest`; returns the manifest's digest. */
export async function writeBusyboxImage(folder: string, image: BusyboxImage = {}): Promise<string> {
  const layer = await layerOf({ "/www/index.html": "hello from a cell\n", ...image.files });
  const compressed = gzipSync(layer, { level: 1 });
  await mkdir(join(folder, "blobs/sha256"), { recursive: true });
  const config = {
    architecture: process.arch === "arm64" ? "arm64" : "amd64",
    os: "linux",
    config: {
      Entrypoint: image.argv ?? serve,
      Env: image.env ?? ["PATH=/bin"],
      User: image.user ?? "",
      WorkingDir: image.workingDir ?? "/",
    },
    rootfs: { type: "layers", diff_ids: [digestOf(layer)] },
  };
  const configBlob = await putBlob(folder, Buffer.from(JSON.stringify(config)));
  const layerBlob = await putBlob(folder, compressed);
  const manifest = {
    schemaVersion: 2,
    mediaType: "application/vnd.oci.image.manifest.v1+json",
    config: { mediaType: "application/vnd.oci.image.config.v1+json", ...configBlob },
    layers: [{ mediaType: "application/vnd.oci.image.layer.v1.tar+gzip", ...layerBlob }],
  };
  const manifestBlob = await putBlob(folder, Buffer.from(JSON.stringify(manifest)));
  const entry = { mediaType: manifest.mediaType, ...manifestBlob, annotations: { "org.opencontainers.image.ref.name": "latest" } };
  await writeFile(join(folder, "index.json"), JSON.stringify({ schemaVersion: 2, manifests: [entry] }));
  await writeFile(join(folder, "oci-layout"), JSON.stringify({ imageLayoutVersion: "1.0.0" }));
  return manifestBlob.digest;
}

async function layerOf(files: Readonly<Record<string, string>>): Promise<Buffer> {
  const tar = pack();
  const bytes = buffer(tar);
  const mtime = new Date(0);
  const directory = (name: string, mode = 0o755): void => void tar.entry({ name, type: "directory", mode, mtime });
  for (const name of ["bin/", "etc/", "www/", "proc/", "sys/", "dev/", "run/"]) directory(name);
  directory("tmp/", 0o1777);
  tar.entry({ name: "bin/busybox", mode: 0o755, mtime }, await readFile("/bin/busybox"));
  for (const applet of applets) tar.entry({ name: `bin/${applet}`, type: "symlink", linkname: "busybox", mtime });
  tar.entry({ name: "etc/passwd", mode: 0o644, mtime }, "root:x:0:0:root:/:/bin/sh\nweb:x:1000:1000::/www:/bin/sh\n");
  tar.entry({ name: "etc/group", mode: 0o644, mtime }, "root:x:0:\nweb:x:1000:\nextra:x:2000:web\n");
  for (const [path, text] of Object.entries(files)) tar.entry({ name: path.slice(1), mode: 0o755, mtime }, text);
  tar.finalize();
  return bytes;
}

async function putBlob(folder: string, bytes: Buffer): Promise<{ digest: string; size: number }> {
  const digest = digestOf(bytes);
  await writeFile(join(folder, "blobs/sha256", digest.slice(7)), bytes);
  return { digest, size: bytes.length };
}

function digestOf(bytes: Buffer): string {
  return `sha256:${createHash("sha256").update(bytes).digest("hex")}`;
}
