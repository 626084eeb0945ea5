/** ForgeAudit's door: events, the chain they form, and a node's spool. The region's log itself is kept by the control plane's database. */
export { canonicalJson } from "./canonical.ts";
export {
  type ChainEntry,
  chainEntrySchema,
  type ChainProblem,
  type ChainReport,
  genesis,
  type Head,
  linkEntry,
  verifyChain,
} from "./chain.ts";
export { type AuditEvent, auditEventSchema, type EventKind, eventKinds, newEvent } from "./event.ts";
export { fileSigner, type Signer } from "./signer.ts";
export { Spool, type SpoolOptions } from "./spool.ts";
