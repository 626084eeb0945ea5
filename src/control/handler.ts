import type { z } from "zod";
import type { Route, RouteName, routes } from "../api/routes.ts";
import { ForgeError } from "../base/errors.ts";
import type { Caller } from "./authenticate.ts";
import type { Control } from "./context.ts";

type Shape<N extends RouteName, K extends "params" | "query" | "body"> = (typeof routes)[N] extends { [P in K]: infer S extends z.ZodType }
  ? z.output<S>
  : undefined;

/** A request as a handler sees it: the caller's role allows it, and every part has the shape the route says. */
export interface Request<N extends RouteName> {
  readonly control: Control;
  readonly caller: Caller;
  readonly params: Shape<N, "params">;
  readonly query: Shape<N, "query">;
  readonly body: (typeof routes)[N] extends { stream: "upload" } ? AsyncIterable<Uint8Array> : Shape<N, "body">;
  /** Aborted when the client goes away. */
  readonly signal: AbortSignal;
}

type Item<N extends RouteName> = z.output<(typeof routes)[N]["response"]>;
type Result<N extends RouteName> = (typeof routes)[N] extends { stream: "ndjson" } ? AsyncIterable<Item<N>> : Item<N>;

/** Authorise -> one transaction (intent and event) -> wake. The first of them is done before a handler is called. */
export type Handler<N extends RouteName> = (request: Request<N>) => Promise<Result<N>>;

/** Any handler, as the server calls it once it checked all parts against the route. */
export type AnyHandler = (
  request: Omit<Request<RouteName>, "params" | "query" | "body"> & Record<"params" | "query" | "body", unknown>,
) => Promise<unknown>;

export function isAllowed(route: Route, caller: Caller): boolean {
  return route.allow === "public" || route.allow.includes(caller.role);
}

/** The tenant a request acts for; only an operator has none. */
export function tenantOf(caller: Caller): string {
  if (caller.tenantId === null) throw new ForgeError("FORBIDDEN", "this belongs to a tenant, and the platform's operator has none");
  return caller.tenantId;
}
