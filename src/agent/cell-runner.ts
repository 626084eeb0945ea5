import type { CellAssignment, CellReport } from "../api/node.ts";
import { durationMs, memoryBytes } from "../api/manifest.ts";
import type { AuditEvent } from "../audit/index.ts";
import type { Clock } from "../base/clock.ts";
import { ForgeError, toForgeError } from "../base/errors.ts";
import { closeSync } from "node:fs";
import type { Logger } from "../base/log.ts";
import type { Cell, CellEnd, CellHandlers, ExecOptions, ExecSession, IsoCells } from "../isocell/index.ts";
import type { RootfsArtifact } from "../isocell/image/index.ts";
import type { Attachment } from "../mesh/index.ts";
import { CellNetwork } from "./cell-network.ts";
import { type CellRecord, type CellRecords, newRecord } from "./cell-records.ts";
import type { CpuPool } from "./cpus.ts";
import { guestConfigOf } from "./guest-config.ts";
import { HealthCheck } from "./health-check.ts";
import type { NodeImages } from "./images.ts";
import { CellLog } from "./logs.ts";

/** What every runner works with; made once, in node-agent.ts. */
export interface RunnerTools {
  readonly isocells: IsoCells;
  readonly images: NodeImages;
  readonly cpus: CpuPool;
  readonly records: CellRecords;
  readonly clock: Clock;
  readonly log: Logger;
  readonly dir: string;
  readonly publishAddress: string;
  /** Address of the host's end of every tap; set when the control plane answered the first greeting. */
  gateway: string;
  /** Puts facts into the node's audit spool; resolves when they are durable. No fact, no action. */
  record(...facts: Omit<AuditEvent, "id" | "time" | "actor">[]): Promise<void>;
  /** The cell's report is another. */
  changed(cellId: string): void;
}

type Outcome =
  | { readonly kind: "asked" }
  | { readonly kind: "ended"; readonly end: CellEnd }
  | { readonly kind: "error"; readonly error: ForgeError };

const backoffMsLeast = 500;
const backoffMsMost = 60_000;
/** A cell that ran this long starts again at the least backoff. */
const settledMs = 60_000;
const readyMsWithoutHealth = 120_000;
/** Errors that trying again cannot mend: somebody must act. */
const refusals = new Set([
  "IMAGE_UNSIGNED",
  "IMAGE_SIGNATURE_UNTRUSTED",
  "IMAGE_SIGNATURE_MISMATCH",
  "IMAGE_CORRUPT",
  "IMAGE_REFUSED",
  "IMAGE_TAMPERED",
]);

/**
 * One cell's life on this node: prepare -> attach -> start -> ready -> (exit -> backoff -> again), until it is no
 * longer desired. Whatever happens, `#release` leaves nothing of a boot behind before the next begins.
 */
export class CellRunner {
  readonly log: CellLog;
  readonly #tools: RunnerTools;
  readonly #network: CellNetwork;
  #assignment: CellAssignment;
  #boot: number;
  /** Host CPUs this boot has for itself; null: shared. */
  #cpus: readonly number[] | null;
  #report: CellReport;
  #cell: Cell | undefined;
  #bootedAtMs = 0;
  /** When this boot's entrypoint started, by the monotonic clock. */
  #started = Promise.withResolvers<number>();
  #backoffMs = backoffMsLeast;
  /** Aborted, and replaced, whenever what is desired of this cell changes. */
  #change = new AbortController();
  #isLogFailing = false;
  #halted = false;
  #abandoned = false;
  readonly #living: Promise<void>;

  /** Takes on a new cell; durable before anything of it exists. */
  static async begin(assignment: CellAssignment, tools: RunnerTools): Promise<CellRunner> {
    const record = newRecord(assignment);
    await tools.records.write(record);
    return CellRunner.resume(record, tools);
  }

  /** Takes over a cell that an earlier agent began: running ones stay as they are. */
  static async resume(record: CellRecord, tools: RunnerTools, attachment?: Attachment): Promise<CellRunner> {
    const log = await CellLog.open(`${tools.dir}/logs/${record.assignment.id}`, record.assignment.id);
    return new CellRunner(record, log, tools, attachment);
  }

  private constructor(record: CellRecord, log: CellLog, tools: RunnerTools, attachment: Attachment | undefined) {
    this.#tools = tools;
    this.log = log;
    this.#assignment = record.assignment;
    this.#boot = record.boot;
    this.#cpus = record.cpus;
    this.#network = new CellNetwork(record.assignment, { stateDir: `${tools.dir}/mesh`, publishAddress: tools.publishAddress }, attachment);
    this.#report = record.report;
    tools.cpus.adopt(record.assignment.id, record.cpus);
    this.#living = this.#live();
  }

  get id(): string {
    return this.#assignment.id;
  }

  report(): CellReport {
    return this.#report;
  }

  /** What is desired changed. A stopped cell may run again; nothing else of a cell ever changes. */
  async update(assignment: CellAssignment): Promise<void> {
    if (assignment.desired === this.#assignment.desired) return;
    this.#assignment = assignment;
    await this.#write();
    this.#signalChange();
  }

  async exec(options: ExecOptions): Promise<ExecSession> {
    if (this.#cell === undefined) throw new ForgeError("CONFLICT", `the cell is ${this.#report.state}: it can run nothing now`);
    return this.#cell.exec(options);
  }

  /** Stops the cell, and forgets it and its logs. */
  async remove(): Promise<void> {
    await this.halt();
    await this.log.remove();
    await this.#tools.records.remove(this.id);
  }

  /** Stops the cell now, whatever is desired; the record stays. */
  async halt(): Promise<void> {
    this.#halted = true;
    this.#signalChange();
    await this.#living;
  }

  /** The agent ends: the cell runs on. */
  abandon(): void {
    this.#abandoned = true;
    this.#signalChange();
  }

  async #live(): Promise<void> {
    this.#cell = await this.#findRunning();
    while (!this.#abandoned && !this.#isDone()) {
      try {
        await this.#step();
      } catch (error) {
        // What was to happen could not even be recorded, or not be undone: nothing goes on until it can.
        const { code, message } = toForgeError(error);
        this.#tools.log.error({ cell: this.id, code, err: message }, "a cell cannot go on for now");
        this.#set({ reason: `${code}: ${message}` });
        await this.#pause();
      }
    }
  }

  async #step(): Promise<void> {
    if (!this.#isWanted()) {
      await this.#rest();
      if (!this.#halted) await this.#untilChange();
      return;
    }
    const outcome = await this.#attempt();
    if (outcome.kind === "asked" || this.#abandoned) return; // a running cell is stopped in order by #rest
    await this.#release();
    await this.#afterEnd(outcome);
  }

  #isDone(): boolean {
    return this.#halted && this.#report.state === "stopped";
  }

  #isWanted(): boolean {
    return !this.#halted && this.#assignment.desired === "running";
  }

  /** The boot an earlier agent left running, or nothing; then nothing of it is left either. */
  async #findRunning(): Promise<Cell | undefined> {
    try {
      const lastLogSequence = await this.log.lastSequence(this.#boot);
      const cell = await this.#tools.isocells.reattach(this.id, this.#handlers(), lastLogSequence);
      if (cell === undefined) {
        if (this.#boot > 0) await this.#release();
        return undefined;
      }
      await this.#fact("cell.reattached", "success", { measurement: cell.measurement });
      this.#set({ measurement: cell.measurement });
      return cell;
    } catch (error) {
      this.#tools.log.error(
        { cell: this.id, err: toForgeError(error).message },
        "a cell left by an earlier agent cannot be taken over: it is started anew",
      );
      await this.#release();
      return undefined;
    }
  }

  /** Brings the cell up (unless it already runs) and stays with it until it ends, or until something else is desired. */
  async #attempt(): Promise<Outcome> {
    const change = this.#change.signal;
    const over = new AbortController();
    try {
      const cell = (this.#cell ??= await this.#bring(change));
      const ended = cell.ended.then((end): Outcome => ({ kind: "ended", end }));
      const asked = aborted(change).then((): Outcome => ({ kind: "asked" }));
      const served = this.#serve(cell, AbortSignal.any([change, over.signal])).catch((error: unknown): Outcome => ({
        kind: "error",
        error: toForgeError(error),
      }));
      const first = await Promise.race([ended, asked, served]);
      over.abort();
      await served; // what it was about to open must be there to be closed
      // A guest that dies makes probes fail too: what it said of its end is the better reason.
      return first.kind === "error" && cell.state === "ended" ? await ended : first;
    } catch (error) {
      return change.aborted ? { kind: "asked" } : { kind: "error", error: toForgeError(error) };
    }
  }

  /** Image -> interface and policy -> VM: in this order, each fact durable before the next act. */
  async #bring(signal: AbortSignal): Promise<Cell> {
    this.#boot += 1;
    this.#set({ state: "preparing", reason: null, exitStatus: null, measurement: null, startedAt: null, phases: {}, published: [] });
    this.#network.checkPorts();
    const artifact = await this.#timed("prepareMs", () => this.#tools.images.prepare(this.#assignment.image, signal));
    signal.throwIfAborted();
    const { spec } = this.#assignment;
    this.#cpus = this.#tools.cpus.allocate(this.id, spec.vcpus);
    const attachment = await this.#timed("attachMs", async () => this.#network.attach(this.#tools.gateway));
    const guest = guestConfigOf(this.#assignment, artifact, attachment);
    const tapFd = attachment.openTap();
    try {
      this.#set({ state: "starting" });
      const memoryMib = memoryBytes(spec.memory) / (1024 * 1024);
      const network = { netnsPath: attachment.netnsPath, tapFd, guestMac: attachment.guestMac };
      this.#bootedAtMs = this.#tools.clock.monotonicMs();
      this.#started = Promise.withResolvers();
      const handlers = { ...this.#handlers(), measured: (measurement: string) => this.#recordStart(artifact, measurement) };
      return await this.#tools.isocells.start(
        { cellId: this.id, artifact, guest, vcpus: spec.vcpus, memoryMib, cpus: this.#cpus, network },
        handlers,
      );
    } finally {
      closeSync(tapFd);
    }
  }

  /** Waits for readiness, publishes, and then watches health until the change. Rejects when the cell must end. */
  async #serve(cell: Cell, signal: AbortSignal): Promise<Outcome> {
    if (this.#report.state !== "running") await this.#becomeReady(cell, signal);
    else await this.#network.publish(cell.cgroupProcsFiles); // by an earlier agent; what lives is left alone
    await this.#watch(cell, signal);
    return { kind: "asked" };
  }

  async #becomeReady(cell: Cell, signal: AbortSignal): Promise<void> {
    const { health } = this.#assignment.spec;
    const graceMs = health === undefined ? readyMsWithoutHealth : durationMs(health.grace);
    const deadline = AbortSignal.any([signal, AbortSignal.timeout(graceMs)]);
    const detail = await this.#notReadyBecause(cell, deadline);
    signal.throwIfAborted();
    if (detail !== undefined) throw new ForgeError("GUEST_NOT_READY", `the cell did not become ready within ${graceMs} ms: ${detail}`);
    const published = await this.#network.publish(cell.cgroupProcsFiles);
    signal.throwIfAborted();
    const startedAtMs = await this.#started.promise;
    const entrypointMs = this.#tools.clock.monotonicMs() - startedAtMs;
    await this.#fact("cell.ready", "success", { afterMs: Math.round(this.#tools.clock.monotonicMs() - this.#bootedAtMs) });
    this.#set({
      state: "running",
      startedAt: new Date().toISOString(),
      published,
      phases: { ...this.#report.phases, ...cell.phases, entrypointMs },
    });
    await this.#write();
  }

  /** Undefined when ready; else what there is to say when time was up. */
  async #notReadyBecause(cell: Cell, deadline: AbortSignal): Promise<string | undefined> {
    await Promise.race([this.#started.promise, aborted(deadline)]);
    if (deadline.aborted) return "its program did not start";
    return this.#healthOf(cell)?.firstSuccess(deadline);
  }

  /** Resolves at the end of the signal; rejects when health failed too often in a row. */
  async #watch(cell: Cell, signal: AbortSignal): Promise<void> {
    const detail = await this.#healthOf(cell)?.lastFailure(signal);
    if (detail === undefined) return aborted(signal);
    const { failures } = this.#assignment.spec.health ?? {};
    await this.#fact("cell.unhealthy", "failure", { failures });
    throw new ForgeError("CELL_FAILED", `its health check failed ${failures} times in a row: ${detail}`);
  }

  #healthOf(cell: Cell): HealthCheck | undefined {
    const { health } = this.#assignment.spec;
    return health === undefined ? undefined : new HealthCheck(cell, health, this.#tools.clock);
  }

  /** One durable write for the three facts that stand before the VM exists. */
  async #recordStart(artifact: RootfsArtifact, measurement: string): Promise<void> {
    const { image, address } = this.#assignment;
    const { vmm } = this.#tools.isocells;
    const facts = [
      this.#factOf("cell.prepared", "success", { imageDigest: image.digest, rootHash: artifact.rootHash }),
      this.#factOf("cell.attached", "success", { address, allow: this.#network.allowedPorts.length }),
      this.#factOf("cell.started", "success", { measurement, vmm: vmm.name, emulated: vmm.emulated }),
    ];
    await Promise.all([this.#tools.record(...facts), this.#write()]);
    this.#set({ measurement, vmm: vmm.name, emulated: vmm.emulated });
  }

  #handlers(): CellHandlers {
    const boot = this.#boot;
    return {
      started: () => this.#started.resolve(this.#tools.clock.monotonicMs()),
      // A disk that is full costs the lines, not the cell.
      log: ({ sequence, time, stream, bytes }) => this.log.append(boot, sequence, time, stream, bytes).catch(() => this.#logFailed()),
      dropped: ({ fromSequence, toSequence }) =>
        void this.#say(`${toSequence - fromSequence + 1} pieces of output were lost while nobody could take them`),
    };
  }

  #logFailed(): void {
    if (!this.#isLogFailing) this.#tools.log.error({ cell: this.id }, "the cell's output cannot be written: lines are lost");
    this.#isLogFailing = true;
  }

  /** Among the cell's own lines. A disk that is full is told elsewhere. */
  async #say(text: string): Promise<void> {
    await this.log.say(this.#boot, text).catch(() => undefined);
  }

  /** As desired: not running. Graceful first. */
  async #rest(): Promise<void> {
    const cell = this.#cell;
    if (cell === undefined && this.#report.state === "stopped") return;
    this.#set({ state: "stopping", reason: null });
    await this.#network.unpublish();
    const end = await cell?.stop(durationMs(this.#assignment.spec.stopTimeout));
    await this.#release();
    const exitStatus = end === undefined ? null : exitStatusOf(end);
    await this.#fact("cell.stopped", "success", { exitStatus, graceful: exitStatus !== null });
    this.#set({ state: "stopped", exitStatus, published: [] });
    await this.#write();
  }

  /** The cell ended by itself, or could not be brought up: again after a pause, or rest, as its policy says. */
  async #afterEnd(outcome: Exclude<Outcome, { kind: "asked" }>): Promise<void> {
    const exitStatus = outcome.kind === "ended" ? exitStatusOf(outcome.end) : null;
    const reason = outcome.kind === "ended" ? outcome.end.reason : `${outcome.error.code}: ${outcome.error.message}`;
    await this.#say(reason);
    const refused = outcome.kind === "error" && refusals.has(outcome.error.code);
    if (refused) await this.#fact("cell.refused", "denied", { code: outcome.error.code, imageDigest: this.#assignment.image.digest });
    else if (outcome.kind === "ended") await this.#fact("cell.exited", "failure", { exitStatus, reason });
    if (refused || !this.#mayRestart(exitStatus))
      return this.#giveUp(exitStatus, reason, outcome.kind === "error" ? outcome.error.code : "CELL_FAILED");
    if (this.#tools.clock.monotonicMs() - this.#bootedAtMs > settledMs) this.#backoffMs = backoffMsLeast;
    const delayMs = this.#backoffMs;
    this.#backoffMs = Math.min(this.#backoffMs * 2, backoffMsMost);
    const restarts = this.#report.restarts + 1;
    await this.#fact("cell.restarting", "success", { restarts, delayMs });
    this.#set({ state: "backoff", reason, exitStatus, restarts, published: [] });
    await this.#pause(delayMs);
  }

  /** Ends early when what is desired changes. */
  async #pause(ms = backoffMsLeast * 4): Promise<void> {
    await this.#tools.clock.sleep(ms, this.#change.signal).catch(() => undefined);
  }

  #mayRestart(exitStatus: number | null): boolean {
    const { restart } = this.#assignment.spec;
    return restart === "always" || (restart === "on-failure" && exitStatus !== 0);
  }

  async #giveUp(exitStatus: number | null, reason: string, code: string): Promise<void> {
    const failed = exitStatus !== 0;
    if (failed) await this.#fact("cell.failed", "failure", { code, reason });
    this.#set({ state: failed ? "failed" : "stopped", reason, exitStatus, published: [] });
    await this.#write();
    await this.#untilChange();
  }

  /** Nothing of the boot is left after this: idempotent, in the reverse order of making. */
  async #release(): Promise<void> {
    this.#cell = undefined;
    await this.#network.unpublish();
    await this.#tools.isocells.remove(this.id);
    this.#network.detach();
    this.#tools.cpus.free(this.id);
    this.#cpus = null;
  }

  async #timed<T>(phase: "prepareMs" | "attachMs", work: () => Promise<T>): Promise<T> {
    const begunMs = this.#tools.clock.monotonicMs();
    const result = await work();
    this.#report = { ...this.#report, phases: { ...this.#report.phases, [phase]: this.#tools.clock.monotonicMs() - begunMs } };
    return result;
  }

  #set(change: Partial<CellReport>): void {
    this.#report = { ...this.#report, ...change };
    this.#tools.changed(this.id);
  }

  async #write(): Promise<void> {
    const cpus = this.#cpus === null ? null : [...this.#cpus];
    await this.#tools.records.write({ assignment: this.#assignment, boot: this.#boot, report: this.#report, cpus });
  }

  #factOf(
    kind: AuditEvent["kind"],
    outcome: AuditEvent["outcome"],
    details: Record<string, unknown>,
  ): Omit<AuditEvent, "id" | "time" | "actor"> {
    const { tenantId, service, revision } = this.#assignment;
    return { tenant: tenantId, kind, outcome, subject: `cell/${this.id}`, details: { service, revision, ...details } };
  }

  async #fact(kind: AuditEvent["kind"], outcome: AuditEvent["outcome"], details: Record<string, unknown>): Promise<void> {
    await this.#tools.record(this.#factOf(kind, outcome, details));
  }

  #signalChange(): void {
    this.#change.abort();
    this.#change = new AbortController();
  }

  async #untilChange(): Promise<void> {
    await aborted(this.#change.signal);
  }
}

/** Resolves when the signal is aborted. */
async function aborted(signal: AbortSignal): Promise<void> {
  if (signal.aborted) return;
  await new Promise<void>((resolve) => signal.addEventListener("abort", () => resolve(), { once: true }));
}

/** As a shell tells it: the status, or 128 and the signal's number. */
function exitStatusOf({ status }: CellEnd): number | null {
  if (status === null) return null;
  return "code" in status ? status.code : 128 + status.signal;
}
