import { once } from "node:events";
import type { Readable } from "node:stream";
import type { RawData, WebSocket } from "ws";
import { z } from "zod";
import type { SessionRequest } from "../api/node.ts";
import type { LogLine } from "../api/resources.ts";
import { decodeFrame, encodeFrame } from "../api/session.ts";
import { ForgeError, toForgeError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import type { ExecSession } from "../isocell/index.ts";
import type { CellRunner } from "./cell-runner.ts";

/**
 * Sessions a person waits for: the control plane names them, the node dials. Both kinds are bounded by the WebSocket's
 * own buffer: nobody reads faster than the other side takes.
 */

const bufferedBytesMax = 1024 * 1024;
const sessionsMax = 256;
const sessionsOfCellMax = 16;

const resizeSchema = z.object({ columns: z.int().min(1).max(1000), rows: z.int().min(1).max(1000) });
const signalSchema = z.object({ number: z.int().min(1).max(64) });

export interface SessionHost {
  dial(sessionId: string): WebSocket;
  runner(cellId: string): CellRunner | undefined;
  readonly log: Logger;
}

export class Sessions {
  readonly #host: SessionHost;
  /** Requests come again until they are met; each is dialled once. */
  readonly #active = new Map<string, SessionRequest>();

  constructor(host: SessionHost) {
    this.#host = host;
  }

  /** Dials what is new. */
  begin(requests: readonly SessionRequest[]): void {
    for (const request of requests) {
      if (this.#active.has(request.id)) continue;
      if (this.#active.size >= sessionsMax || this.#ofSameCell(request) >= sessionsOfCellMax) {
        this.#host.log.warn({ session: request.id }, "too many sessions at once: the request is left to time out");
        continue;
      }
      this.#active.set(request.id, request);
      void this.#serve(request).finally(() => this.#active.delete(request.id));
    }
  }

  /** One cell's sessions, and so one tenant's, do not use up the node's. */
  #ofSameCell(request: SessionRequest): number {
    return [...this.#active.values()].filter((other) => keyOf(other) === keyOf(request)).length;
  }

  async #serve(request: SessionRequest): Promise<void> {
    const socket = this.#host.dial(request.id);
    const over = new AbortController();
    socket.on("close", () => over.abort());
    socket.on("error", (error) => {
      this.#host.log.debug({ session: request.id, err: error.message }, "session ended by an error");
      over.abort();
    });
    // A frame that comes before somebody listens would be lost: nothing is read until the program runs.
    if (request.kind === "exec") socket.once("open", () => socket.pause());
    try {
      await once(socket, "open", { signal: over.signal });
      if (request.kind === "exec") await this.#exec(socket, request, over.signal);
      else await this.#logs(socket, request, over.signal);
    } catch (error) {
      this.#host.log.debug({ session: request.id, err: toForgeError(error).message }, "session ended");
    } finally {
      socket.close();
    }
  }

  async #exec(socket: WebSocket, request: SessionRequest & { kind: "exec" }, over: AbortSignal): Promise<void> {
    let session: ExecSession | undefined;
    try {
      const runner = this.#host.runner(request.cell);
      if (runner === undefined) throw new ForgeError("NOT_FOUND", "the cell is not on this node");
      const { argv, tty, columns, rows } = request;
      session = await runner.exec({ argv, tty, columns, rows, env: tty ? { TERM: "xterm-256color" } : {} });
      const running = session;
      over.addEventListener("abort", () => running.close(), { once: true });
      if (over.aborted) running.close();
      socket.on("message", (data: RawData) => receive(running, socket, toBytes(data)));
      socket.resume();
      await Promise.all([pump(running.stdout, "stdout", socket, over), pump(running.stderr, "stderr", socket, over)]);
      const status = await running.exited;
      socket.send(encodeFrame("exit", { status: "code" in status ? status.code : 128 + status.signal }));
    } catch (error) {
      if (!over.aborted) socket.send(encodeFrame("error", toForgeError(error).toBody()));
    } finally {
      socket.resume(); // a paused socket never sees its close
    }
  }

  /** One line of JSON a message; cells side by side, each in its own order. */
  async #logs(socket: WebSocket, request: SessionRequest & { kind: "logs" }, over: AbortSignal): Promise<void> {
    const logs = request.cells.flatMap((cell) => this.#host.runner(cell)?.log ?? []);
    const options = { tail: request.tail, follow: request.follow, signal: over };
    const send = (line: LogLine): Promise<void> => sendBounded(socket, JSON.stringify(line), over);
    if (!request.follow) {
      const past = await Promise.all(logs.map((log) => Array.fromAsync(log.lines(options))));
      for (const line of past.flat().toSorted((a, b) => (a.time < b.time ? -1 : a.time > b.time ? 1 : 0))) await send(line);
      return;
    }
    await Promise.all(
      logs.map(async (log) => {
        for await (const line of log.lines(options)) await send(line);
      }),
    );
  }
}

function keyOf(request: SessionRequest): string {
  return request.kind === "exec" ? request.cell : (request.cells[0] ?? "");
}

/** What the person sends. While the guest takes no more stdin, nothing more is read from the person either. */
function receive(session: ExecSession, socket: WebSocket, message: Uint8Array): void {
  const frame = decodeFrame(message);
  switch (frame?.type) {
    case "stdin":
      if (session.stdin.write(Buffer.from(frame.payload))) return;
      socket.pause();
      session.stdin.once("drain", () => socket.resume());
      return;
    case "stdinEnd":
      session.stdin.end();
      return;
    case "resize": {
      const size = resizeSchema.safeParse(parseJson(frame.payload));
      if (size.success) session.resize(size.data.columns, size.data.rows);
      return;
    }
    case "signal": {
      const signal = signalSchema.safeParse(parseJson(frame.payload));
      if (signal.success) session.kill(signal.data.number);
      return;
    }
    default: // not for this side: passed over
  }
}

async function pump(from: Readable, type: "stdout" | "stderr", socket: WebSocket, over: AbortSignal): Promise<void> {
  for await (const chunk of from as AsyncIterable<Buffer>) await sendBounded(socket, encodeFrame(type, chunk), over);
}

/** Sends, and waits while the other side has too much unread. */
async function sendBounded(socket: WebSocket, data: string | Uint8Array, over: AbortSignal): Promise<void> {
  if (over.aborted) throw new ForgeError("CELL_FAILED", "the session is over");
  const sent = new Promise<void>((resolve, reject) => socket.send(data, (error) => (error ? reject(error) : resolve())));
  if (socket.bufferedAmount > bufferedBytesMax) await sent;
  else sent.catch(() => undefined); // the socket's close tells
}

function toBytes(data: RawData): Uint8Array {
  if (Array.isArray(data)) return Buffer.concat(data);
  return data instanceof ArrayBuffer ? new Uint8Array(data) : data;
}

function parseJson(bytes: Uint8Array): unknown {
  try {
    return JSON.parse(Buffer.from(bytes).toString("utf8"));
  } catch {
    return undefined;
  }
}
