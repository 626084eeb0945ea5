import type { CellReport } from "../api/node.ts";
import type { Clock } from "../base/clock.ts";
import { toForgeError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import { Backoff } from "./backoff.ts";
import type { ControlLink } from "./control-link.ts";

const retryMsMost = 5000;

/** Tells the control plane what became of each cell: at once, one request at a time, changes in between coalesced. */
export class Reporter {
  readonly #link: ControlLink;
  readonly #backoff: Backoff;
  readonly #log: Logger;
  readonly #reports: () => CellReport[];
  readonly #changed = new Set<string>();
  #all = false;
  #wake = Promise.withResolvers<void>();

  /** `reports` gives the present state of every cell. */
  constructor(link: ControlLink, clock: Clock, log: Logger, reports: () => CellReport[]) {
    this.#link = link;
    this.#backoff = new Backoff(clock, retryMsMost);
    this.#log = log;
    this.#reports = reports;
  }

  changed(cellId: string): void {
    this.#changed.add(cellId);
    this.#wake.resolve();
  }

  /** The whole list: after a greeting, and when a cell is gone. */
  reportAll(): void {
    this.#all = true;
    this.#wake.resolve();
  }

  async run(signal: AbortSignal): Promise<void> {
    signal.addEventListener("abort", () => this.#wake.resolve(), { once: true });
    while (!signal.aborted) {
      await this.#wake.promise;
      this.#wake = Promise.withResolvers();
      if (signal.aborted) return;
      try {
        await this.flush();
        this.#backoff.reset();
      } catch (error) {
        this.#log.warn({ err: toForgeError(error).message, retryMs: this.#backoff.nextMs }, "the control plane did not take a report");
        await this.#backoff.pause(signal);
        this.reportAll(); // whatever was lost, the whole list holds it
      }
    }
  }

  /** Sends what is waiting. */
  async flush(): Promise<void> {
    if (!this.#all && this.#changed.size === 0) return;
    const whole = this.#all;
    const cells = this.#reports().filter(({ id }) => whole || this.#changed.has(id));
    this.#all = false;
    this.#changed.clear();
    await this.#link.report(cells, whole);
  }
}
