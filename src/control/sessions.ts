import { randomBytes } from "node:crypto";
import type { WebSocket } from "ws";
import type { SessionRequest } from "../api/node.ts";
import { ForgeError } from "../base/errors.ts";

interface Pending {
  readonly nodeId: string;
  readonly request: SessionRequest;
  readonly accept: (socket: WebSocket) => void;
}

const maxPending = 256;
/** Less than the 10 s a client gives its WebSocket handshake, so that it hears why. */
const rendezvousMs = 8000;
/** Above this a receiver counts as slow and its sender is paused. */
const highWaterBytes = 1024 * 1024;
const pingMs = 30_000;

/** The largest message either side may send. */
export const maxMessageBytes = 1024 * 1024;

/** A session's identifier: 144 random bits, since whoever names it on the right node is its other end. */
export function newSessionId(): string {
  return `ses_${randomBytes(18).toString("hex")}`;
}

/**
 * Where a person who waits and the node's agent that dials meet. The request travels in the node's desired state; its
 * identifier works once, for that node only, for a few seconds.
 */
export class SessionBroker {
  readonly #pending = new Map<string, Pending>();

  /** What a node should dial now. */
  requestsFor(nodeId: string): SessionRequest[] {
    return [...this.#pending.values()].filter((pending) => pending.nodeId === nodeId).map((pending) => pending.request);
  }

  /**
   * Registers the request, lets `announce` tell the node (it commits the audit event, so a session that cannot be
   * recorded does not happen), and resolves with the agent's socket. NODE_UNAVAILABLE when nobody dials in time.
   */
  async open(nodeId: string, request: SessionRequest, announce: () => Promise<void>, signal: AbortSignal): Promise<WebSocket> {
    if (this.#pending.size >= maxPending) throw new ForgeError("UNAVAILABLE", `more than ${maxPending} sessions wait for their nodes`);
    const { promise, resolve, reject } = Promise.withResolvers<WebSocket>();
    promise.catch(() => undefined); // it may be rejected while `announce` still runs; the await below reports it
    const giveUp = (): void => reject(new ForgeError("NODE_UNAVAILABLE", "the session was cancelled"));
    this.#pending.set(request.id, { nodeId, request, accept: resolve });
    signal.addEventListener("abort", giveUp);
    let timer: NodeJS.Timeout | undefined;
    try {
      await announce();
      timer = setTimeout(
        () => reject(new ForgeError("NODE_UNAVAILABLE", `the node did not open the session within ${rendezvousMs / 1000} s`)),
        rendezvousMs,
      );
      return await promise;
    } finally {
      clearTimeout(timer);
      signal.removeEventListener("abort", giveUp);
      this.#pending.delete(request.id);
    }
  }

  /** Is this a session that this node may dial now? */
  awaits(id: string, nodeId: string): boolean {
    return this.#pending.get(id)?.nodeId === nodeId;
  }

  /**
   * The agent's socket arrived. False when nobody waits for it any more. It is handed over paused: what it says before
   * its reader listens is not lost; `bridge` and `textMessages` resume it.
   */
  deliver(id: string, nodeId: string, socket: WebSocket): boolean {
    const pending = this.#pending.get(id);
    if (pending === undefined || pending.nodeId !== nodeId) return false;
    this.#pending.delete(id);
    socket.pause();
    pending.accept(socket);
    return true;
  }
}

/** Joins two sockets: messages pass unread both ways, a slow reader pauses its writer, and the end of one ends the other. */
export function bridge(one: WebSocket, other: WebSocket): void {
  pump(one, other);
  pump(other, one);
  const stopOne = keepAlive(one);
  const stopOther = keepAlive(other);
  for (const socket of [one, other]) {
    socket.once("close", () => {
      stopOne();
      stopOther();
    });
    socket.resume();
  }
  if (one.readyState === one.CLOSED) other.close(1011); // it broke before anybody listened
  if (other.readyState === other.CLOSED) one.close(1011);
}

/** The text messages of a socket, with back-pressure: it is paused while the reader is busy. */
export async function* textMessages(socket: WebSocket, signal: AbortSignal): AsyncGenerator<string> {
  const queue: string[] = [];
  let ended: { error?: ForgeError } | undefined;
  let wake = (): void => undefined;
  const end = (error?: ForgeError): void => {
    ended ??= error === undefined ? {} : { error };
    wake();
  };
  const onAbort = (): void => socket.terminate();
  const stopPings = keepAlive(socket);
  socket.on("message", (data, isBinary) => {
    if (!isBinary) queue.push((data as Buffer).toString()); // "nodebuffer" is the binaryType, so it is one
    if (queue.length >= 256) socket.pause();
    wake();
  });
  socket.on("error", () => end(new ForgeError("NODE_UNAVAILABLE", "the node broke the session off")));
  socket.on("close", (code) =>
    end(code === 1000 || code === 1005 ? undefined : new ForgeError("NODE_UNAVAILABLE", `the node ended the session (${code})`)),
  );
  signal.addEventListener("abort", onAbort);
  if (socket.readyState === socket.CLOSED) end(new ForgeError("NODE_UNAVAILABLE", "the node broke the session off"));
  try {
    while (!signal.aborted) {
      while (queue.length > 0) yield queue.shift() as string;
      if (socket.isPaused) socket.resume();
      if (ended?.error !== undefined) throw ended.error;
      if (ended !== undefined) return;
      await new Promise<void>((resolve) => (wake = resolve));
    }
  } finally {
    stopPings();
    signal.removeEventListener("abort", onAbort);
    socket.terminate();
  }
}

function pump(from: WebSocket, to: WebSocket): void {
  from.on("message", (data, isBinary) => {
    if (to.readyState !== to.OPEN) return;
    to.send(data as Buffer, { binary: isBinary }, () => {
      if (from.isPaused && to.bufferedAmount < highWaterBytes / 2) from.resume();
    });
    if (to.bufferedAmount > highWaterBytes) from.pause();
  });
  from.on("error", () => undefined); // "close" follows
  from.on("close", (code) => to.close(code === 1000 || (code >= 3000 && code <= 4999) ? code : 1011));
}

/** Pings; a peer that answers none of two in a row is gone. While we read nothing of it, it may have answered. */
function keepAlive(socket: WebSocket): () => void {
  let missed = 0;
  socket.on("pong", () => (missed = 0));
  const timer = setInterval(() => {
    if (!socket.isPaused && missed++ >= 2) socket.terminate();
    else socket.ping(undefined, undefined, () => undefined);
  }, pingMs);
  return () => clearInterval(timer);
}
