import type { IncomingMessage } from "node:http";
import { Agent } from "node:https";
import { WebSocket } from "ws";
import type { z } from "zod";
import { type CellReport, type DesiredState, nodeRoutes, type NodeFacts } from "../api/node.ts";
import type { ChainEntry } from "../audit/index.ts";
import { type CallOptions, callTimeoutMs, readJson, send } from "./https-call.ts";

/** How a node proves itself, and whom it believes. PEM texts. */
export interface LinkCredentials {
  readonly caPem: string;
  readonly certificatePem: string;
  readonly privateKeyPem: string;
}

type Bounds = Pick<CallOptions, "signal" | "timeoutMs">;

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

  async #call<S extends z.ZodType>(method: string, path: string, schema: S, body?: unknown, options: Bounds = {}): Promise<z.output<S>> {
    return schema.parse(await readJson(await this.#send(method, path, body, options)));
  }

  #send(method: string, path: string, body: unknown, options: Bounds): Promise<IncomingMessage> {
    return send(new URL(path, this.#url), { method, agent: this.#connections, body, ...options });
  }
}
