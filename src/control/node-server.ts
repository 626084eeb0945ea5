import type { IncomingMessage } from "node:http";
import type { TLSSocket } from "node:tls";
import type { FastifyInstance, FastifyReply, FastifyRequest } from "fastify";
import { sql } from "kysely";
import type { WebSocketServer } from "ws";
import { z } from "zod";
import { nodeRoutes } from "../api/node.ts";
import { ForgeError } from "../base/errors.ts";
import { verifyNodeCertificate } from "../mesh/index.ts";
import { appendDenial } from "./audit-log.ts";
import type { Control } from "./context.ts";
import { query } from "./db/database.ts";
import { errorFromFastify, sendRawError } from "./http-errors.ts";
import { fingerprintOf } from "./join.ts";
import { awaitDesired, findNode, type NodeRow, takeEvents, takeReport, updateFacts } from "./node-state.ts";
import { newServer, newSocketServer, type TlsIdentity, type Upgrade } from "./server.ts";

/** The nodes' listener: mutual TLS under the region's CA, so that only a node that joined gets as far as a route. */
export async function createNodeServer(control: Control, identity: TlsIdentity): Promise<FastifyInstance> {
  const ca = control.authority.certificatePem;
  const app = newServer({
    key: identity.privateKeyPem,
    cert: identity.certificatePem,
    minVersion: "TLSv1.3",
    ca,
    requestCert: true,
    rejectUnauthorized: true,
  });
  const nodes = new WeakMap<FastifyRequest, NodeRow>();
  app.addHook("onRequest", async (request) => void nodes.set(request, await identify(control, request.raw)));
  const nodeOf = (request: FastifyRequest): NodeRow => {
    const node = nodes.get(request);
    if (node === undefined) throw new ForgeError("UNAUTHENTICATED", "this request is no node's");
    return node;
  };

  app.route({
    ...at(nodeRoutes.hello),
    handler: async (request) => {
      const node = nodeOf(request);
      await updateFacts(control, node, (request.body as z.output<typeof nodeRoutes.hello.body>).facts);
      return { installationPrefix: control.installation.prefix, spoolSequence: node.spool_sequence };
    },
  });
  app.route({
    ...at(nodeRoutes.desired),
    handler: async (request, reply) => {
      const { after, waitMs } = request.query as z.output<typeof nodeRoutes.desired.query>;
      const gone = new AbortController();
      reply.raw.on("close", () => gone.abort());
      return awaitDesired(control, nodeOf(request), after, waitMs, gone.signal);
    },
  });
  app.route({
    ...at({ ...nodeRoutes.report, body: reportEnvelopeSchema }),
    handler: async (request) => {
      const { cells, whole } = request.body as z.output<typeof reportEnvelopeSchema>;
      await takeReport(control, nodeOf(request), cells, whole);
      return { ok: true };
    },
  });
  app.route({
    ...at(nodeRoutes.events),
    handler: async (request) => {
      const { entries } = request.body as z.output<typeof nodeRoutes.events.body>;
      return { acceptedThrough: await takeEvents(control, nodeOf(request).id, entries) };
    },
  });
  app.route({
    method: nodeRoutes.blob.method,
    url: nodeRoutes.blob.path,
    schema: { params: nodeRoutes.blob.params },
    handler: async (request, reply) => sendBlob(control, nodeOf(request), (request.params as { digest: string }).digest, reply),
  });
  const sockets = newSocketServer(app);
  app.server.on("upgrade", (request, socket, head) => void upgrade(control, sockets, { request, socket, head }));
  await app.ready();
  return app;
}

/** The cells are read one by one: what is wrong with one must not keep the others' reports away. */
const reportEnvelopeSchema = nodeRoutes.report.body.extend({ cells: z.array(z.unknown()).max(4096) });

/** 1000 events of 64 KiB. */
const maxBodyBytes = 64 * 1024 * 1024;

interface JsonNodeRoute {
  readonly method: "GET" | "POST";
  readonly path: string;
  readonly body?: z.ZodType;
  readonly query?: z.ZodType;
  readonly response: z.ZodType;
}

function at(route: JsonNodeRoute): { method: "GET" | "POST"; url: string; schema: Record<string, unknown>; bodyLimit: number } {
  const parts = {
    ...(route.body === undefined ? {} : { body: route.body }),
    ...(route.query === undefined ? {} : { querystring: route.query }),
  };
  const schema = { ...parts, response: { 200: route.response } };
  return { method: route.method, url: route.path, schema, bodyLimit: maxBodyBytes };
}

/** Which node is at the other end. The certificate must be the one its last join gave it. */
async function identify(control: Control, request: IncomingMessage): Promise<NodeRow> {
  const socket = request.socket as TLSSocket;
  const known = identities.get(socket);
  const certificate = known === undefined ? socket.getPeerCertificate().raw : undefined;
  const identity = known ?? {
    nodeId: await verifyNodeCertificate(control.authority, certificate ?? new Uint8Array()),
    fingerprint: fingerprintOf(certificate ?? new Uint8Array()),
  };
  identities.set(socket, identity);
  const node = await findNode(control, identity.nodeId);
  if (node.certificate_fingerprint === identity.fingerprint) return node;
  const details = { reason: "the certificate was replaced by a later join" };
  await appendDenial(control, { tenant: null, kind: "node.refused", actor: `node/${node.name}`, subject: `node/${node.name}`, details });
  throw new ForgeError("UNAUTHENTICATED", `the certificate of ${node.name} was replaced by a later join`);
}

/** A certificate is checked once a connection: TLS does not change it on the way. */
const identities = new WeakMap<TLSSocket, { nodeId: string; fingerprint: string }>();

/** Only blobs of images whose cells this node is to run. */
async function sendBlob(control: Control, node: NodeRow, digest: string, reply: FastifyReply): Promise<FastifyReply> {
  const image = await query(
    control.db
      .selectFrom("images as image")
      .innerJoin("cells as cell", (on) =>
        on.onRef("cell.tenant_id", "=", "image.tenant_id").onRef("cell.image_digest", "=", "image.digest"),
      )
      .select("image.digest")
      .where("cell.node_id", "=", node.id)
      .where("cell.desired", "=", "running")
      .where(sql<boolean>`image.blobs @> ${JSON.stringify([digest])}::jsonb`)
      .limit(1)
      .executeTakeFirst(),
  );
  if (image === undefined) throw new ForgeError("NOT_FOUND", `no cell of ${node.name} needs the blob ${digest}`);
  const sizeBytes = await control.images.blobSize(digest);
  const blob = await control.images.openBlob(digest);
  return reply
    .type("application/octet-stream")
    .header("content-length", String(sizeBytes ?? 0))
    .send(blob);
}

/** The agent's end of a session somebody waits for. */
async function upgrade(control: Control, sockets: WebSocketServer, { request, socket, head }: Upgrade): Promise<void> {
  socket.on("error", () => socket.destroy());
  try {
    const node = await identify(control, request);
    const id = /^\/node\/v1\/sessions\/([A-Za-z0-9_]{1,64})$/.exec(request.url ?? "")?.[1];
    if (id === undefined || !control.sessions.awaits(id, node.id)) throw new ForgeError("NOT_FOUND", "nobody waits for this session");
    sockets.handleUpgrade(request, socket, head, (agent) => {
      agent.on("error", () => undefined); // "close" follows
      if (!control.sessions.deliver(id, node.id, agent)) agent.close(4404, "nobody waits for this session");
    });
  } catch (error) {
    sendRawError(socket, errorFromFastify(error));
  }
}
