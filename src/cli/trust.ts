import type { TrustedKey } from "../api/resources.ts";
import { readIfExists } from "../base/durable.ts";
import { ForgeError } from "../base/errors.ts";
import { withApi } from "./context.ts";
import type { Cli } from "./index.ts";
import { age } from "./text.ts";

export async function add({ terminal, ...cli }: Cli, name: string, path: string): Promise<void> {
  const publicKeyPem = (await readIfExists(path))?.toString();
  if (publicKeyPem === undefined) throw new ForgeError("NOT_FOUND", `there is no file ${path}`);
  if (publicKeyPem.includes("PRIVATE KEY")) {
    throw new ForgeError("INVALID_INPUT", `${path} is a private key: give its public half, and keep this one to yourself`);
  }
  const key = await withApi(cli, (api) => api.call("addTrustedKey", { body: { name, publicKeyPem } }));
  terminal.document(key);
  terminal.print(`images signed with ${key.name} (${key.fingerprint.slice(0, 16)}…) are accepted from now on`);
}

export async function list({ terminal, ...cli }: Cli): Promise<void> {
  const { items } = await withApi(cli, (api) => api.call("listTrustedKeys", {}));
  terminal.document({ items });
  if (items.length === 0) return terminal.print("no trusted keys: every image is refused; `forge trust add NAME FILE` adds one");
  terminal.table<TrustedKey>(
    [
      { title: "NAME", value: (key) => key.name },
      { title: "AGE", value: (key) => age(key.createdAt), align: "right" },
      { title: "SHA-256 OF THE KEY", value: (key) => key.fingerprint },
    ],
    items,
  );
}

export async function remove({ terminal, ...cli }: Cli, name: string): Promise<void> {
  const done = await withApi(cli, (api) => api.call("removeTrustedKey", { params: { name } }));
  terminal.document(done);
  terminal.print(`images signed with ${name} alone are refused from now on; running cells stay`);
}
