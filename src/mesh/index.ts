export {
  cellAddress,
  formatAddress,
  gatewayAddress,
  gatewayMac,
  guestMac,
  linkMtu,
  newCellIdentifier,
  newInstallationPrefix,
  parseAddress,
} from "./address.ts";
export { attach, detach, listAttachments, readCounters, recover, updatePolicy } from "./attach.ts";
export type { Attachment, AttachOptions } from "./attach.ts";
export {
  createAuthority,
  createCsr,
  issueNodeCertificate,
  issueServerCertificate,
  loadAuthority,
  verifyNodeCertificate,
} from "./identity.ts";
export type { Authority, IssuedCertificate } from "./identity.ts";
export type { CellCounters, Counter, DropReason } from "./policy.ts";
export { checkPublishable, listPublished, publish, unpublish } from "./publish.ts";
export type { Published, PublishOptions } from "./publish.ts";
