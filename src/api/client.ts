import type { z } from "zod";
import { type Route, type RouteName, routes } from "./routes.ts";

/** How a request travels; the CLI brings HTTPS with the region's own CA, a browser brings fetch. */
export type Transport = (request: {
  method: string;
  path: string;
  headers: Record<string, string>;
  body?: string | Uint8Array | AsyncIterable<Uint8Array>;
  signal?: AbortSignal;
}) => Promise<{ status: number; body: AsyncIterable<Uint8Array> }>;

type Input<R extends Route, K extends "params" | "query" | "body"> = R extends { [P in K]: infer S extends z.ZodType }
  ? { [P in K]: z.input<S> }
  : unknown;
export type CallInput<N extends RouteName> = Input<(typeof routes)[N], "params"> &
  Partial<Input<(typeof routes)[N], "query">> &
  Input<(typeof routes)[N], "body">;
export type CallOutput<N extends RouteName> = z.output<(typeof routes)[N]["response"]>;

interface AnyInput {
  params?: Record<string, unknown>;
  query?: Record<string, unknown>;
  body?: unknown;
}

/** A failure the API described; the caller turns it into its own error type. */
export class ApiFailure extends Error {
  readonly status: number;
  readonly body: { code: string; message: string; remedy?: string; details?: Record<string, unknown> };
  constructor(status: number, body: ApiFailure["body"]) {
    super(body.message);
    this.status = status;
    this.body = body;
  }
}

/** The typed client off the route table. Responses are validated: a server of another version fails loudly. */
export class ForgeClient {
  readonly #transport: Transport;
  readonly #token: string | undefined;

  constructor(transport: Transport, token?: string) {
    this.#transport = transport;
    this.#token = token;
  }

  /** One JSON call. */
  async call<N extends RouteName>(name: N, input: CallInput<N>, signal?: AbortSignal): Promise<CallOutput<N>> {
    const response = await this.#send(name, input, undefined, signal);
    return routes[name].response.parse(JSON.parse(await collectText(response.body))) as CallOutput<N>;
  }

  /** The raw body of an upload route. */
  async upload<N extends RouteName>(name: N, input: CallInput<N>, bytes: AsyncIterable<Uint8Array>): Promise<void> {
    const response = await this.#send(name, input, bytes);
    await collectText(response.body);
  }

  /** The lines of an ndjson route, each validated. */
  async *lines<N extends RouteName>(name: N, input: CallInput<N>, signal?: AbortSignal): AsyncGenerator<CallOutput<N>> {
    const response = await this.#send(name, input, undefined, signal);
    const decoder = new TextDecoder();
    let rest = "";
    for await (const chunk of response.body) {
      const lines = (rest + decoder.decode(chunk, { stream: true })).split("\n");
      rest = lines.pop() ?? "";
      for (const line of lines) if (line !== "") yield parseLine(name, line);
    }
    if (rest !== "") yield parseLine(name, rest);
  }

  async #send(
    name: RouteName,
    input: AnyInput,
    upload?: AsyncIterable<Uint8Array>,
    signal?: AbortSignal,
  ): Promise<{ body: AsyncIterable<Uint8Array> }> {
    const route: Route = routes[name];
    const headers: Record<string, string> = { accept: "application/json" };
    if (this.#token !== undefined) headers["authorization"] = `Bearer ${this.#token}`;
    const body = upload ?? (input.body === undefined ? undefined : JSON.stringify(input.body));
    if (body !== undefined) headers["content-type"] = upload === undefined ? "application/json" : "application/octet-stream";
    const response = await this.#transport({
      method: route.method,
      path: pathOf(name, input),
      headers,
      ...(body === undefined ? {} : { body }),
      ...(signal === undefined ? {} : { signal }),
    });
    if (response.status >= 200 && response.status < 300) return response;
    throw new ApiFailure(response.status, parseFailure(await collectText(response.body), response.status));
  }
}

/** The path with parameters and query filled in, escaped. */
export function pathOf(name: RouteName, input: AnyInput): string {
  const path = routes[name].path.replace(/:([a-z]+)/g, (_, key: string) => encodeURIComponent(asText(input.params?.[key])));
  const query = new URLSearchParams();
  for (const [key, value] of Object.entries(input.query ?? {})) if (value !== undefined) query.set(key, asText(value));
  return query.size === 0 ? path : `${path}?${query.toString()}`;
}

/** Parameters are flat: texts, numbers, booleans. */
function asText(value: unknown): string {
  return typeof value === "string" ? value : value === undefined ? "" : JSON.stringify(value);
}

/** A stream cannot change its status once begun: a failure in the middle is a last line `{"error": …}`. */
function parseLine<N extends RouteName>(name: N, line: string): CallOutput<N> {
  const value: unknown = JSON.parse(line);
  if (typeof value === "object" && value !== null && "error" in value) throw new ApiFailure(500, value.error as ApiFailure["body"]);
  return routes[name].response.parse(value) as CallOutput<N>;
}

function parseFailure(text: string, status: number): ApiFailure["body"] {
  try {
    const body = JSON.parse(text) as ApiFailure["body"];
    if (typeof body.code === "string" && typeof body.message === "string") return body;
  } catch {
    // not JSON: a proxy's page, or nothing at all; described below
  }
  return { code: "UNAVAILABLE", message: `the server answered ${status} without an explanation` };
}

async function collectText(body: AsyncIterable<Uint8Array>): Promise<string> {
  const decoder = new TextDecoder();
  let text = "";
  for await (const chunk of body) text += decoder.decode(chunk, { stream: true });
  return text + decoder.decode();
}
