import type { ImageSignature } from "../../api/resources.ts";
import { ForgeError } from "../../base/errors.ts";
import { parseImageReference, pull, verifySignatures } from "../../isocell/image/index.ts";
import { appendDenial, appendEvents } from "../audit-log.ts";
import type { Caller } from "../authenticate.ts";
import type { Control } from "../context.ts";
import { query, transact } from "../db/database.ts";
import { type Handler, tenantOf } from "../handler.ts";
import { readTrustedKeys } from "../services.ts";
import { imageView } from "../views.ts";

export const putBlob: Handler<"putBlob"> = ({ control, caller, params, body }) =>
  orRefuse(control, caller, { digest: params.digest, reference: `blob ${params.digest}` }, async () => {
    await control.blobs.put(tenantOf(caller), params.digest, body);
    return { ok: true };
  });

export const findBlobs: Handler<"findBlobs"> = async ({ control, caller, body }) => ({
  missing: await control.blobs.missing(tenantOf(caller), body.digests),
});

export const addImage: Handler<"addImage"> = ({ control, caller, body }) =>
  orRefuse(control, caller, body, async () => {
    await verify(control, caller, body.digest, body.signatures);
    return admit(control, caller, body);
  });

export const pullImage: Handler<"pullImage"> = ({ control, caller, body }) =>
  orRefuse(control, caller, body, async () => {
    const reference = parseImageReference(body.reference, "/");
    if (reference.kind !== "registry")
      throw new ForgeError("INVALID_INPUT", "only a registry's reference can be pulled by the control plane; push folders and archives");
    const image = await control.blobs.pull(tenantOf(caller), () =>
      pull(reference, control.images, {
        verify: async (resolved) => void (await verify(control, caller, resolved.digest, resolved.signatures)),
        insecureLoopback: true,
      }),
    );
    return admit(control, caller, { digest: image.digest, reference: body.reference, signatures: image.signatures });
  });

export const listImages: Handler<"listImages"> = async ({ control, caller }) => {
  const rows = await query(
    control.db.selectFrom("images").selectAll().where("tenant_id", "=", tenantOf(caller)).orderBy("created_at").execute(),
  );
  return { items: rows.map(imageView) };
};

interface Offer {
  readonly digest?: string;
  readonly reference: string;
}

async function verify(control: Control, caller: Caller, digest: string, signatures: readonly ImageSignature[]): Promise<string> {
  return verifySignatures(digest, signatures, await query(readTrustedKeys(control.db, tenantOf(caller)))).keyName;
}

/** Records the image as this tenant's. The keys are read again within the transaction: one may just have been removed. */
async function admit(
  control: Control,
  caller: Caller,
  offer: { digest: string; reference: string; signatures: readonly ImageSignature[] },
): ReturnType<Handler<"addImage">> {
  const tenantId = tenantOf(caller);
  const { blobs, sizeBytes } = await control.blobs.read(tenantId, offer.digest);
  return transact(control.db, async (trx) => {
    const signedBy = verifySignatures(offer.digest, offer.signatures, await readTrustedKeys(trx, tenantId)).keyName;
    const values = {
      reference: offer.reference,
      size_bytes: sizeBytes,
      signed_by: signedBy,
      signatures: JSON.stringify(offer.signatures),
      blobs: JSON.stringify(blobs),
    };
    const row = await trx
      .insertInto("images")
      .values({ tenant_id: tenantId, digest: offer.digest, ...values })
      .onConflict((on) => on.columns(["tenant_id", "digest"]).doUpdateSet(values))
      .returningAll()
      .executeTakeFirstOrThrow();
    await appendEvents(trx, control.signer, [
      {
        tenant: tenantId,
        kind: "image.admitted",
        actor: caller.actor,
        outcome: "success",
        subject: `image/${offer.digest}`,
        details: { digest: offer.digest, reference: offer.reference, signedBy, sizeBytes },
      },
    ]);
    return imageView(row);
  });
}

/** A refused image is in the log, with digest and reference, before the caller hears of it. */
async function orRefuse<T>(control: Control, caller: Caller, offer: Offer, work: () => Promise<T>): Promise<T> {
  try {
    return await work();
  } catch (error) {
    if (error instanceof ForgeError && error.code.startsWith("IMAGE_") && error.code !== "IMAGE_NOT_FOUND") {
      const signed = error.details?.["digest"];
      const digest = offer.digest ?? (typeof signed === "string" ? signed : null);
      const details = { digest, reference: offer.reference, code: error.code, reason: error.message.slice(0, 2000) };
      await appendDenial(control, {
        tenant: caller.tenantId,
        kind: "image.refused",
        actor: caller.actor,
        subject: `image/${digest ?? offer.reference}`.slice(0, 512),
        details,
      });
    }
    throw error;
  }
}
