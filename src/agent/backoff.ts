import type { Clock } from "../base/clock.ts";

const leastMs = 200;

/** The pause between tries of what must come through in the end: doubles up to a bound, and starts anew after a success. */
export class Backoff {
  readonly #clock: Clock;
  readonly #mostMs: number;
  #nextMs = leastMs;

  constructor(clock: Clock, mostMs: number) {
    this.#clock = clock;
    this.#mostMs = mostMs;
  }

  /** How long the next pause is. */
  get nextMs(): number {
    return this.#nextMs;
  }

  /** Ends early when the signal is aborted; the caller looks at it. */
  async pause(signal: AbortSignal): Promise<void> {
    const ms = this.#nextMs;
    this.#nextMs = Math.min(ms * 2, this.#mostMs);
    await this.#clock.sleep(ms, signal).catch(() => undefined);
  }

  reset(): void {
    this.#nextMs = leastMs;
  }
}
