import { once } from "node:events";
import pg from "pg";
import type { Clock } from "../../base/clock.ts";
import type { Logger } from "../../base/log.ts";
import { connectionOptions, type DatabaseAddress } from "./database.ts";

/** Somebody who waits for a topic. A wake between two waits is not lost: the next wait returns at once. */
export interface Subscription {
  /** Resolves on the next wake, or after `timeoutMs`, or when the signal aborts. */
  wait(timeoutMs: number, signal?: AbortSignal): Promise<void>;
  close(): void;
}

interface Waiter {
  pending: boolean;
  wake: () => void;
}

/** LISTEN on one connection of its own, spread to everyone in this process who waits. Reconnects by itself. */
export class Wakes {
  readonly #address: DatabaseAddress;
  readonly #recover: () => Promise<void>;
  readonly #clock: Clock;
  readonly #log: Logger;
  readonly #waiters = new Map<string, Set<Waiter>>();
  readonly #stop = new AbortController();
  #running: Promise<void> | undefined;

  /** `recover` runs before every attempt to connect again: it may start a database that died. */
  constructor(address: DatabaseAddress, recover: () => Promise<void>, clock: Clock, log: Logger) {
    this.#address = address;
    this.#recover = recover;
    this.#clock = clock;
    this.#log = log;
  }

  /** Resolves when notifications arrive; from then on it keeps itself alive until `close`. */
  async open(): Promise<void> {
    const client = await this.#connect();
    this.#running = this.#keepAlive(client);
  }

  async close(): Promise<void> {
    this.#stop.abort();
    await this.#running;
  }

  subscribe(topic: string): Subscription {
    const waiter: Waiter = { pending: false, wake: () => undefined };
    const waiters = this.#waiters.get(topic) ?? new Set();
    this.#waiters.set(topic, waiters.add(waiter));
    return {
      wait: (timeoutMs, signal) => waitFor(waiter, timeoutMs, signal),
      close: () => {
        waiters.delete(waiter);
        if (waiters.size === 0 && this.#waiters.get(topic) === waiters) this.#waiters.delete(topic);
      },
    };
  }

  async #keepAlive(first: pg.Client): Promise<void> {
    for (let client: pg.Client | undefined = first; client !== undefined; client = await this.#reconnect()) {
      const ended = once(client, "end", { signal: this.#stop.signal }).catch(() => undefined);
      for (const topic of this.#waiters.keys()) this.#wake(topic); // what was said before we listened, nobody heard
      await ended;
      if (!this.#stop.signal.aborted) this.#log.warn("the connection that listens for changes was lost");
      await client.end().catch(() => undefined);
    }
  }

  /** Tries until it works, pausing 100 ms to 5 s; undefined once closed. */
  async #reconnect(): Promise<pg.Client | undefined> {
    for (let pauseMs = 100; !this.#stop.signal.aborted; pauseMs = Math.min(pauseMs * 2, 5000)) {
      try {
        await this.#recover();
        return await this.#connect();
      } catch (error) {
        this.#log.warn({ err: error }, "the database does not answer");
        await this.#clock.sleep(pauseMs, this.#stop.signal).catch(() => undefined);
      }
    }
    return undefined;
  }

  async #connect(): Promise<pg.Client> {
    const client = new pg.Client({ ...connectionOptions(this.#address), connectionTimeoutMillis: 5000 });
    client.on("error", () => undefined); // "end" follows
    client.on("notification", (message) => this.#wake(message.payload ?? ""));
    try {
      await client.connect();
      await client.query("listen forge");
    } catch (error) {
      await client.end().catch(() => undefined);
      throw error;
    }
    return client;
  }

  #wake(topic: string): void {
    for (const waiter of this.#waiters.get(topic) ?? []) {
      waiter.pending = true;
      waiter.wake();
    }
  }
}

async function waitFor(waiter: Waiter, timeoutMs: number, signal?: AbortSignal): Promise<void> {
  if (!waiter.pending && signal?.aborted !== true) {
    await new Promise<void>((resolve) => {
      const timer = setTimeout(finish, timeoutMs);
      function finish(): void {
        clearTimeout(timer);
        signal?.removeEventListener("abort", finish);
        waiter.wake = () => undefined;
        resolve();
      }
      waiter.wake = finish;
      signal?.addEventListener("abort", finish);
    });
  }
  waiter.pending = false;
}
