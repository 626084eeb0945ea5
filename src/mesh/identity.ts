import { ForgeError } from "../base/errors.ts";

/** The region's certificate authority. Both texts are PEM; the key is PKCS#8 and never leaves the control plane. */
export interface Authority {
  readonly certificatePem: string;
  readonly privateKeyPem: string;
  readonly trustDomain: string;
}
export interface IssuedCertificate {
  readonly certificatePem: string;
  readonly privateKeyPem: string;
  readonly notAfter: Date;
}

export async function createAuthority(_options: { trustDomain: string }): Promise<Authority> {
  throw new ForgeError("UNSUPPORTED", "not yet");
}
/** Checks that certificate and key belong together and that it is an authority. */
export async function loadAuthority(_pem: { certificatePem: string; privateKeyPem: string }): Promise<Authority> {
  throw new ForgeError("UNSUPPORTED", "not yet");
}
/** Names: DNS names and IP addresses the API is reached by. */
export async function issueServerCertificate(_authority: Authority, _options: { names: readonly string[]; validDays?: number }): Promise<IssuedCertificate> {
  throw new ForgeError("UNSUPPORTED", "not yet");
}
/** A P-256 key and a request that proves its possession; the request carries no names. */
export async function createCsr(): Promise<{ csrPem: string; privateKeyPem: string }> {
  throw new ForgeError("UNSUPPORTED", "not yet");
}
export async function issueNodeCertificate(
  _authority: Authority,
  _options: { csrPem: string; nodeId: string; validDays?: number },
): Promise<{ certificatePem: string; notAfter: Date }> {
  throw new ForgeError("UNSUPPORTED", "not yet");
}
/** The node identifier of a certificate that this authority issued and that is valid now; UNAUTHENTICATED otherwise. */
export async function verifyNodeCertificate(
  _authority: Pick<Authority, "certificatePem" | "trustDomain">,
  _certificate: string | Uint8Array,
  _now?: Date,
): Promise<string> {
  throw new ForgeError("UNSUPPORTED", "not yet");
}
