import { durationMs, type ServiceSpec } from "../api/manifest.ts";
import type { Clock } from "../base/clock.ts";
import type { Cell, ProbeResult } from "../isocell/index.ts";

const pauseMsLeast = 25;

/** A service's health check against one running cell, asked from inside the guest. */
export class HealthCheck {
  readonly #cell: Cell;
  readonly #health: NonNullable<ServiceSpec["health"]>;
  readonly #clock: Clock;

  constructor(cell: Cell, health: NonNullable<ServiceSpec["health"]>, clock: Clock) {
    this.#cell = cell;
    this.#health = health;
    this.#clock = clock;
  }

  /** Undefined at the first success; else, when the deadline has come, what the last probe said. Asks often at first. */
  async firstSuccess(deadline: AbortSignal): Promise<string | undefined> {
    let detail = "it was not asked yet";
    for (let pauseMs = pauseMsLeast; !deadline.aborted; pauseMs = Math.min(pauseMs * 1.5, durationMs(this.#health.interval))) {
      const result = await this.#probe();
      if (result.ok) return undefined;
      detail = result.detail;
      await this.#pause(pauseMs, deadline);
    }
    return detail;
  }

  /** What the last probe said once as many in a row failed as the service allows; undefined when the signal came first. */
  async lastFailure(signal: AbortSignal): Promise<string | undefined> {
    for (let failures = 0; ;) {
      await this.#pause(durationMs(this.#health.interval), signal);
      if (signal.aborted) return undefined;
      const result = await this.#probe();
      failures = result.ok ? 0 : failures + 1;
      if (failures >= this.#health.failures) return result.detail;
    }
  }

  #probe(): Promise<ProbeResult> {
    const { http, port, timeout } = this.#health;
    return this.#cell.probe({ port, timeoutMs: durationMs(timeout), ...(http === undefined ? {} : { httpPath: http }) });
  }

  async #pause(ms: number, signal: AbortSignal): Promise<void> {
    await this.#clock.sleep(ms, signal).catch(() => undefined); // the caller looks at the signal
  }
}
