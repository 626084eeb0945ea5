import { z } from "zod";
import { newId } from "../base/ids.ts";

interface KindEntry {
  /** One sentence: what a reader may conclude when this kind is in the log. */
  readonly meaning: string;
  /** What `details` looks like; never a secret, never a tenant's bytes. */
  readonly details: Readonly<Record<string, unknown>>;
}

/**
 * Every kind of event there is. A kind is stable: auditors' queries match on it, so one is added, never renamed.
 * What was attempted and refused is the same kind with outcome `denied`, unless refusal has a kind of its own.
 */
export const eventKinds = {
  "platform.started": { meaning: "The control plane started and accepts work.", details: { version: "0.1.0" } },
  "platform.stopped": { meaning: "The control plane was asked to stop and did.", details: {} },
  "tenant.created": { meaning: "A tenant came into being.", details: { name: "clinic" } },

  "auth.denied": {
    meaning: "A request was refused because its token is absent, unknown, revoked or expired.",
    details: { reason: "expired", route: "listServices" },
  },
  "authz.denied": {
    meaning: "A valid token was refused because its role does not allow the operation.",
    details: { role: "auditor", route: "applyService" },
  },
  "token.created": { meaning: "An API token was made.", details: { role: "developer", expiresAt: null } },
  "token.revoked": { meaning: "An API token was revoked and is refused from now on.", details: { role: "developer" } },

  "trust.added": { meaning: "The tenant trusts one more key for image signatures.", details: { fingerprint: "9f86d081884c7d65" } },
  "trust.removed": { meaning: "The tenant no longer trusts a key for image signatures.", details: { fingerprint: "9f86d081884c7d65" } },
  "image.admitted": {
    meaning: "An image's signature was verified against the tenant's trusted keys.",
    details: { digest: "sha256:2c26b46b68ffc68f", reference: "web:1", signedBy: "release", sizeBytes: 67673444 },
  },
  "image.refused": {
    meaning: "An image was refused before anything of it was unpacked.",
    details: { digest: "sha256:2c26b46b68ffc68f", reference: "web:1", code: "IMAGE_UNSIGNED" },
  },

  "service.applied": {
    meaning: "A service was created or got a new revision.",
    details: { revision: 2, imageDigest: "sha256:2c26b46b68ffc68f", replicas: 3 },
  },
  "service.refused": {
    meaning: "A service could not be applied: its image, its node's room or a port was refused.",
    details: { code: "NO_ROOM" },
  },
  "service.started": { meaning: "A stopped service was asked to run again.", details: { revision: 2 } },
  "service.stopped": { meaning: "A service was asked to stop; its definition stays.", details: { revision: 2 } },
  "service.removed": { meaning: "A service was removed together with its definition.", details: { revision: 2 } },

  "node.joined": {
    meaning: "A node was admitted to the region and got its certificate.",
    details: { jurisdiction: "de", profile: "development", vmm: "qemu" },
  },
  "node.refused": {
    meaning: "A machine that asked to join, or a node's request, was refused.",
    details: { reason: "join token used twice" },
  },
  "node.started": { meaning: "A node's agent started and took over the cells it found.", details: { cells: 3 } },
  "node.spool-recovered": {
    meaning: "After a crash, a half-written end that nobody had been promised was cut from the node's spool.",
    details: { segment: "0000000000000001.jsonl", cutBytes: 211 },
  },

  "cell.placed": {
    meaning: "A cell was given to a node, with room reserved for it.",
    details: { service: "web", revision: 2, node: "node-1" },
  },
  "cell.assigned": {
    meaning: "A cell, with its address, became part of a node's desired state.",
    details: { service: "web", address: "2001:db8::1" },
  },
  "cell.prepared": {
    meaning: "The node verified the image again and has its root file system ready.",
    details: { imageDigest: "sha256:2c26b46b68ffc68f", rootHash: "fcde2b2edba56bf4" },
  },
  "cell.attached": {
    meaning: "The cell's interface and its policy are in force; the VM does not exist yet.",
    details: { address: "2001:db8::1", allow: 1 },
  },
  "cell.started": {
    meaning: "The cell's VM was started with exactly the boot that the measurement names.",
    details: { measurement: "sha256:fcde2b2edba56bf4", vmm: "qemu", emulated: true },
  },
  "cell.ready": { meaning: "The cell's health check succeeded for the first time since its start.", details: { afterMs: 2310 } },
  "cell.unhealthy": { meaning: "The cell's health check failed as often in a row as its service allows.", details: { failures: 3 } },
  "cell.reattached": {
    meaning: "An agent that restarted found this cell running and took it over untouched.",
    details: { measurement: "sha256:fcde2b2edba56bf4" },
  },
  "cell.exited": { meaning: "The cell's program ended without having been asked to.", details: { exitStatus: 1 } },
  "cell.restarting": {
    meaning: "The cell will be started again after a pause.",
    details: { restarts: 2, delayMs: 4000, reason: "the entrypoint exited with status 1" },
  },
  "cell.stopped": {
    meaning: "The cell was stopped as desired and nothing of it is left running.",
    details: { exitStatus: 0, graceful: true },
  },
  "cell.failed": {
    meaning: "The cell failed and its restart policy lets it rest.",
    details: { code: "GUEST_NOT_READY", reason: "no answer on port 80 within 60 s" },
  },
  "cell.refused": {
    meaning: "The node refused to run a cell: signature, integrity, policy or the guest's own check of its root failed.",
    details: { code: "IMAGE_TAMPERED" },
  },
  "cell.removed": { meaning: "The region forgot a cell; its address and its room are free.", details: { service: "web" } },

  "session.exec": { meaning: "A person ran a program inside a cell.", details: { argv0: "sh", tty: true } },
  "session.logs": { meaning: "A person read a service's logs.", details: { follow: true } },
  "audit.verified": {
    meaning: "Somebody had the whole chain checked; the outcome says whether it held.",
    details: { entries: 120, head: "fcde2b2edba56bf4" },
  },
} as const satisfies Record<string, KindEntry>;

export type EventKind = keyof typeof eventKinds;

const kindNames = Object.keys(eventKinds) as [EventKind, ...EventKind[]];

/** One audited fact. */
export const auditEventSchema = z.strictObject({
  id: z.string().regex(/^evt_[0-9a-z]{24}$/),
  time: z.iso.datetime(),
  /** Identifier of the tenant it belongs to; null: the platform. */
  tenant: z.string().max(64).nullable(),
  kind: z.enum(kindNames),
  /** Who did it: `token/ci`, `node/node-1`, `platform`, `anonymous`. */
  actor: z.string().min(1).max(256),
  outcome: z.enum(["success", "failure", "denied"]),
  /** What it is about: `service/web`, `cell/cell_…`, `token/ci`. */
  subject: z.string().min(1).max(512),
  details: z.record(z.string(), z.unknown()),
});
export type AuditEvent = z.infer<typeof auditEventSchema>;

/** An event as its author states it; identifier and time are added. */
export function newEvent(fact: Omit<AuditEvent, "id" | "time">, now: Date = new Date()): AuditEvent {
  return { id: newId("evt", now.getTime()), time: now.toISOString(), ...fact };
}
