import type { Plan } from "../../api/resources.ts";
import { ForgeError } from "../../base/errors.ts";
import { appendDenial, appendEvents } from "../audit-log.ts";
import { transact, type Trx } from "../db/database.ts";
import { type Handler, type Request, tenantOf } from "../handler.ts";
import {
  type ApplyRequest,
  applyService as apply,
  removeService as remove,
  type ServiceRow,
  startService as start,
  stopService as stop,
} from "../services.ts";
import * as views from "../views.ts";

export const listServices: Handler<"listServices"> = async ({ control, caller }) => ({
  items: await views.listServices(control.db, caller.tenantId),
});

export const getService: Handler<"getService"> = async ({ control, caller, params }) => {
  const [service] = await views.listServices(control.db, tenantOf(caller), params.name);
  if (service === undefined) throw new ForgeError("NOT_FOUND", `there is no service ${params.name}`);
  return service;
};

export const applyService: Handler<"applyService"> = async ({ control, caller, body }) => {
  const tenantId = tenantOf(caller);
  const work = async (trx: Trx): Promise<Plan> => {
    const plan = await apply(trx, control, tenantId, body);
    if (!body.dryRun && plan.action !== "unchanged") {
      const details = { revision: plan.revision, imageDigest: body.imageDigest, replicas: body.spec.replicas, action: plan.action };
      await appendEvents(trx, control.signer, [
        { tenant: tenantId, kind: "service.applied", actor: caller.actor, outcome: "success", subject: `service/${body.name}`, details },
      ]);
    }
    return plan;
  };
  const plan = await transact(control.db, work).catch((error: unknown) => refuse({ control, caller }, body.name, error, body));
  const [service] = await views.listServices(control.db, tenantId, body.name);
  return { plan, service: service ?? null };
};

export const stopService: Handler<"stopService"> = (request) => change(request, "service.stopped", stop);
export const startService: Handler<"startService"> = (request) => change(request, "service.started", start);
export const removeService: Handler<"removeService"> = (request) => change(request, "service.removed", remove);

async function change(
  { control, caller, params }: Request<"stopService"> | Request<"startService"> | Request<"removeService">,
  kind: "service.stopped" | "service.started" | "service.removed",
  write: typeof stop,
): Promise<{ ok: true }> {
  const tenantId = tenantOf(caller);
  const work = async (trx: Trx): Promise<void> => {
    const service: ServiceRow = await write(trx, control, tenantId, params.name);
    await appendEvents(trx, control.signer, [
      {
        tenant: tenantId,
        kind,
        actor: caller.actor,
        outcome: "success",
        subject: `service/${service.name}`,
        details: { revision: service.revision },
      },
    ]);
  };
  await transact(control.db, work).catch((error: unknown) => refuse({ control, caller }, params.name, error));
  return { ok: true };
}

/** An admission that says no is in the log before the caller hears of it. */
async function refuse(
  { control, caller }: Pick<Request<"applyService">, "control" | "caller">,
  name: string,
  error: unknown,
  asked?: ApplyRequest,
): Promise<never> {
  if (error instanceof ForgeError && (error.code.startsWith("IMAGE_") || error.code === "NO_ROOM" || error.code === "PORT_TAKEN")) {
    const image = asked === undefined ? {} : { digest: asked.imageDigest, reference: asked.imageReference };
    const details = { code: error.code, reason: error.message.slice(0, 2000), ...image };
    await appendDenial(control, {
      tenant: caller.tenantId,
      kind: "service.refused",
      actor: caller.actor,
      subject: `service/${name}`,
      details,
    });
  }
  throw error;
}
