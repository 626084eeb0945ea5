// oxlint-disable-next-line import/no-unassigned-import -- the X.509 library needs it in place before it loads
import "reflect-metadata";
import { createPrivateKey, X509Certificate } from "node:crypto";
import { once } from "node:events";
import { connect, createServer, type TLSSocket } from "node:tls";
import * as x509 from "@peculiar/x509";
import fc from "fast-check";
import { beforeAll, describe, expect, test } from "vitest";
import {
  type Authority,
  createAuthority,
  createCsr,
  issueNodeCertificate,
  issueServerCertificate,
  loadAuthority,
  verifyNodeCertificate,
} from "./identity.ts";

const trustDomain = "region.test";
const nodeId = "node_0123456789abcdefghjkmnpq";
const algorithm = { name: "ECDSA", namedCurve: "P-256", hash: "SHA-256" };
let authority: Authority;
let stranger: Authority;

beforeAll(async () => {
  authority = await createAuthority({ trustDomain });
  stranger = await createAuthority({ trustDomain });
});

describe("the authority", () => {
  test("is read back from its PEM", async () => {
    expect(await loadAuthority(authority)).toEqual(authority);
  });

  test("is refused with another's key, or when it is none", async () => {
    await expect(loadAuthority({ ...authority, privateKeyPem: stranger.privateKeyPem })).rejects.toMatchObject({ code: "INVALID_INPUT" });
    await expect(loadAuthority(await issueServerCertificate(authority, { names: ["localhost"] }))).rejects.toMatchObject({
      code: "INVALID_INPUT",
    });
    await expect(loadAuthority({ ...authority, certificatePem: "-----BEGIN CERTIFICATE-----" })).rejects.toMatchObject({
      code: "INVALID_INPUT",
    });
    await expect(createAuthority({ trustDomain: "a/b" })).rejects.toMatchObject({ code: "INVALID_INPUT" });
  });

  test("lives ten years and may not make further authorities", () => {
    const certificate = new x509.X509Certificate(authority.certificatePem);
    expect(certificate.notAfter.getTime() - Date.now()).toBeGreaterThan(3650 * 86_400_000);
    expect(certificate.getExtension(x509.BasicConstraintsExtension)).toMatchObject({ ca: true, pathLength: 0, critical: true });
    expect(authority.privateKeyPem).toMatch(/^-----BEGIN PRIVATE KEY-----\n/);
  });
});

describe("a server's certificate", () => {
  test("is accepted by a TLS client that trusts only the authority, under its names and no other", async () => {
    const server = await issueServerCertificate(authority, { names: ["localhost", "127.0.0.1", "::1"] });
    expect(await handshake(server, undefined, "localhost")).toMatchObject({ authorized: true });
    await expect(handshake(server, undefined, "elsewhere.test")).rejects.toMatchObject({ code: "ERR_TLS_CERT_ALTNAME_INVALID" });
    const certificate = new X509Certificate(server.certificatePem);
    expect(certificate.checkIP("127.0.0.1")).toBe("127.0.0.1");
    expect(certificate.checkIP("::1")).toBe("::1");
    expect(certificate.checkPrivateKey(createPrivateKey(server.privateKeyPem))).toBe(true);
  });

  test("needs sensible names and a bounded life", async () => {
    for (const names of [[], ["a b"], ["*.test"], [""], ["x".repeat(300)]]) {
      await expect(issueServerCertificate(authority, { names })).rejects.toMatchObject({ code: "INVALID_INPUT" });
    }
    await expect(issueServerCertificate(authority, { names: ["localhost"], validDays: 400 })).rejects.toMatchObject({
      code: "INVALID_INPUT",
    });
  });
});

describe("a node's certificate", () => {
  test("carries the node's SPIFFE identity and nothing from the request", async () => {
    const { csrPem } = await createCsr();
    const { certificatePem, notAfter } = await issueNodeCertificate(authority, { csrPem, nodeId });
    const certificate = new X509Certificate(certificatePem);
    expect(certificate.subjectAltName).toBe(`URI:spiffe://${trustDomain}/node/${nodeId}`);
    expect(certificate.subject ?? "").toBe("");
    expect(certificate.ca).toBe(false);
    expect(notAfter.getTime() - Date.now()).toBeLessThanOrEqual(30 * 86_400_000);
    expect(await verifyNodeCertificate(authority, certificatePem)).toBe(nodeId);
    expect(await verifyNodeCertificate(authority, certificate.raw)).toBe(nodeId);
  });

  test("authenticates the node over mutual TLS", async () => {
    const server = await issueServerCertificate(authority, { names: ["localhost"] });
    const node = await issueNode(authority);
    const seen = await handshake(server, node, "localhost");
    expect(seen).toMatchObject({ authorized: true, clientAuthorized: true });
    expect(await verifyNodeCertificate(authority, seen.clientCertificate)).toBe(nodeId);
    expect(await handshake(server, await issueNode(stranger), "localhost")).toMatchObject({ clientAuthorized: false });
  });

  test("is refused from another authority, out of its time, for another purpose, or from another trust domain", async () => {
    const node = await issueNode(authority);
    const server = await issueServerCertificate(authority, { names: ["localhost"] });
    const elsewhere = await createAuthority({ trustDomain: "elsewhere.test" });
    const day = 86_400_000;
    const refused: Parameters<typeof verifyNodeCertificate>[] = [
      [authority, (await issueNode(stranger)).certificatePem],
      [authority, node.certificatePem, new Date(Date.now() + 31 * day)],
      [authority, node.certificatePem, new Date(Date.now() - day)],
      [authority, server.certificatePem],
      [authority, authority.certificatePem],
      [{ ...authority, trustDomain: "elsewhere.test" }, node.certificatePem],
      [authority, (await issueNode(elsewhere)).certificatePem],
      [authority, "nonsense"],
      [authority, new Uint8Array(0)],
    ];
    for (const attempt of refused) await expect(verifyNodeCertificate(...attempt)).rejects.toMatchObject({ code: "UNAUTHENTICATED" });
  });

  test("outside the trust domain fails a plain TLS verifier too, by the authority's name constraints", async () => {
    const server = await issueServerCertificate(authority, { names: ["localhost"] });
    const node = await issueNode({ ...authority, trustDomain: "elsewhere.test" });
    expect(await handshake(server, node, "localhost")).toMatchObject({ clientAuthorized: false });
  });

  test("changed in any byte proves nothing, or (in a byte no signature covers) the same as before", async () => {
    const der = new X509Certificate((await issueNode(authority)).certificatePem).raw;
    await fc.assert(
      fc.asyncProperty(fc.nat(der.length - 1), fc.integer({ min: 1, max: 255 }), async (at, mask) => {
        const changed = Buffer.from(der);
        changed[at]! ^= mask;
        const outcome = await verifyNodeCertificate(authority, changed).catch((error: unknown) => error);
        if (outcome !== nodeId) expect(outcome).toMatchObject({ code: "UNAUTHENTICATED" });
      }),
      { numRuns: 200 },
    );
  });

  test("lives at most 30 days and names a sane node", async () => {
    const { csrPem } = await createCsr();
    for (const wrong of [{ validDays: 31 }, { validDays: 0 }, { validDays: Number.NaN }, { nodeId: "a/b" }, { nodeId: "" }]) {
      await expect(issueNodeCertificate(authority, { csrPem, nodeId, ...wrong })).rejects.toMatchObject({ code: "INVALID_INPUT" });
    }
  });
});

describe("a certificate request", () => {
  test("must prove possession of its key", async () => {
    const { csrPem } = await createCsr();
    const der = Buffer.from(new x509.Pkcs10CertificateRequest(csrPem).rawData);
    der[der.length - 5]! ^= 1;
    await expectRefused(new x509.Pkcs10CertificateRequest(Uint8Array.from(der)).toString("pem"));
  });

  test("must not bring a name, an extension or an attribute", async () => {
    const keys = await crypto.subtle.generateKey(algorithm, true, ["sign", "verify"]);
    const extensions = [new x509.SubjectAlternativeNameExtension([{ type: "url", value: `spiffe://${trustDomain}/node/other` }])];
    for (const wish of [{ name: "CN=other" }, { extensions }, { attributes: [new x509.ChallengePasswordAttribute("x")] }]) {
      const request = await x509.Pkcs10CertificateRequestGenerator.create({ keys, signingAlgorithm: algorithm, ...wish });
      await expectRefused(request.toString("pem"));
    }
  });

  test("must be of a P-256 key", async () => {
    const p384 = { name: "ECDSA", namedCurve: "P-384", hash: "SHA-384" };
    const keys = await crypto.subtle.generateKey(p384, true, ["sign", "verify"]);
    const request = await x509.Pkcs10CertificateRequestGenerator.create({ keys, signingAlgorithm: p384 });
    await expectRefused(request.toString("pem"));
  });

  test("of any garbage is refused with INVALID_INPUT and nothing else", async () => {
    const original = new x509.Pkcs10CertificateRequest((await createCsr()).csrPem);
    const der = Buffer.from(original.rawData);
    const mutated = fc.tuple(fc.nat(der.length - 1), fc.integer({ min: 1, max: 255 })).map(([at, mask]) => {
      const copy = Buffer.from(der);
      copy[at]! ^= mask;
      return `-----BEGIN CERTIFICATE REQUEST-----\n${copy.toString("base64")}\n-----END CERTIFICATE REQUEST-----`;
    });
    const garbage = fc.oneof(fc.string(), fc.string({ minLength: 8193, maxLength: 9000 }));
    await fc.assert(fc.asyncProperty(garbage, expectRefused), { numRuns: 100 });
    // The name of the outer algorithm is under no signature: with it changed a request may pass, for the proven key alone.
    const refusedOrSame = async (csrPem: string): Promise<void> => {
      const issued = await issueNodeCertificate(authority, { csrPem, nodeId }).catch((error: unknown) => error);
      if (issued instanceof Error) expect(issued).toMatchObject({ code: "INVALID_INPUT" });
      else {
        const { certificatePem } = issued as { certificatePem: string };
        expect(new x509.X509Certificate(certificatePem).publicKey.toString("pem")).toBe(original.publicKey.toString("pem"));
      }
    };
    await fc.assert(fc.asyncProperty(mutated, refusedOrSame), { numRuns: 200 });
  });
});

async function expectRefused(csrPem: string): Promise<void> {
  await expect(issueNodeCertificate(authority, { csrPem, nodeId })).rejects.toMatchObject({ code: "INVALID_INPUT" });
}

interface Credentials {
  readonly certificatePem: string;
  readonly privateKeyPem: string;
}

async function issueNode(issuer: Authority): Promise<Credentials> {
  const { csrPem, privateKeyPem } = await createCsr();
  return { ...(await issueNodeCertificate(issuer, { csrPem, nodeId })), privateKeyPem };
}

/** A TLS 1.3 handshake over loopback: what both sides made of the other's certificate. */
async function handshake(server: Credentials, client: Credentials | undefined, servername: string) {
  const listener = createServer({
    key: server.privateKeyPem,
    cert: server.certificatePem,
    ca: authority.certificatePem,
    requestCert: client !== undefined,
    rejectUnauthorized: false,
    minVersion: "TLSv1.3",
  }).listen(0, "127.0.0.1");
  try {
    await once(listener, "listening");
    const address = listener.address();
    if (address === null || typeof address === "string") throw new Error("no address");
    const accepted = once(listener, "secureConnection") as Promise<[TLSSocket]>;
    const credentials = client === undefined ? {} : { key: client.privateKeyPem, cert: client.certificatePem };
    const socket = connect({ host: "127.0.0.1", port: address.port, servername, ca: authority.certificatePem, ...credentials });
    try {
      await once(socket, "secureConnect");
      const [peer] = await accepted;
      const { raw } = peer.getPeerCertificate();
      return { authorized: socket.authorized, clientAuthorized: peer.authorized, clientCertificate: raw };
    } finally {
      socket.destroy();
    }
  } finally {
    listener.close();
  }
}
