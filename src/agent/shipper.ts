import type { Spool } from "../audit/index.ts";
import type { Clock } from "../base/clock.ts";
import { toForgeError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import { Backoff } from "./backoff.ts";
import type { ControlLink } from "./control-link.ts";

const batchEntries = 500;
const retryMsMost = 10_000;

/** Carries the node's spool to the region's log: in order, each entry until it is acknowledged. Woken, never polling. */
export class Shipper {
  readonly #spool: Spool;
  readonly #link: ControlLink;
  readonly #backoff: Backoff;
  readonly #log: Logger;
  #wake: (() => void) | undefined;

  constructor(spool: Spool, link: ControlLink, clock: Clock, log: Logger) {
    this.#spool = spool;
    this.#link = link;
    this.#backoff = new Backoff(clock, retryMsMost);
    this.#log = log;
  }

  /** Something was appended. */
  wake(): void {
    this.#wake?.();
  }

  async run(signal: AbortSignal): Promise<void> {
    while (!signal.aborted) {
      try {
        if (!(await this.#shipBatch())) await this.#sleepUntilWoken(signal);
        this.#backoff.reset();
      } catch (error) {
        if (signal.aborted) return;
        this.#log.warn(
          { err: toForgeError(error).message, retryMs: this.#backoff.nextMs },
          "the region's log did not take the node's events",
        );
        await this.#backoff.pause(signal);
      }
    }
  }

  /** True when there may be more. */
  async #shipBatch(): Promise<boolean> {
    const entries = await this.#spool.read(this.#spool.pending().acknowledged.sequence, batchEntries);
    if (entries.length === 0) return false;
    await this.#spool.acknowledge(await this.#link.ship(entries));
    return true;
  }

  async #sleepUntilWoken(signal: AbortSignal): Promise<void> {
    if (this.#spool.pending().entries > 0) return;
    await new Promise<void>((resolve) => {
      this.#wake = resolve;
      signal.addEventListener("abort", () => resolve(), { once: true });
    });
    this.#wake = undefined;
  }
}
