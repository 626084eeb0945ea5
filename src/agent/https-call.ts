import type { IncomingMessage } from "node:http";
import { type Agent, request } from "node:https";
import { errnoOf, ForgeError } from "../base/errors.ts";

/** One HTTPS call to the control plane, as every part of the agent makes it: bounded in time and size, failures as ForgeErrors. */
export interface CallOptions {
  readonly method: string;
  /** Brings the trust, and where there is one the certificate. */
  readonly agent: Agent;
  /** Sent as JSON; undefined: no body. */
  readonly body?: unknown;
  readonly signal?: AbortSignal;
  readonly timeoutMs?: number;
}

export const callTimeoutMs = 30_000;
const answerBytesMax = 64 * 1024 * 1024;

/** The answer, its body yet to be read; whatever is not 2xx is thrown as the error its body describes. */
export async function send(url: URL, options: CallOptions): Promise<IncomingMessage> {
  const body = options.body === undefined ? undefined : JSON.stringify(options.body);
  const headers = body === undefined ? {} : { "content-type": "application/json", "content-length": Buffer.byteLength(body) };
  const timeout = options.timeoutMs ?? callTimeoutMs;
  const signal = options.signal === undefined ? {} : { signal: options.signal };
  const response = await new Promise<IncomingMessage>((resolve, reject) => {
    const outgoing = request(url, { method: options.method, headers, agent: options.agent, timeout, ...signal }, resolve);
    outgoing.on("timeout", () => outgoing.destroy(new ForgeError("TIMEOUT", `the control plane did not answer within ${timeout} ms`)));
    outgoing.on("error", (error) => reject(describe(error)));
    outgoing.end(body);
  });
  if (response.statusCode !== undefined && response.statusCode >= 200 && response.statusCode < 300) return response;
  throw parseFailure(await readText(response), response.statusCode ?? 0);
}

export async function readJson(response: IncomingMessage): Promise<unknown> {
  return JSON.parse(await readText(response));
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
