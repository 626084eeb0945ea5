import { sql } from "kysely";
import { query } from "../db/database.ts";
import type { Handler } from "../handler.ts";
import { version } from "../version.ts";

export const getHealth: Handler<"getHealth"> = async ({ control }) => {
  await query(sql`select sequence from log_head where id = 1`.execute(control.db));
  return { ok: true, version };
};

export const getStatus: Handler<"getStatus"> = async ({ control, caller }) => ({
  version,
  region: control.installation.region,
  tenant: caller.tenantName,
  role: caller.role,
  tokenName: caller.tokenName,
  installationPrefix: control.installation.prefix,
});
