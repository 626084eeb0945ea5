import { join } from "node:path";
import { fileSigner, type Signer } from "../audit/index.ts";
import { makeDirectory, readIfExists, writeDurable } from "../base/durable.ts";
import { ForgeError } from "../base/errors.ts";
import { newId } from "../base/ids.ts";
import { type Authority, createAuthority, loadAuthority, newInstallationPrefix } from "../mesh/index.ts";
import { appendEvents, type Fact } from "./audit-log.ts";
import { newJoinToken, newToken } from "./authenticate.ts";
import type { Installation } from "./context.ts";
import { type Database, query, transact, type Trx } from "./db/database.ts";
import { version } from "./version.ts";

/** What the first start makes and every later one finds: keys in files, identity in the database. */
export interface Foundation {
  readonly authority: Authority;
  readonly signer: Signer;
  readonly installation: Installation;
}

const joinTokenDays = 7;

/**
 * Idempotent: files first, then one transaction. A database that knows an installation whose keys are not here is
 * never given new ones: its log could not be told from a forged one.
 */
export async function bootstrap(folder: string, db: Database, options: { region: string }): Promise<Foundation> {
  const keys = join(folder, "keys");
  await makeDirectory(keys);
  const known = await query(db.selectFrom("installation").selectAll().executeTakeFirst());
  if (known !== undefined && (await readIfExists(join(keys, "audit.pem"))) === undefined) {
    throw new ForgeError("UNSUPPORTED", `the database belongs to an installation whose keys are not in ${keys}: restore them`);
  }
  const signer = await fileSigner(join(keys, "audit.pem"));
  const authority = await openAuthority(keys, options.region, known !== undefined);
  await writeDurable(join(folder, "ca.pem"), authority.certificatePem, 0o644);
  if (known === undefined) return { authority, signer, installation: await create(folder, db, signer, options.region) };
  if (known.audit_public_key_pem !== signer.publicKeyPem)
    throw new ForgeError("UNSUPPORTED", `the audit key in ${keys} is not the one this database's log is signed with`);
  return { authority, signer, installation: { region: known.region, prefix: known.prefix } };
}

/** The CA's certificate is public; its key is not. The certificate is written last: with it, the pair is complete. */
async function openAuthority(keys: string, region: string, mustExist: boolean): Promise<Authority> {
  const [certificate, key] = await Promise.all([readIfExists(join(keys, "ca.pem")), readIfExists(join(keys, "ca-key.pem"))]);
  if (certificate !== undefined && key !== undefined)
    return loadAuthority({ certificatePem: certificate.toString(), privateKeyPem: key.toString() });
  if (mustExist) throw new ForgeError("UNSUPPORTED", `the region's certificate authority is not in ${keys}: restore it`);
  const authority = await createAuthority({ trustDomain: `${region}.forge` });
  await writeDurable(join(keys, "ca-key.pem"), authority.privateKeyPem);
  await writeDurable(join(keys, "ca.pem"), authority.certificatePem);
  return authority;
}

async function create(folder: string, db: Database, signer: Signer, region: string): Promise<Installation> {
  const bootstrapFolder = join(folder, "bootstrap");
  await makeDirectory(bootstrapFolder);
  const [owner, operator, join_] = [newToken(), newToken(), newJoinToken()];
  await writeDurable(join(bootstrapFolder, "owner-token"), `${owner.text}\n`);
  await writeDurable(join(bootstrapFolder, "operator-token"), `${operator.text}\n`);
  await writeDurable(join(bootstrapFolder, "join-token"), `${join_.text}\n`);
  const installation = { region, prefix: newInstallationPrefix() };
  await transact(db, async (trx) => {
    await trx
      .insertInto("installation")
      .values({ id: 1, ...installation, audit_public_key_pem: signer.publicKeyPem })
      .execute();
    const tenantId = await createTenant(trx, signer, "default");
    await trx
      .insertInto("tokens")
      .values([
        { id: owner.id, tenant_id: tenantId, name: "bootstrap", role: "owner", secret_hash: owner.secretHash },
        { id: operator.id, tenant_id: null, name: "operator", role: "operator", secret_hash: operator.secretHash },
      ])
      .execute();
    await trx
      .insertInto("join_tokens")
      .values({ secret_hash: join_.secretHash, expires_at: new Date(Date.now() + joinTokenDays * 86_400_000) })
      .execute();
    await appendEvents(trx, signer, [
      tokenFact(tenantId, "bootstrap", owner.id, "owner"),
      tokenFact(null, "operator", operator.id, "operator"),
    ]);
  });
  return installation;
}

/** A tenant with the next free network of the installation. */
export async function createTenant(trx: Trx, signer: Signer, name: string): Promise<string> {
  const id = newId("ten");
  const { used } = await trx
    .selectFrom("tenants")
    .select((on) => on.fn.max("network").as("used"))
    .executeTakeFirstOrThrow();
  await trx
    .insertInto("tenants")
    .values({ id, name, network: (used ?? 0) + 1 })
    .execute();
  await appendEvents(trx, signer, [
    { tenant: id, kind: "tenant.created", actor: "platform", outcome: "success", subject: `tenant/${name}`, details: { name } },
  ]);
  return id;
}

export function startedFact(): Fact {
  return { tenant: null, kind: "platform.started", actor: "platform", outcome: "success", subject: "platform", details: { version } };
}

export function stoppedFact(): Fact {
  return { tenant: null, kind: "platform.stopped", actor: "platform", outcome: "success", subject: "platform", details: {} };
}

function tokenFact(tenant: string | null, name: string, id: string, role: string): Fact {
  return {
    tenant,
    kind: "token.created",
    actor: "platform",
    outcome: "success",
    subject: `token/${name}`,
    details: { id, role, expiresAt: null },
  };
}
