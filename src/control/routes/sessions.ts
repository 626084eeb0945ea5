import { createHash } from "node:crypto";
import { sql } from "kysely";
import type { WebSocket } from "ws";
import { z } from "zod";
import type { SessionRequest } from "../../api/node.ts";
import { type LogLine, logLineSchema } from "../../api/resources.ts";
import { ForgeError } from "../../base/errors.ts";
import { appendEvents, type Fact } from "../audit-log.ts";
import type { Control } from "../context.ts";
import { query, transact } from "../db/database.ts";
import { changeNodes } from "../deploy.ts";
import { type Handler, type Request, tenantOf } from "../handler.ts";
import { newSessionId, textMessages } from "../sessions.ts";

const argvSchema = z
  .array(
    z
      .string()
      .max(32_768)
      .refine((argument) => !argument.includes("\0")),
  )
  .min(1)
  .max(256);

/** The agent's end of an exec session; the server joins it to the client's. */
export async function openExec({ control, caller, params, query: asked, signal }: Request<"exec">): Promise<WebSocket> {
  const argv = parseArgv(asked.argv);
  const cells = await findCells(control, tenantOf(caller), params.name, asked.cell);
  const cell = cells.find((candidate) => candidate.state === "running");
  if (cell === undefined) throw new ForgeError("CONFLICT", `no cell of ${params.name} is running`);
  const request: SessionRequest = {
    kind: "exec",
    id: newSessionId(),
    cell: cell.id,
    argv,
    tty: asked.tty,
    columns: asked.columns,
    rows: asked.rows,
  };
  const argvDigest = `sha256:${createHash("sha256").update(JSON.stringify(argv)).digest("hex")}`;
  const details = { service: params.name, argvDigest, tty: asked.tty };
  const fact: Fact = {
    tenant: caller.tenantId,
    kind: "session.exec",
    actor: caller.actor,
    outcome: "success",
    subject: `cell/${cell.id}`,
    details,
  };
  return control.sessions.open(cell.node_id, request, () => announce(control, [cell.node_id], fact), signal);
}

/** Lines of the service's cells, of every node that has some, as they arrive. */
export const getLogs: Handler<"getLogs"> = async ({ control, caller, params, query: asked, signal }) => {
  const cells = await findCells(control, tenantOf(caller), params.name, asked.cell);
  const details = { cells: cells.map((cell) => cell.id), follow: asked.follow, tail: asked.tail };
  const fact: Fact = {
    tenant: caller.tenantId,
    kind: "session.logs",
    actor: caller.actor,
    outcome: "success",
    subject: `service/${params.name}`,
    details,
  };
  const byNode = Map.groupBy(cells, (cell) => cell.node_id);
  let announced: Promise<void> | undefined;
  const announceOnce = (): Promise<void> => (announced ??= announce(control, [...byNode.keys()], fact));
  if (byNode.size === 0) await announceOnce();
  const sockets = await openAll(
    [...byNode].map(([nodeId, own]) => () => {
      const request: SessionRequest = {
        kind: "logs",
        id: newSessionId(),
        cells: own.map((cell) => cell.id),
        follow: asked.follow,
        tail: asked.tail,
      };
      return control.sessions.open(nodeId, request, announceOnce, signal);
    }),
  );
  for (const socket of sockets) signal.addEventListener("abort", () => socket.terminate(), { once: true }); // read or not yet
  const wanted = new Set(cells.map((cell) => cell.id));
  return merge(sockets.map((socket) => readLines(control, socket, wanted, signal)));
};

interface SessionCell {
  readonly id: string;
  readonly node_id: string;
  readonly state: string;
}

/** The service's cells that a node knows, newest first, or the one that was asked for. */
async function findCells(control: Control, tenantId: string, service: string, cellId: string | undefined): Promise<SessionCell[]> {
  const found = await query(
    control.db.selectFrom("services").select("id").where("tenant_id", "=", tenantId).where("name", "=", service).executeTakeFirst(),
  );
  if (found === undefined) throw new ForgeError("NOT_FOUND", `there is no service ${service}`);
  const cells = await query(
    control.db
      .selectFrom("cells")
      .select(["id", sql<string>`node_id`.as("node_id"), "state"])
      .where("service_id", "=", found.id)
      .where("tenant_id", "=", tenantId)
      .where("desired", "in", ["running", "stopped"])
      .$if(cellId !== undefined, (q) => q.where("id", "=", cellId ?? ""))
      .orderBy("id", "desc")
      .execute(),
  );
  if (cells.length === 0 && cellId !== undefined) throw new ForgeError("NOT_FOUND", `${service} has no cell ${cellId}`);
  return cells;
}

/** Event and wake in one transaction: a session that cannot be recorded does not happen. */
async function announce(control: Control, nodeIds: readonly string[], fact: Fact): Promise<void> {
  await transact(control.db, async (trx) => {
    await changeNodes(trx, nodeIds);
    await appendEvents(trx, control.signer, [fact]);
  });
}

/** All sockets, or none: those that came are closed when one does not. */
async function openAll(openers: readonly (() => Promise<WebSocket>)[]): Promise<WebSocket[]> {
  const results = await Promise.allSettled(openers.map((open) => open()));
  const sockets = results.flatMap((result) => (result.status === "fulfilled" ? [result.value] : []));
  const failed = results.find((result) => result.status === "rejected");
  if (failed === undefined) return sockets;
  for (const socket of sockets) socket.terminate();
  throw failed.reason;
}

/** A node speaks only of the cells it was asked for; a line that is none ends the stream. */
async function* readLines(control: Control, socket: WebSocket, wanted: ReadonlySet<string>, signal: AbortSignal): AsyncGenerator<LogLine> {
  for await (const text of textMessages(socket, signal)) {
    const line = logLineSchema.safeParse(parseJson(text));
    if (!line.success || !wanted.has(line.data.cell)) {
      control.log.warn("a node sent a log line that was not asked for");
      throw new ForgeError("NODE_UNAVAILABLE", "the node sent something that is no log line of this service");
    }
    yield line.data;
  }
}

/** Items of several streams as they come; ends when all have ended, and closes all when the reader leaves. */
async function* merge<T>(streams: readonly AsyncGenerator<T>[]): AsyncGenerator<T> {
  const next = new Map(streams.map((stream) => [stream, stream.next().then((result) => ({ stream, result }))]));
  for (const pending of next.values()) pending.catch(() => undefined); // reported by the race below, or nobody listens any more
  try {
    while (next.size > 0) {
      const { stream, result } = await Promise.race(next.values());
      if (result.done === true) {
        next.delete(stream);
        continue;
      }
      yield result.value;
      next.set(
        stream,
        stream.next().then((later) => ({ stream, result: later })),
      );
      next.get(stream)?.catch(() => undefined);
    }
  } finally {
    for (const stream of streams) void stream.return(undefined).catch(() => undefined);
  }
}

function parseArgv(text: string): string[] {
  const argv = argvSchema.safeParse(parseJson(text));
  if (!argv.success) throw new ForgeError("INVALID_INPUT", "argv must be a JSON array of 1 to 256 strings");
  return argv.data;
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}
