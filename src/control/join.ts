import { createHash, X509Certificate } from "node:crypto";
import type { FastifyInstance } from "fastify";
import type { z } from "zod";
import { nodeRoutes } from "../api/node.ts";
import { genesis } from "../audit/index.ts";
import { ForgeError } from "../base/errors.ts";
import { newId } from "../base/ids.ts";
import { issueNodeCertificate } from "../mesh/index.ts";
import { appendEvents } from "./audit-log.ts";
import { type Authenticator, hashSecret } from "./authenticate.ts";
import type { Control } from "./context.ts";
import { transact, type Trx } from "./db/database.ts";

type JoinRequest = z.output<typeof nodeRoutes.join.body>;

/** The one node route on the API's port: the node has no certificate yet, and a one-time token speaks for it. */
export function registerJoin(app: FastifyInstance, control: Control, authenticator: Authenticator): void {
  app.route({
    method: nodeRoutes.join.method,
    url: nodeRoutes.join.path,
    schema: { body: nodeRoutes.join.body, response: { 200: nodeRoutes.join.response } },
    handler: async (request) => {
      const body = request.body as JoinRequest;
      const { nodeId, certificatePem } = await transact(control.db, (trx) => join(trx, control, body)).catch(async (error: unknown) => {
        if (error instanceof ForgeError && error.code === "UNAUTHENTICATED") await authenticator.refuse(error.message, request.ip, "join");
        throw error;
      });
      return { nodeId, certificatePem, caPem: control.authority.certificatePem, installationPrefix: control.installation.prefix };
    },
  });
}

/** SHA-256 of a certificate's DER, hex. */
export function fingerprintOf(certificate: Uint8Array): string {
  return createHash("sha256").update(certificate).digest("hex");
}

/** Consumes the token and admits the node. The same request with the same token again, because the answer was lost, is answered again. */
async function join(trx: Trx, control: Control, request: JoinRequest): Promise<{ nodeId: string; certificatePem: string }> {
  const secretHash = hashSecret(request.joinToken);
  const token = await trx.selectFrom("join_tokens").selectAll().where("secret_hash", "=", secretHash).forUpdate().executeTakeFirst();
  const csrDigest = hashSecret(request.csrPem);
  if (token === undefined) throw new ForgeError("UNAUTHENTICATED", "the join token is not known");
  if (token.expires_at.getTime() < Date.now()) throw new ForgeError("UNAUTHENTICATED", "the join token is no longer valid");
  if (token.csr_digest !== null && !token.csr_digest.equals(csrDigest))
    throw new ForgeError("UNAUTHENTICATED", "the join token was used already");
  const nodeId = token.node_id ?? newId("node");
  const { certificatePem } = await issueNodeCertificate(control.authority, { csrPem: request.csrPem, nodeId });
  const fingerprint = fingerprintOf(new X509Certificate(certificatePem).raw);
  if (token.node_id === null) await insertNode(trx, nodeId, fingerprint, request);
  else await trx.updateTable("nodes").set({ certificate_fingerprint: fingerprint }).where("id", "=", nodeId).execute();
  await trx.updateTable("join_tokens").set({ csr_digest: csrDigest, node_id: nodeId }).where("secret_hash", "=", secretHash).execute();
  const { name, jurisdiction, site, rack, profile, vmm } = request.facts;
  const details = { id: nodeId, jurisdiction, site, rack, profile, vmm, certificate: fingerprint };
  await appendEvents(trx, control.signer, [
    { tenant: null, kind: "node.joined", actor: `node/${name}`, outcome: "success", subject: `node/${name}`, details },
  ]);
  return { nodeId, certificatePem };
}

async function insertNode(trx: Trx, id: string, fingerprint: string, { facts, spoolPublicKeyPem }: JoinRequest): Promise<void> {
  const { name, jurisdiction, site, rack, vmm, emulated, profile, vcpus, memoryMib } = facts;
  const row = await trx
    .insertInto("nodes")
    .values({
      id,
      name,
      jurisdiction,
      site,
      rack,
      vmm,
      emulated,
      profile,
      vcpus,
      memory_mib: memoryMib,
      certificate_fingerprint: fingerprint,
      spool_public_key_pem: spoolPublicKeyPem,
      spool_hash: genesis.hash,
    })
    .onConflict((on) => on.column("name").doNothing())
    .returning("id")
    .executeTakeFirst();
  if (row === undefined) throw new ForgeError("CONFLICT", `a node named ${name} has joined already`);
}
