// oxlint-disable-next-line import/no-unassigned-import -- the X.509 library needs it in place before it loads
import "reflect-metadata";
import { createPrivateKey, createPublicKey, randomBytes, type webcrypto } from "node:crypto";
import { isIP } from "node:net";
import * as x509 from "@peculiar/x509";
import { ForgeError } from "../base/errors.ts";

/**
 * Identity in the region: one certificate authority, whose trust domain names it, and the certificates it issues to the
 * API and to nodes. A node is `spiffe://<trust domain>/node/<id>` (SPIFFE X.509-SVID). All keys are ECDSA P-256.
 */

/** The region's authority. Both texts are PEM; the key (PKCS#8) never leaves the control plane. */
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

const authorityDays = 3653;
const maxServerDays = 397;
const maxNodeDays = 30;
const dayMs = 86_400_000;
/** Certificates begin a little in the past, for machines whose clocks are behind. */
const clockSkewMs = 5 * 60_000;
const maxCsrChars = 8192;
const keyAlgorithm = { name: "ECDSA", namedCurve: "P-256", hash: "SHA-256" } as const;

/**
 * A new authority for a trust domain (a SPIFFE one: lower-case letters, digits, dots, dashes, underscores). It may sign
 * certificates only, no further authorities, and no URI outside its domain (RFC 5280 section 4.2.1.10).
 */
export async function createAuthority({ trustDomain }: { trustDomain: string }): Promise<Authority> {
  if (!/^[a-z0-9][a-z0-9._-]{0,99}$/.test(trustDomain)) {
    throw new ForgeError("INVALID_INPUT", `not a trust domain: ${JSON.stringify(trustDomain)}`);
  }
  const keys = await generateKeys();
  const certificate = await x509.X509CertificateGenerator.createSelfSigned({
    ...validity(authorityDays),
    serialNumber: newSerialNumber(),
    name: [{ O: ["Forge"] }, { CN: [`Forge authority ${trustDomain}`.slice(0, 64)] }],
    keys,
    signingAlgorithm: keyAlgorithm,
    extensions: [
      new x509.BasicConstraintsExtension(true, 0, true),
      new x509.KeyUsagesExtension(x509.KeyUsageFlags.keyCertSign | x509.KeyUsageFlags.cRLSign, true),
      new x509.SubjectAlternativeNameExtension([{ type: "url", value: `spiffe://${trustDomain}` }]),
      nameConstraints(trustDomain),
      await x509.SubjectKeyIdentifierExtension.create(keys.publicKey),
    ],
  });
  return { certificatePem: pemOf(certificate), privateKeyPem: await exportPrivateKey(keys), trustDomain };
}

/** Reads an authority back; refuses one that is none, is out of date, or whose key is another's. */
export async function loadAuthority(pem: { certificatePem: string; privateKeyPem: string }): Promise<Authority> {
  return await orRefuse("INVALID_INPUT", "the authority's certificate or key cannot be read", async () => {
    const certificate = parseCertificate(pem.certificatePem);
    const [uri] = uriNames(certificate);
    const trustDomain = /^spiffe:\/\/([a-z0-9._-]+)$/.exec(uri ?? "")?.[1];
    if (trustDomain === undefined || !isAuthority(certificate))
      throw new ForgeError("INVALID_INPUT", "the certificate is not that of a Forge authority");
    if (!isValidAt(certificate, new Date())) throw new ForgeError("INVALID_INPUT", "the authority's certificate is out of date");
    const expected = Buffer.from(certificate.publicKey.rawData);
    const actual = createPublicKey(createPrivateKey(pem.privateKeyPem)).export({ type: "spki", format: "der" });
    if (!expected.equals(actual)) throw new ForgeError("INVALID_INPUT", "the authority's key does not belong to its certificate");
    return { certificatePem: pem.certificatePem, privateKeyPem: pem.privateKeyPem, trustDomain };
  });
}

/** A certificate and key for a TLS server, by the DNS names and IP addresses it is reached by. */
export async function issueServerCertificate(
  authority: Authority,
  { names, validDays = maxServerDays }: { names: readonly string[]; validDays?: number },
): Promise<IssuedCertificate> {
  if (names.length === 0 || names.length > 64 || !names.every(isServerName)) {
    throw new ForgeError("INVALID_INPUT", "a server certificate needs 1 to 64 names, each a DNS name or an IP address");
  }
  const keys = await generateKeys();
  const certificate = await issue(authority, keys.publicKey, withinDays(validDays, maxServerDays), [
    new x509.ExtendedKeyUsageExtension([x509.ExtendedKeyUsage.serverAuth]),
    // Critical, because the subject is empty (RFC 5280 section 4.2.1.6).
    new x509.SubjectAlternativeNameExtension(
      names.map((value) => ({ type: isIP(value) === 0 ? ("dns" as const) : ("ip" as const), value })),
      true,
    ),
  ]);
  return { certificatePem: pemOf(certificate), privateKeyPem: await exportPrivateKey(keys), notAfter: certificate.notAfter };
}

/** A new key, and a request that proves its possession and claims nothing else: names are the authority's to give. */
export async function createCsr(): Promise<{ csrPem: string; privateKeyPem: string }> {
  const keys = await generateKeys();
  const request = await x509.Pkcs10CertificateRequestGenerator.create({ keys, signingAlgorithm: keyAlgorithm });
  return { csrPem: `${request.toString("pem")}\n`, privateKeyPem: await exportPrivateKey(keys) };
}

/** A node's certificate (client and server, at most 30 days) over the key of its request. INVALID_INPUT for a bad request. */
export async function issueNodeCertificate(
  authority: Authority,
  { csrPem, nodeId, validDays = maxNodeDays }: { csrPem: string; nodeId: string; validDays?: number },
): Promise<{ certificatePem: string; notAfter: Date }> {
  if (!isNodeId(nodeId)) throw new ForgeError("INVALID_INPUT", `not a node's identifier: ${JSON.stringify(nodeId)}`);
  const publicKey = await provenKey(csrPem);
  const certificate = await issue(authority, publicKey, withinDays(validDays, maxNodeDays), [
    new x509.ExtendedKeyUsageExtension([x509.ExtendedKeyUsage.clientAuth, x509.ExtendedKeyUsage.serverAuth]),
    new x509.SubjectAlternativeNameExtension([{ type: "url", value: nodeUri(authority.trustDomain, nodeId) }], true),
  ]);
  return { certificatePem: pemOf(certificate), notAfter: certificate.notAfter };
}

/** The identifier of the node whose certificate (PEM or DER) this authority issued and is valid now; UNAUTHENTICATED otherwise. */
export async function verifyNodeCertificate(
  authority: Pick<Authority, "certificatePem" | "trustDomain">,
  certificate: string | Uint8Array,
  now: Date = new Date(),
): Promise<string> {
  return await orRefuse("UNAUTHENTICATED", "the node's certificate cannot be read", async () => {
    const node = parseCertificate(certificate);
    const issuer = parseCertificate(authority.certificatePem);
    const problem = await problemOf(node, issuer, now);
    if (problem !== undefined) throw new ForgeError("UNAUTHENTICATED", `the node's certificate ${problem}`);
    const [uri, ...others] = uriNames(node);
    const prefix = nodeUri(authority.trustDomain, "");
    const nodeId = uri?.startsWith(prefix) === true ? uri.slice(prefix.length) : "";
    if (others.length > 0 || !isNodeId(nodeId))
      throw new ForgeError("UNAUTHENTICATED", "the node's certificate names no node of this region");
    return nodeId;
  });
}

async function problemOf(node: x509.X509Certificate, issuer: x509.X509Certificate, now: Date): Promise<string | undefined> {
  const isSigned = await node.verify({ publicKey: issuer.publicKey, signatureOnly: true });
  if (node.issuer !== issuer.subject || !isSigned) return "was not issued by this region";
  if (!isValidAt(node, now) || !isValidAt(issuer, now)) return "is not valid at this time";
  if (isAuthority(node)) return "is an authority's";
  const usages = node.getExtension(x509.ExtendedKeyUsageExtension)?.usages ?? [];
  return usages.includes(x509.ExtendedKeyUsage.clientAuth) ? undefined : "is not for clients";
}

/** The public key of a request whose signature proves possession of the private one and which asks for no name. */
async function provenKey(csrPem: string): Promise<x509.PublicKey> {
  if (csrPem.length > maxCsrChars) throw new ForgeError("INVALID_INPUT", `a certificate request has at most ${maxCsrChars} characters`);
  return await orRefuse("INVALID_INPUT", "the certificate request cannot be read", async () => {
    const request = new x509.Pkcs10CertificateRequest(csrPem);
    const { name, namedCurve } = request.publicKey.algorithm as { name: string; namedCurve?: string };
    if (name !== "ECDSA" || namedCurve !== "P-256")
      throw new ForgeError("INVALID_INPUT", "the certificate request's key is not ECDSA P-256");
    const isModest = request.subject === "" && request.attributes.length === 0;
    if (!isModest) throw new ForgeError("INVALID_INPUT", "a certificate request must not ask for names or extensions");
    if (!(await request.verify())) throw new ForgeError("INVALID_INPUT", "the certificate request's signature is not that of its key");
    return request.publicKey;
  });
}

/** Whatever the parser throws, at whatever depth (it reads lazily), is a refusal of the input and no defect. */
async function orRefuse<T>(code: "INVALID_INPUT" | "UNAUTHENTICATED", message: string, body: () => Promise<T>): Promise<T> {
  try {
    return await body();
  } catch (error) {
    throw error instanceof ForgeError ? error : new ForgeError(code, message, { cause: error });
  }
}

async function issue(
  authority: Authority,
  publicKey: webcrypto.CryptoKey | x509.PublicKey,
  validDays: number,
  extensions: readonly x509.Extension[],
): Promise<x509.X509Certificate> {
  const issuer = new x509.X509Certificate(authority.certificatePem);
  const { notBefore, notAfter } = validity(validDays);
  return await x509.X509CertificateGenerator.create({
    serialNumber: newSerialNumber(),
    issuer: issuer.subjectName,
    notBefore,
    notAfter: notAfter < issuer.notAfter ? notAfter : issuer.notAfter,
    publicKey,
    signingKey: await importPrivateKey(authority.privateKeyPem),
    signingAlgorithm: keyAlgorithm,
    extensions: [
      new x509.BasicConstraintsExtension(false, undefined, true),
      new x509.KeyUsagesExtension(x509.KeyUsageFlags.digitalSignature, true),
      ...extensions,
      await x509.AuthorityKeyIdentifierExtension.create(issuer.publicKey),
      await x509.SubjectKeyIdentifierExtension.create(publicKey),
    ],
  });
}

function nodeUri(trustDomain: string, nodeId: string): string {
  return `spiffe://${trustDomain}/node/${nodeId}`;
}

/** NameConstraints ::= { permittedSubtrees { uniformResourceIdentifier host } }; short enough for one-byte lengths. */
function nameConstraints(host: string): x509.Extension {
  const element = (tag: number, content: Buffer): Buffer => Buffer.concat([Buffer.from([tag, content.length]), content]);
  const permitted = element(0xa0, element(0x30, element(0x86, Buffer.from(host, "ascii"))));
  return new x509.Extension("2.5.29.30", true, Uint8Array.from(element(0x30, permitted)));
}

function parseCertificate(certificate: string | Uint8Array): x509.X509Certificate {
  return new x509.X509Certificate(typeof certificate === "string" ? certificate : Uint8Array.from(certificate));
}

function isNodeId(text: string): boolean {
  return /^[A-Za-z0-9_-]{1,64}$/.test(text);
}

function isAuthority(certificate: x509.X509Certificate): boolean {
  return certificate.getExtension(x509.BasicConstraintsExtension)?.ca === true;
}

function isValidAt(certificate: x509.X509Certificate, time: Date): boolean {
  return certificate.notBefore <= time && time <= certificate.notAfter;
}

function uriNames(certificate: x509.X509Certificate): string[] {
  const names = certificate.getExtension(x509.SubjectAlternativeNameExtension)?.names.items ?? [];
  return names.filter((name) => name.type === "url").map((name) => name.value);
}

function isServerName(name: string): boolean {
  const label = "[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?";
  return isIP(name) !== 0 || (name.length <= 253 && new RegExp(`^${label}(\\.${label})*$`).test(name));
}

function validity(days: number): { notBefore: Date; notAfter: Date } {
  const nowMs = Date.now();
  return { notBefore: new Date(nowMs - clockSkewMs), notAfter: new Date(nowMs + days * dayMs) };
}

function withinDays(days: number, most: number): number {
  if (!(days > 0 && days <= most))
    throw new ForgeError("INVALID_INPUT", `a certificate of this kind is valid for at most ${most} days, not ${days}`);
  return days;
}

/** 127 random bits: positive, and more than the 64 that the CA/Browser Forum's rules ask for. */
function newSerialNumber(): string {
  const bytes = randomBytes(16);
  bytes[0] = ((bytes[0] ?? 0) & 0x7f) | 0x40;
  return bytes.toString("hex");
}

async function generateKeys(): Promise<webcrypto.CryptoKeyPair> {
  return await crypto.subtle.generateKey(keyAlgorithm, true, ["sign", "verify"]);
}

async function exportPrivateKey(keys: webcrypto.CryptoKeyPair): Promise<string> {
  const der = await crypto.subtle.exportKey("pkcs8", keys.privateKey);
  return createPrivateKey({ key: Buffer.from(der), format: "der", type: "pkcs8" }).export({ type: "pkcs8", format: "pem" });
}

async function importPrivateKey(pem: string): Promise<webcrypto.CryptoKey> {
  const der = createPrivateKey(pem).export({ type: "pkcs8", format: "der" });
  return await crypto.subtle.importKey("pkcs8", Uint8Array.from(der), keyAlgorithm, false, ["sign"]);
}

function pemOf(certificate: x509.X509Certificate): string {
  return `${certificate.toString("pem")}\n`;
}
