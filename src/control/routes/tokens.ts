import { ForgeError } from "../../base/errors.ts";
import { appendDenial, appendEvents } from "../audit-log.ts";
import { newToken } from "../authenticate.ts";
import { query, transact } from "../db/database.ts";
import { type Handler, tenantOf } from "../handler.ts";
import { tokenView } from "../views.ts";

export const listTokens: Handler<"listTokens"> = async ({ control, caller }) => {
  const rows = await query(
    control.db.selectFrom("tokens").selectAll().where("tenant_id", "=", tenantOf(caller)).orderBy("created_at").execute(),
  );
  return { items: rows.map(tokenView) };
};

export const createToken: Handler<"createToken"> = async ({ control, caller, body }) => {
  const tenantId = tenantOf(caller);
  const subject = `token/${body.name}`;
  if (body.role === "operator") {
    await appendDenial(control, { tenant: tenantId, kind: "token.created", actor: caller.actor, subject, details: { role: body.role } });
    throw new ForgeError("FORBIDDEN", "an operator belongs to the platform, not to a tenant");
  }
  const { id, text, secretHash } = newToken();
  const expiresAt = body.ttlSeconds === undefined ? null : new Date(Date.now() + body.ttlSeconds * 1000);
  return transact(control.db, async (trx) => {
    const row = await trx
      .insertInto("tokens")
      .values({ id, tenant_id: tenantId, name: body.name, role: body.role, secret_hash: secretHash, expires_at: expiresAt })
      .onConflict((on) => on.doNothing())
      .returningAll()
      .executeTakeFirst();
    if (row === undefined) throw new ForgeError("CONFLICT", `a token named ${body.name} exists already`);
    const details = { id, role: body.role, expiresAt: expiresAt?.toISOString() ?? null };
    await appendEvents(trx, control.signer, [
      { tenant: tenantId, kind: "token.created", actor: caller.actor, outcome: "success", subject, details },
    ]);
    return { token: tokenView(row), secret: text };
  });
};

export const revokeToken: Handler<"revokeToken"> = async ({ control, caller, params }) => {
  const tenantId = tenantOf(caller);
  await transact(control.db, async (trx) => {
    const row = await trx
      .deleteFrom("tokens")
      .where("tenant_id", "=", tenantId)
      .where("name", "=", params.name)
      .returning(["id", "role"])
      .executeTakeFirst();
    if (row === undefined) throw new ForgeError("NOT_FOUND", `there is no token ${params.name}`);
    await appendEvents(trx, control.signer, [
      {
        tenant: tenantId,
        kind: "token.revoked",
        actor: caller.actor,
        outcome: "success",
        subject: `token/${params.name}`,
        details: { id: row.id, role: row.role },
      },
    ]);
  });
  return { ok: true };
};
