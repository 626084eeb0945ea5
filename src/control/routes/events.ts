import { appendEvents, readEvents, verifyLog } from "../audit-log.ts";
import type { Control } from "../context.ts";
import { transact } from "../db/database.ts";
import type { Handler } from "../handler.ts";

export const listEvents: Handler<"listEvents"> = async ({ control, caller, query, signal }) =>
  readEvents(control, { tenantId: caller.tenantId, service: query.service, ...query }, signal);

export const verifyAudit: Handler<"verifyAudit"> = async ({ control, caller }) => {
  const report = await verifyOnce(control);
  const fact = {
    kind: "audit.verified" as const,
    actor: caller.actor,
    outcome: report.ok ? ("success" as const) : ("failure" as const),
    subject: "log/region",
  };
  const details = { entries: report.entries, head: report.head.hash, firstBad: report.firstBad };
  await transact(control.db, (trx) => appendEvents(trx, control.signer, [{ tenant: caller.tenantId, ...fact, details }]));
  return {
    ok: report.ok,
    entries: report.entries,
    head: report.head.hash,
    publicKeyPem: control.signer.publicKeyPem,
    firstBad: report.firstBad,
  };
};

const running = new WeakMap<Control, ReturnType<typeof verifyLog>>();

/** Reading the whole log is dear: those who ask while it is being read share the answer. */
function verifyOnce(control: Control): ReturnType<typeof verifyLog> {
  const begun = running.get(control) ?? verifyLog(control.db, control.signer.publicKeyPem).finally(() => running.delete(control));
  running.set(control, begun);
  return begun;
}
