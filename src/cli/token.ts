import type { Role, Token } from "../api/resources.ts";
import { withApi } from "./context.ts";
import type { Cli } from "./index.ts";
import { age } from "./text.ts";

export async function create({ terminal, ...cli }: Cli, flags: { name?: string; role?: Role; ttl?: number }): Promise<void> {
  const ttl = flags.ttl === undefined ? {} : { ttlSeconds: flags.ttl / 1000 };
  const body = { name: flags.name ?? "", role: flags.role ?? "developer", ...ttl };
  const { token, secret } = await withApi(cli, (api) => api.call("createToken", { body }));
  terminal.document({ token, secret });
  // The secret alone on stdout, so that `TOKEN=$(forge token create --name ci)` works.
  terminal.note(
    `token ${token.name} (${token.role})${token.expiresAt === null ? "" : `, valid until ${token.expiresAt}`}. It is shown this once:`,
  );
  terminal.print(secret);
  terminal.note("Use it with FORGE_TOKEN in the environment.");
}

export async function list({ terminal, ...cli }: Cli): Promise<void> {
  const { items } = await withApi(cli, (api) => api.call("listTokens", {}));
  terminal.document({ items });
  terminal.table<Token>(
    [
      { title: "NAME", value: (token) => token.name },
      { title: "ROLE", value: (token) => token.role },
      { title: "AGE", value: (token) => age(token.createdAt), align: "right" },
      { title: "EXPIRES", value: (token) => token.expiresAt ?? "never" },
      { title: "LAST USED", value: (token) => (token.lastUsedAt === null ? "never" : `${age(token.lastUsedAt)} ago`) },
    ],
    items,
  );
}

export async function revoke({ terminal, ...cli }: Cli, name: string): Promise<void> {
  const done = await withApi(cli, (api) => api.call("revokeToken", { params: { name } }));
  terminal.document(done);
  terminal.print(`token ${name} revoked`);
}
