import { ForgeError } from "../../base/errors.ts";
import { describePublicKey } from "../../isocell/image/index.ts";
import { appendEvents } from "../audit-log.ts";
import { query, transact, type Trx } from "../db/database.ts";
import { changeNodes } from "../deploy.ts";
import { type Handler, tenantOf } from "../handler.ts";
import { trustedKeyView } from "../views.ts";

export const listTrustedKeys: Handler<"listTrustedKeys"> = async ({ control, caller }) => {
  const rows = await query(
    control.db.selectFrom("trusted_keys").selectAll().where("tenant_id", "=", tenantOf(caller)).orderBy("name").execute(),
  );
  return { items: rows.map(trustedKeyView) };
};

export const addTrustedKey: Handler<"addTrustedKey"> = async ({ control, caller, body }) => {
  const tenantId = tenantOf(caller);
  const { publicKeyPem, fingerprint } = describePublicKey(body.publicKeyPem);
  return transact(control.db, async (trx) => {
    const row = await trx
      .insertInto("trusted_keys")
      .values({ tenant_id: tenantId, name: body.name, public_key_pem: publicKeyPem, fingerprint })
      .onConflict((on) => on.doNothing())
      .returningAll()
      .executeTakeFirst();
    if (row === undefined) throw new ForgeError("CONFLICT", `a key named ${body.name}, or this key under another name, is trusted already`);
    await changeNodesOf(trx, tenantId);
    await appendEvents(trx, control.signer, [
      {
        tenant: tenantId,
        kind: "trust.added",
        actor: caller.actor,
        outcome: "success",
        subject: `key/${body.name}`,
        details: { fingerprint },
      },
    ]);
    return trustedKeyView(row);
  });
};

export const removeTrustedKey: Handler<"removeTrustedKey"> = async ({ control, caller, params }) => {
  const tenantId = tenantOf(caller);
  await transact(control.db, async (trx) => {
    const row = await trx
      .deleteFrom("trusted_keys")
      .where("tenant_id", "=", tenantId)
      .where("name", "=", params.name)
      .returning("fingerprint")
      .executeTakeFirst();
    if (row === undefined) throw new ForgeError("NOT_FOUND", `there is no trusted key ${params.name}`);
    await changeNodesOf(trx, tenantId);
    await appendEvents(trx, control.signer, [
      {
        tenant: tenantId,
        kind: "trust.removed",
        actor: caller.actor,
        outcome: "success",
        subject: `key/${params.name}`,
        details: { fingerprint: row.fingerprint },
      },
    ]);
  });
  return { ok: true };
};

/** Nodes verify images themselves: those with cells of the tenant must know its keys as they are now. */
async function changeNodesOf(trx: Trx, tenantId: string): Promise<void> {
  const nodes = await trx
    .selectFrom("cells")
    .select("node_id")
    .distinct()
    .where("tenant_id", "=", tenantId)
    .where("desired", "=", "running")
    .execute();
  await changeNodes(
    trx,
    nodes.map((row) => row.node_id ?? ""),
  );
}
