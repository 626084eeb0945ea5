import { resolve } from "node:path";
import { access } from "node:fs/promises";
import type { Image } from "../api/resources.ts";
import { writeDurable } from "../base/durable.ts";
import { ForgeError } from "../base/errors.ts";
import {
  buildImage,
  generateSigningKey,
  type LocalReference,
  parseImageReference,
  signImage,
  type SigningKeyType,
} from "../isocell/image/index.ts";
import { Connection, ForgeHome, withApi } from "./context.ts";
import { bringImage } from "./deploy.ts";
import type { Cli } from "./index.ts";
import { withLocalImage, withStore } from "./local-images.ts";
import { signingKeyPem } from "./signing-key.ts";
import { age, formatBytes, printable, shortDigest } from "./text.ts";

export async function build(cli: Cli, folder: string, flags: { output?: string; sign?: boolean; key?: string }): Promise<void> {
  const { terminal } = cli;
  terminal.progress([`building ${folder} from the distribution's packages …`]);
  const { layout, digest } = await buildImage(folder, flags.output === undefined ? {} : { output: flags.output });
  const isSigned = flags.sign !== false;
  if (isSigned) await signReference(cli, { kind: "folder", path: layout }, flags.key);
  terminal.progress([]);
  terminal.document({ layout, digest, signed: isSigned });
  terminal.print(`${layout}\n  ${digest}${isSigned ? ", signed" : ", not signed: `forge image sign` does"}`);
}

export async function sign(cli: Cli, image: string, flags: { key?: string }): Promise<void> {
  const digest = await signReference(cli, localReference(image), flags.key);
  cli.terminal.document({ digest });
  cli.terminal.print(`signed ${digest}`);
}

async function signReference(cli: Cli, reference: LocalReference, keyPath: string | undefined): Promise<string> {
  const home = new ForgeHome(cli.env);
  const key = await signingKeyPem(home, keyPath);
  return withStore(home, async (store) => (await signImage(reference, store, key)).digest);
}

export async function push(cli: Cli, text: string): Promise<void> {
  const home = new ForgeHome(cli.env);
  const api = new Connection(await home.effective(), cli.signal);
  try {
    const image = await bringImage({ cli, home, api, folder: process.cwd() }, text, false);
    cli.terminal.progress([]);
    cli.terminal.document(image);
    cli.terminal.print(image.digest);
  } finally {
    api.close();
  }
}

export async function inspect(cli: Cli, text: string): Promise<void> {
  const { terminal } = cli;
  await withLocalImage(new ForgeHome(cli.env), localReference(text), async ({ digest, signatures, store }) => {
    const { config, layers, sizeBytes, manifestDigest } = await store.readManifest(digest);
    terminal.document({ digest, manifestDigest, sizeBytes, layers: layers.map(({ descriptor }) => descriptor), config, signatures });
    const line = (name: string, value: string): void => terminal.print(`${name.padEnd(14)}${printable(value)}`);
    line("digest", digest);
    line("size", `${formatBytes(sizeBytes)} in ${layers.length} ${layers.length === 1 ? "layer" : "layers"}`);
    line("signatures", String(signatures.length));
    for (const [name, value] of Object.entries(config))
      if (value !== undefined) line(name, typeof value === "string" ? value : JSON.stringify(value));
  });
}

export async function list({ terminal, ...cli }: Cli): Promise<void> {
  const { items } = await withApi(cli, (api) => api.call("listImages", {}));
  terminal.document({ items });
  if (items.length === 0) return terminal.print("no images; `forge image push IMAGE` or `forge deploy` brings one");
  terminal.table<Image>(
    [
      { title: "DIGEST", value: (image) => shortDigest(image.digest) },
      { title: "REFERENCE", value: (image) => image.reference, shrink: true },
      { title: "SIZE", value: (image) => formatBytes(image.sizeBytes), align: "right" },
      { title: "SIGNED BY", value: (image) => image.signedBy },
      { title: "AGE", value: (image) => age(image.createdAt), align: "right" },
    ],
    items,
  );
}

export async function keygen({ terminal }: Cli, path: string, flags: { type?: SigningKeyType }): Promise<void> {
  const publicPath = `${path}.pub`;
  for (const each of [path, publicPath])
    if (await exists(each)) throw new ForgeError("CONFLICT", `${each} exists; a key is never overwritten`);
  const key = generateSigningKey(flags.type);
  await writeDurable(publicPath, key.publicKeyPem, 0o644);
  await writeDurable(path, key.privateKeyPem);
  terminal.document({ privateKey: path, publicKey: publicPath });
  terminal.print(`${path} is the private key: keep it to yourself\n${publicPath} is the public one: forge trust add NAME ${publicPath}`);
}

/** A folder or an archive on this machine; a plain path needs no `./`. */
function localReference(text: string): LocalReference {
  const isPlainPath = !/^(oci|oci-archive|docker-archive):/.test(text);
  const reference = parseImageReference(isPlainPath ? resolve(text) : text, process.cwd());
  if (reference.kind === "registry") throw new ForgeError("USAGE", `${text} is in a registry: this command works on folders and archives`);
  return reference;
}

async function exists(path: string): Promise<boolean> {
  return access(path).then(
    () => true,
    () => false,
  );
}
