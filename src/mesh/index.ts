export { cellAddress, formatAddress, gatewayAddress, gatewayMac, guestMac, linkMtu, newCellIdentifier, newInstallationPrefix, parseAddress } from "./address.ts";
export { attach, detach, listAttachments, recover } from "./attach.ts";
export type { Attachment, AttachOptions } from "./attach.ts";
export { createAuthority, createCsr, issueNodeCertificate, issueServerCertificate, loadAuthority, verifyNodeCertificate } from "./identity.ts";
export type { Authority, IssuedCertificate } from "./identity.ts";
export { readCounters, updatePolicy } from "./policy.ts";
export type { CellCounters } from "./policy.ts";
export { listPublished, publish, unpublish } from "./publish.ts";
export type { Published, PublishOptions } from "./publish.ts";
