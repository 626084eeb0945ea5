import { setTimeout as delay } from "node:timers/promises";
import type { Cgroup } from "../base/cgroup.ts";
import { type ErrorCode, ForgeError, toForgeError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import {
  type ExecOptions,
  type ExecSession,
  type ExitStatus,
  GuestChannel,
  type GuestHandlers,
  type GuestLog,
  type ProbeResult,
} from "./channel.ts";
import { guestText } from "./channel-text.ts";
import { readDiagnostics, type VmmProcess } from "./vmm/process.ts";

/** booting: no word from init yet. booted: init speaks. running: the entrypoint runs. ended: the VMM is dead. */
export type CellState = "booting" | "booted" | "running" | "stopping" | "ended";

/** Durations in milliseconds; absent until known. */
export interface CellPhases {
  /** From `start` to the VMM's process running: checks, measurement, config drive, control groups. */
  readonly spawnMs?: number;
  /** From the VMM's spawn to the first instruction of init. */
  readonly kernelMs?: number;
  /** From the first instruction of init to the entrypoint's start. */
  readonly initMs?: number;
}

/** How a cell ended. The VMM is dead by then and nothing runs in the cell's control group. */
export interface CellEnd {
  /** Of the entrypoint; null where it never started or nobody saw it end. */
  readonly status: ExitStatus | null;
  /** Null for an entrypoint that ended by itself or was stopped. */
  readonly failure: { readonly code: ErrorCode; readonly reason: string } | null;
  /** One sentence, for people. */
  readonly reason: string;
}

/** Called in order; while a returned promise is pending the guest is not read further. */
export interface CellHandlers {
  /** Before the VMM exists; a start whose `measured` rejects does not happen. */
  measured?(measurement: string): Promise<void>;
  booted?(): void;
  started?(event: { readonly pid: number }): void;
  log?(log: GuestLog): void | Promise<void>;
  /** These logs are lost: the guest keeps a bounded number of bytes for an absent host. */
  dropped?(event: { readonly fromSequence: number; readonly toSequence: number }): void | Promise<void>;
  /** Exactly once, last. Not after `detach`. */
  ended?(end: CellEnd): void;
}

/** What a running cell is made of. */
export interface CellParts {
  readonly cellId: string;
  readonly cellDir: string;
  readonly channelPath: string;
  readonly measurement: string;
  readonly spawnedAtMs: number;
  readonly spawnMs: number | undefined;
  readonly vmm: VmmProcess;
  readonly cgroup: Cgroup;
  readonly bootTimeoutMs: number;
  readonly log: Logger;
}

/** A guest that said its last word may take this long to switch itself off. */
const powerOffMs = 5_000;

/** One running microVM, from its spawn or from where it was found again, to its end. */
export class Cell {
  readonly cellId: string;
  /** SHA-256 over everything that was booted (measure.ts). */
  readonly measurement: string;
  /** Settles when the cell ended; never after `detach`. */
  readonly ended: Promise<CellEnd>;
  readonly #parts: CellParts;
  readonly #handlers: CellHandlers;
  readonly #end = Promise.withResolvers<CellEnd>();
  readonly #gone = new AbortController();
  readonly #connected = Promise.withResolvers<GuestChannel>();
  #state: CellState = "booting";
  #phases: CellPhases;
  #channel: GuestChannel | undefined;
  #isEnding = false;
  #isDetached = false;
  #status: ExitStatus | null = null;
  #failure: ForgeError | undefined;
  #request: string | undefined;

  constructor(parts: CellParts, handlers: CellHandlers, lastLogSequence: number) {
    this.cellId = parts.cellId;
    this.measurement = parts.measurement;
    this.ended = this.#end.promise;
    this.#parts = parts;
    this.#handlers = handlers;
    this.#phases = parts.spawnMs === undefined ? {} : { spawnMs: parts.spawnMs };
    this.#connected.promise.catch(() => undefined); // `ended` reports it
    void parts.vmm.exited?.then(() => this.#gone.abort());
    void this.#live(lastLogSequence);
  }

  get state(): CellState {
    return this.#state;
  }

  /**
   * True once the guest said its last word or is out of reach: `ended` is about to settle, and knows why better than what
   * fails meanwhile. Never after `detach`.
   */
  get isEnding(): boolean {
    return this.#isEnding && !this.#isDetached;
  }

  get phases(): CellPhases {
    return this.#phases;
  }

  /** Of the VMM. */
  get pid(): number {
    return this.#parts.vmm.pid;
  }

  /** Helpers of this cell (proxies of published ports) join these, and so end with it. */
  get cgroupProcsFiles(): readonly string[] {
    return this.#parts.cgroup.procsFiles;
  }

  /** Runs a program in the cell. Waits for the guest where it still boots; CELL_FAILED where it ended. */
  async exec(options: ExecOptions): Promise<ExecSession> {
    return await (await this.#connected.promise).exec(options);
  }

  /** Asked from inside the cell. */
  async probe(options: { readonly port: number; readonly httpPath?: string; readonly timeoutMs: number }): Promise<ProbeResult> {
    return await (await this.#connected.promise).probe(options);
  }

  /** The entrypoint gets its stop signal and `graceMs` to end; then power is cut. Resolves when the cell ended. */
  async stop(graceMs: number): Promise<CellEnd> {
    if (this.#state === "ended") return await this.ended;
    this.#state = "stopping";
    this.#request = "stopped";
    if (this.#channel === undefined) return await this.kill(); // nothing of the image runs yet
    this.#channel.stop(graceMs);
    const cut = AbortSignal.timeout(graceMs + powerOffMs);
    const onCut = (): void => void this.kill().catch((error: unknown) => this.#parts.log.error({ err: error }, "power could not be cut"));
    cut.addEventListener("abort", onCut, { once: true });
    try {
      return await this.ended;
    } finally {
      cut.removeEventListener("abort", onCut);
    }
  }

  /** Cuts the power. Resolves when the cell ended. */
  async kill(): Promise<CellEnd> {
    if (this.#state !== "ended") this.#state = "stopping";
    this.#request ??= "killed";
    await this.#parts.cgroup.killAll();
    return await this.ended;
  }

  /** Lets go: the cell runs on, to be found again by `reattach`. */
  async detach(): Promise<void> {
    this.#isDetached = true;
    this.#gone.abort();
    await this.#channel?.close();
  }

  async #live(lastLogSequence: number): Promise<void> {
    try {
      const { channelPath, bootTimeoutMs } = this.#parts;
      const options = { lastLogSequence, timeoutMs: bootTimeoutMs, signal: this.#gone.signal, handlers: this.#guestHandlers() };
      this.#channel = await GuestChannel.connect(channelPath, options);
      if (this.#isDetached) await this.#channel.close();
      this.#connected.resolve(this.#channel);
      await this.#channel.closed;
    } catch (error) {
      this.#failure ??= toForgeError(error);
    }
    this.#isEnding = true;
    if (this.#isDetached) return this.#connected.reject(new ForgeError("UNAVAILABLE", "the cell was let go"));
    await this.#finish();
  }

  #guestHandlers(): GuestHandlers {
    return {
      booted: ({ at }) => {
        this.#phases = { ...this.#phases, kernelMs: Math.max(0, at.getTime() - this.#parts.spawnedAtMs) };
        this.#advance("booted");
        this.#handlers.booted?.();
      },
      started: ({ pid, initUs }) => {
        this.#phases = { ...this.#phases, initMs: initUs / 1000 };
        this.#advance("running");
        this.#handlers.started?.({ pid });
      },
      log: (log) => this.#handlers.log?.(log),
      dropped: (event) => this.#handlers.dropped?.(event),
      fatal: ({ code, message }) => {
        this.#failure ??= guestFailure(code, message);
        this.#expectPowerOff();
      },
      exited: ({ status }) => {
        this.#status ??= status;
        this.#expectPowerOff();
      },
      closed: (error) => {
        this.#isEnding = true;
        this.#failure ??= error;
      },
    };
  }

  #advance(state: "booted" | "running"): void {
    if (this.#state === "booting" || this.#state === "booted") this.#state = state;
  }

  /** A guest is not trusted to switch itself off, nor to say its last word once. */
  #expectPowerOff(): void {
    if (this.#isEnding) return;
    this.#isEnding = true;
    this.#state = "stopping";
    void delay(powerOffMs, undefined, { ref: false }).then(() => {
      if (this.#state !== "ended" && !this.#isDetached) void this.kill().catch(() => undefined); // tried again by remove
    });
  }

  async #finish(): Promise<void> {
    const diedAlone = await this.#waitForDeath();
    await this.#parts.cgroup
      .killAll()
      .catch((error: unknown) => this.#parts.log.error({ err: error, cell: this.cellId }, "a process of the cell does not die"));
    const end = await this.#describeEnd(diedAlone);
    this.#state = "ended";
    this.#connected.reject(new ForgeError("CELL_FAILED", `the cell has ended: ${end.reason}`));
    this.#end.resolve(end);
    this.#handlers.ended?.(end);
  }

  /** The channel ends with the VMM; when it ended before, the VMM has no more to do. */
  async #waitForDeath(): Promise<boolean> {
    const { vmm } = this.#parts;
    const deadline = performance.now() + (this.#failure === undefined ? powerOffMs : 500);
    for (let pauseMs = 1; performance.now() < deadline; pauseMs = Math.min(pauseMs * 2, 100)) {
      if (!(await vmm.isAlive())) return true;
      await Promise.race([delay(pauseMs), vmm.exited ?? delay(pauseMs)]);
    }
    return !(await vmm.isAlive());
  }

  async #describeEnd(diedAlone: boolean): Promise<CellEnd> {
    const status = this.#status;
    if (status !== null) {
      const reason =
        "code" in status ? `the entrypoint exited with status ${status.code}` : `the entrypoint was killed by signal ${status.signal}`;
      return { status, failure: null, reason };
    }
    if (this.#request !== undefined) return { status, failure: null, reason: `the cell was ${this.#request}` };
    const failure = this.#failure;
    if (failure !== undefined && !diedAlone) return failed(failure.code, failure.message);
    if (failure?.details?.["guest"] !== undefined) return failed(failure.code, failure.message);
    if (this.#parts.cgroup.memoryKills() > 0) return failed("CELL_FAILED", "the microVM was killed: it needed more memory than its limit");
    const words = guestText(await readDiagnostics(this.#parts.cellDir).catch(() => ""));
    return failed("CELL_FAILED", words === "" ? "the microVM died" : `the microVM died: ${words}`);
  }
}

function guestFailure(code: string, message: string): ForgeError {
  return new ForgeError("CELL_FAILED", `the guest gave up: ${message}`, { details: { guest: code } });
}

function failed(code: ErrorCode, reason: string): CellEnd {
  return { status: null, failure: { code, reason }, reason };
}
