import type { IncomingMessage } from "node:http";
import { Agent, request } from "node:https";
import { WebSocket } from "ws";
import type { z } from "zod";
import { type CellReport, type DesiredState, nodeRoutes, type NodeFacts } from "../api/node.ts";
import type { ChainEntry } from "../audit/index.ts";
import { errnoOf, ForgeError } from "../base/errors.ts";

/** How a node proves itself, and whom it believes. PEM texts. */
export interface LinkCredentials {
  readonly caPem: string;
  readonly certificatePem: string;
  readonly privateKeyPem: string;
}

const answerBytesMax = 64 * 1024 * 1024;
const callTimeoutMs = 30_000;

/** The node's side of src/api/node.ts: every call dials the control plane over mutual TLS 1.3. */
export class ControlLink {
  readonly #url: URL;
  readonly #tls: { ca: string; cert: string; key: string; minVersion: "TLSv1.3" };
  readonly #connections: Agent;

  constructor(url: string, credentials: LinkCredentials) {
    this.#url = new URL(url);
    this.#tls = { ca: credentials.caPem, cert: credentials.certificatePem, key: credentials.privateKeyPem, minVersion: "TLSv1.3" };
    this.#connections = new Agent({ ...this.#tls, keepAlive: true, maxSockets: 16, scheduling: "lifo" });
  }

  hello(facts: NodeFacts): Promise<z.output<typeof nodeRoutes.hello.response>> {
    return this.#call("POST", nodeRoutes.hello.path, nodeRoutes.hello.response, { facts });
  }

  /** Answers at once when something changed after `after`, else when `waitMs` is over. */
  desired(after: number, waitMs: number, signal: AbortSignal): Promise<DesiredState> {
    const path = `${nodeRoutes.desired.path}?after=${after}&waitMs=${waitMs}`;
    return this.#call("GET", path, nodeRoutes.desired.response, undefined, { signal, timeoutMs: waitMs + callTimeoutMs });
  }

  async report(cells: readonly CellReport[], whole: boolean): Promise<void> {
    await this.#call("POST", nodeRoutes.report.path, nodeRoutes.report.response, { cells, whole });
  }

  /** Ships spool entries; returns the last sequence the region's log now holds. */
  async ship(entries: readonly ChainEntry[]): Promise<number> {
    const answer = await this.#call("POST", nodeRoutes.events.path, nodeRoutes.events.response, { entries });
    return answer.acceptedThrough;
  }

  /** The bytes of a blob; the reader checks them against the digest. */
  async blob(digest: string, signal: AbortSignal): Promise<IncomingMessage> {
    return this.#send("GET", nodeRoutes.blob.path.replace(":digest", encodeURIComponent(digest)), undefined, {
      signal,
      timeoutMs: callTimeoutMs,
    });
  }

  /** The node's end of a session a person waits for. */
  session(id: string): WebSocket {
    const path = nodeRoutes.session.path.replace(":id", encodeURIComponent(id));
    return new WebSocket(new URL(path, this.#url.href.replace(/^https/, "wss")), {
      ...this.#tls,
      handshakeTimeout: 10_000,
      maxPayload: 1024 * 1024,
    });
  }

  close(): void {
    this.#connections.destroy();
  }

  async #call<S extends z.ZodType>(
    method: string,
    path: string,
    schema: S,
    body?: unknown,
    options: CallOptions = {},
  ): Promise<z.output<S>> {
    const response = await this.#send(method, path, body === undefined ? undefined : JSON.stringify(body), options);
    return schema.parse(JSON.parse(await readText(response)));
  }

  async #send(method: string, path: string, body: string | undefined, options: CallOptions): Promise<IncomingMessage> {
    const headers = body === undefined ? {} : { "content-type": "application/json", "content-length": Buffer.byteLength(body) };
    const timeout = options.timeoutMs ?? callTimeoutMs;
    const signal = options.signal === undefined ? {} : { signal: options.signal };
    const response = await new Promise<IncomingMessage>((resolve, reject) => {
      const outgoing = request(new URL(path, this.#url), { method, headers, agent: this.#connections, timeout, ...signal }, resolve);
      outgoing.on("timeout", () => outgoing.destroy(new ForgeError("TIMEOUT", `the control plane did not answer within ${timeout} ms`)));
      outgoing.on("error", (error) => reject(describe(error)));
      outgoing.end(body);
    });
    if (response.statusCode !== undefined && response.statusCode >= 200 && response.statusCode < 300) return response;
    throw parseFailure(await readText(response), response.statusCode ?? 0);
  }
}

interface CallOptions {
  readonly signal?: AbortSignal;
  readonly timeoutMs?: number;
}

function describe(error: Error): Error {
  if (error instanceof ForgeError || error.name === "AbortError") return error;
  return new ForgeError("UNAVAILABLE", `the control plane cannot be reached: ${errnoOf(error) ?? error.message}`, { cause: error });
}

async function readText(response: IncomingMessage): Promise<string> {
  const chunks: Buffer[] = [];
  let sizeBytes = 0;
  for await (const chunk of response as AsyncIterable<Buffer>) {
    sizeBytes += chunk.length;
    if (sizeBytes > answerBytesMax) throw new ForgeError("TOO_LARGE", "the control plane's answer is beyond its bound");
    chunks.push(chunk);
  }
  return Buffer.concat(chunks).toString("utf8");
}

function parseFailure(text: string, status: number): ForgeError {
  try {
    const body = JSON.parse(text) as { code: string; message: string; details?: Record<string, unknown> };
    if (typeof body.code === "string" && typeof body.message === "string") return ForgeError.fromBody(body);
  } catch {
    // not JSON: said below
  }
  return new ForgeError("UNAVAILABLE", `the control plane answered ${status}`);
}
