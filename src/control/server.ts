import type { IncomingMessage } from "node:http";
import { pipeline } from "node:stream/promises";
import { Readable } from "node:stream";
import type { Duplex } from "node:stream";
import fastify, { type FastifyInstance, type FastifyReply, type FastifyRequest } from "fastify";
import { serializerCompiler, validatorCompiler } from "fastify-type-provider-zod";
import { WebSocketServer } from "ws";
import { type Route, type RouteName, routes } from "../api/routes.ts";
import { ForgeError } from "../base/errors.ts";
import { appendDenial } from "./audit-log.ts";
import { Authenticator, type Caller } from "./authenticate.ts";
import type { Control } from "./context.ts";
import { type AnyHandler, isAllowed, type Request } from "./handler.ts";
import { handlers } from "./handlers.ts";
import { errorFromFastify, requestError, sendRawError } from "./http-errors.ts";
import { registerJoin } from "./join.ts";
import { openExec } from "./routes/sessions.ts";
import { bridge, maxMessageBytes } from "./sessions.ts";

export interface TlsIdentity {
  readonly certificatePem: string;
  readonly privateKeyPem: string;
}

const maxBodyBytes = 4 * 1024 * 1024;
const maxConnections = 1024;

/** The public API: every route of the table, registered the same way, and the one node route that lives here: join. */
export async function createApiServer(control: Control, identity: TlsIdentity): Promise<FastifyInstance> {
  const app = newServer({ key: identity.privateKeyPem, cert: identity.certificatePem, minVersion: "TLSv1.3" });
  const authenticator = new Authenticator(control);
  const door = new Door(control, authenticator);
  for (const [name, route] of Object.entries(routes) as [RouteName, Route][]) registerRoute(app, control, door, name, route);
  registerJoin(app, control, authenticator);
  const sockets = newSocketServer(app);
  app.server.on("upgrade", (request, socket, head) => void upgrade(control, door, sockets, { request, socket, head }));
  await app.ready();
  return app;
}

/** Fastify reads some of its files only when a server is made: this has it read them while we still may. */
export async function loadLazyParts(): Promise<void> {
  const app = fastify();
  app.get("/", { schema: { response: { 200: { type: "null" } } } }, () => null);
  await app.ready();
  await app.close();
}

/** Fastify with the bounds and the error form that both listeners share. */
export function newServer(tls: {
  key: string;
  cert: string;
  minVersion: "TLSv1.3";
  ca?: string;
  requestCert?: boolean;
  rejectUnauthorized?: boolean;
}): FastifyInstance {
  const app: FastifyInstance = fastify({
    https: { ...tls, maxHeaderSize: 128 * 1024 }, // exec carries its arguments in the query
    bodyLimit: maxBodyBytes,
    routerOptions: { maxParamLength: 512 },
    requestTimeout: 30 * 60_000, // an upload of the largest blob, on a slow line
    keepAliveTimeout: 75_000,
    exposeHeadRoutes: false,
    forceCloseConnections: true,
    clientErrorHandler: (_, socket) => sendRawError(socket, new ForgeError("INVALID_INPUT", "this is not an HTTP request")),
    frameworkErrors: (error, _, reply) => void sendError(reply, errorFromFastify(error)),
  });
  app.server.maxConnections = maxConnections;
  app.server.headersTimeout = 10_000;
  app.setValidatorCompiler(validatorCompiler);
  app.setSerializerCompiler(serializerCompiler);
  app.setErrorHandler((error, _, reply) => sendError(reply, errorFromFastify(error)));
  app.setNotFoundHandler((request, reply) =>
    sendError(reply, new ForgeError("NOT_FOUND", `there is no ${request.method} ${request.url.split("?")[0] ?? ""}`)),
  );
  app.removeAllContentTypeParsers();
  app.addContentTypeParser("application/json", { parseAs: "string" }, app.getDefaultJsonParser("error", "error"));
  app.addContentTypeParser("application/octet-stream", (_, payload, done) => done(null, payload));
  return app;
}

/** What takes over upgraded connections. They are no HTTP connections any more, so closing the server has to end them itself. */
export function newSocketServer(app: FastifyInstance): WebSocketServer {
  const sockets = new WebSocketServer({ noServer: true, maxPayload: maxMessageBytes, perMessageDeflate: false });
  app.addHook("preClose", async () => {
    for (const client of sockets.clients) client.terminate();
  });
  return sockets;
}

/** The arguments of Node's `upgrade` event. */
export interface Upgrade {
  readonly request: IncomingMessage;
  readonly socket: Duplex;
  readonly head: Buffer;
}

/** The one place that decides who may do what. Every refusal is in the log. */
class Door {
  readonly #control: Control;
  readonly #authenticator: Authenticator;

  constructor(control: Control, authenticator: Authenticator) {
    this.#control = control;
    this.#authenticator = authenticator;
  }

  async pass(name: RouteName, request: IncomingMessage): Promise<Caller> {
    const route: Route = routes[name];
    if (route.allow === "public") return nobody;
    const caller = await this.#authenticator.authenticate(request.headers.authorization, request.socket.remoteAddress ?? "unknown", name);
    if (isAllowed(route, caller)) return caller;
    const details = { role: caller.role, route: name };
    await appendDenial(this.#control, {
      tenant: caller.tenantId,
      kind: "authz.denied",
      actor: caller.actor,
      subject: `route/${name}`,
      details,
    });
    throw new ForgeError("FORBIDDEN", `the role ${caller.role} may not do this`);
  }
}

/** The caller of a public route. Its role allows nothing else. */
const nobody: Caller = { tokenId: "", tokenName: "", role: "auditor", tenantId: null, tenantName: null, actor: "anonymous" };

function registerRoute(app: FastifyInstance, control: Control, door: Door, name: RouteName, route: Route): void {
  const callers = new WeakMap<FastifyRequest, Caller>();
  const isJson = route.stream === undefined;
  app.route({
    method: route.method,
    url: route.path,
    schema: {
      ...(route.params === undefined ? {} : { params: route.params }),
      ...(route.query === undefined ? {} : { querystring: route.query }),
      ...(route.body === undefined ? {} : { body: route.body }),
      ...(isJson ? { response: { 200: route.response } } : {}),
    },
    onRequest: async (request) => void callers.set(request, await door.pass(name, request.raw)), // before anything of the body is read
    handler: async (request, reply) => {
      const signal = abortOnClose(reply);
      const parts = { params: request.params, query: request.query, body: route.stream === "upload" ? uploadOf(request) : request.body };
      const answer = await handlerOf(name)({
        control,
        caller: callers.get(request) ?? nobody,
        signal,
        ...parts,
      });
      return route.stream === "ndjson" ? sendLines(reply, answer as AsyncIterable<unknown>) : answer;
    },
  });
}

function handlerOf(name: RouteName): AnyHandler {
  return handlers[name] as unknown as AnyHandler;
}

function uploadOf(request: FastifyRequest): AsyncIterable<Uint8Array> {
  if (request.body instanceof Readable) return request.body;
  throw new ForgeError("INVALID_INPUT", "a blob is sent as application/octet-stream");
}

/** One JSON text a line, as the client reads them. A failure after the first byte can only be a last line. */
async function sendLines(reply: FastifyReply, items: AsyncIterable<unknown>): Promise<void> {
  reply.hijack();
  reply.raw.writeHead(200, { "content-type": "application/x-ndjson", "cache-control": "no-store" });
  reply.raw.flushHeaders();
  await pipeline(Readable.from(linesOf(items)), reply.raw).catch(() => undefined); // the client left
}

async function* linesOf(items: AsyncIterable<unknown>): AsyncGenerator<string> {
  try {
    for await (const item of items) yield `${JSON.stringify(item)}\n`;
  } catch (error) {
    yield `${JSON.stringify({ error: errorFromFastify(error).toBody() })}\n`;
  }
}

/** Exec: the agent is there before the client's handshake is answered, so that a failure is an ordinary HTTP error. */
async function upgrade(control: Control, door: Door, sockets: WebSocketServer, { request, socket, head }: Upgrade): Promise<void> {
  const gone = new AbortController();
  const onClose = (): void => gone.abort();
  socket.on("close", onClose);
  socket.on("error", onClose);
  try {
    const { params, query } = matchExec(request);
    const caller = await door.pass("exec", request);
    const parts = { params: checked("params", params), query: checked("query", query) } as Pick<Request<"exec">, "params" | "query">;
    const agent = await openExec({ control, caller, body: undefined, signal: gone.signal, ...parts });
    if (gone.signal.aborted) return agent.terminate();
    let joined = false;
    sockets.handleUpgrade(request, socket, head, (client) => {
      joined = true;
      bridge(client, agent);
    });
    if (!joined) agent.terminate(); // the client's handshake was not sound, and it has been told so
  } catch (error) {
    const failure = errorFromFastify(error);
    if (failure.code === "INTERNAL") control.log.error({ err: error }, "an exec session could not be opened");
    sendRawError(socket, failure);
  } finally {
    socket.off("close", onClose);
  }
}

function matchExec(request: IncomingMessage): { params: unknown; query: unknown } {
  const url = parseUrl(request.url ?? "");
  const match = url === undefined ? null : /^\/v1\/services\/([^/]+)\/exec$/.exec(url.pathname);
  if (url === undefined || match === null) throw new ForgeError("NOT_FOUND", "there is no WebSocket here");
  return { params: { name: decodeURIComponent(match[1] ?? "") }, query: Object.fromEntries(url.searchParams) };
}

function parseUrl(path: string): URL | undefined {
  try {
    return new URL(path, "https://forge.local");
  } catch {
    return undefined;
  }
}

function checked(part: "params" | "query", value: unknown): unknown {
  const result = routes.exec[part].safeParse(value);
  if (!result.success) throw requestError(part, result.error.issues);
  return result.data;
}

function abortOnClose(reply: FastifyReply): AbortSignal {
  const gone = new AbortController();
  reply.raw.on("close", () => gone.abort());
  return gone.signal;
}

function sendError(reply: FastifyReply, error: ForgeError): FastifyReply {
  if (error.code === "INTERNAL") reply.log.error({ err: error.cause ?? error }, error.message);
  return reply
    .code(error.httpStatus)
    .type("application/json")
    .serializer((body: unknown) => JSON.stringify(body))
    .send(error.toBody());
}
