import type { ClientRequest, IncomingMessage } from "node:http";
import { Agent, request } from "node:https";
import { Readable } from "node:stream";
import { pipeline } from "node:stream/promises";
import { type ClientOptions, WebSocket } from "ws";
import type { Transport } from "../api/client.ts";
import { errnoOf, ForgeError } from "../base/errors.ts";

/** Where the control plane is and how to know it. Its certificate must come from this CA: the system's roots play no part. */
export interface Endpoint {
  readonly apiUrl: string;
  readonly caPem: string;
}

const connectTimeoutMs = 10_000;

/** HTTPS with connections kept for the next call of the same command. An upload goes as fast as the server reads. */
export function httpsTransport(endpoint: Endpoint): Transport & { close(): void } {
  const agent = new Agent({ keepAlive: true, maxSockets: 8, ca: endpoint.caPem, minVersion: "TLSv1.3" });
  const send: Transport = async ({ method, path, headers, body, signal }) => {
    const response = await new Promise<IncomingMessage>((resolve, reject) => {
      const outgoing = request(new URL(path, endpoint.apiUrl), { method, headers, agent, ...(signal === undefined ? {} : { signal }) });
      outgoing.once("response", resolve);
      outgoing.on("error", (error) => reject(describe(error, endpoint.apiUrl)));
      boundConnect(outgoing, endpoint.apiUrl);
      void sendBody(outgoing, body, reject);
    });
    return { status: response.statusCode ?? 0, body: bytesOf(response, endpoint.apiUrl) };
  };
  return Object.assign(send, { close: () => agent.destroy() });
}

/** The WebSocket of a route, with the same CA. The caller handles `unexpected-response` and `error` with `describe`. */
export function openWebSocket(endpoint: Endpoint, path: string, headers: Record<string, string>): WebSocket {
  const url = new URL(path, endpoint.apiUrl.replace(/^http/, "ws"));
  const options: ClientOptions = {
    ca: endpoint.caPem,
    minVersion: "TLSv1.3",
    headers,
    handshakeTimeout: connectTimeoutMs,
    maxPayload: 1024 * 1024,
    perMessageDeflate: false,
  };
  return new WebSocket(url, options);
}

/** A transport's failure in words. An abort stays what it is: the person asked for it. */
export function describe(error: Error, apiUrl: string): Error {
  if (error instanceof ForgeError || error.name === "AbortError" || error.name === "TimeoutError") return error;
  const code = errnoOf(error);
  return new ForgeError("UNAVAILABLE", `the control plane at ${apiUrl} ${explain(code, error)}`, { cause: error });
}

function explain(code: string | undefined, error: Error): string {
  if (code === "ECONNREFUSED") return "does not answer: nothing listens there";
  if (code === "ENOTFOUND" || code === "EAI_AGAIN") return "cannot be found: its name does not resolve";
  if (code === "ECONNRESET" || code === "EPIPE" || code === "ERR_STREAM_PREMATURE_CLOSE") return "closed the connection";
  const isCertificate =
    code !== undefined && (/CERT|SIGNATURE|SELF_SIGNED/.test(code) || code.startsWith("ERR_TLS") || code.startsWith("ERR_SSL"));
  if (isCertificate) return `is not the one this context trusts (${code}): another installation answers there, or somebody in between`;
  return `cannot be reached: ${code ?? error.message}`;
}

/** A connection that is not there after its bound will not come. What happens afterwards has the caller's own bound. */
function boundConnect(outgoing: ClientRequest, apiUrl: string): void {
  outgoing.once("socket", (socket) => {
    if (!socket.connecting) return;
    const late = new ForgeError("UNAVAILABLE", `the control plane at ${apiUrl} did not take the connection within ${connectTimeoutMs} ms`);
    const timer = setTimeout(() => outgoing.destroy(late), connectTimeoutMs);
    socket.once("secureConnect", () => clearTimeout(timer));
    socket.once("close", () => clearTimeout(timer));
  });
}

async function sendBody(outgoing: ClientRequest, body: Parameters<Transport>[0]["body"], reject: (error: unknown) => void): Promise<void> {
  if (body === undefined || typeof body === "string" || body instanceof Uint8Array) {
    outgoing.end(body);
    return;
  }
  try {
    await pipeline(Readable.from(body, { objectMode: false }), outgoing);
  } catch (error) {
    // A server that refuses early answers and closes: then the answer came first and this changes nothing.
    outgoing.destroy();
    reject(error);
  }
}

async function* bytesOf(response: IncomingMessage, apiUrl: string): AsyncGenerator<Uint8Array> {
  try {
    for await (const chunk of response) yield chunk as Uint8Array;
  } catch (error) {
    throw error instanceof Error ? describe(error, apiUrl) : error;
  }
}
