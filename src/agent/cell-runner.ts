import { closeSync } from "node:fs";
import type { CellAssignment, CellReport } from "../api/node.ts";
import { durationMs, memoryBytes } from "../api/manifest.ts";
import type { Clock } from "../base/clock.ts";
import { type ErrorCode, ForgeError, toForgeError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";
import type { Cell, CellEnd, CellHandlers, ExecOptions, ExecSession, IsoCells } from "../isocell/index.ts";
import type { RootfsArtifact } from "../isocell/image/index.ts";
import type { Attachment } from "../mesh/index.ts";
import { CellJournal, type JournalTools } from "./cell-journal.ts";
import { CellNetwork } from "./cell-network.ts";
import { type CellRecord, newRecord } from "./cell-records.ts";
import type { CpuPool } from "./cpus.ts";
import { guestConfigOf } from "./guest-config.ts";
import { HealthCheck } from "./health-check.ts";
import type { NodeImages } from "./images.ts";
import type { CellLog } from "./logs.ts";

/** What every runner works with; made once, in node-agent.ts. */
export interface RunnerTools extends JournalTools {
  readonly isocells: IsoCells;
  readonly images: NodeImages;
  readonly cpus: CpuPool;
  readonly clock: Clock;
  readonly log: Logger;
  readonly publishAddress: string;
  /** Address of the host's end of every tap; resolves once the region ever told this node. */
  readonly gateway: Promise<string>;
}

/** How a stay with a cell came to its end. */
type Outcome =
  | { readonly kind: "asked" }
  | { readonly kind: "ended"; readonly end: CellEnd }
  | { readonly kind: "error"; readonly error: ForgeError };
type Ending = Exclude<Outcome, { kind: "asked" }>;

const backoffMsLeast = 500;
const backoffMsMost = 60_000;
/** A cell that ran this long starts again at the least backoff. */
const settledMs = 60_000;
const readyMsWithoutHealth = 120_000;
const troublePauseMs = 2000;

/** Errors that trying again cannot mend: somebody must act. */
const refusals: ReadonlySet<ErrorCode> = new Set([
  "IMAGE_UNSIGNED",
  "IMAGE_SIGNATURE_UNTRUSTED",
  "IMAGE_SIGNATURE_MISMATCH",
  "IMAGE_CORRUPT",
  "IMAGE_REFUSED",
  "IMAGE_TAMPERED",
]);
/** Errors of the surroundings: they pass, and a restart policy has no say in them. */
const passing: ReadonlySet<ErrorCode> = new Set(["UNAVAILABLE", "TIMEOUT", "DISK_FULL", "AUDIT_UNAVAILABLE"]);

/**
 * One cell's life on this node: prepare -> attach -> start -> ready -> (end -> backoff -> again), until it is no longer
 * desired. Whatever happens, `#release` leaves nothing of a boot behind before the next begins.
 */
export class CellRunner {
  readonly #tools: RunnerTools;
  readonly #journal: CellJournal;
  readonly #network: CellNetwork;
  #cell: Cell | undefined;
  /** Whether what an earlier agent left was looked for. */
  #hasLooked = false;
  #bootedAtMs = 0;
  /** When this boot's entrypoint started, by the monotonic clock. */
  #started = Promise.withResolvers<number>();
  #backoffMs = backoffMsLeast;
  /** Aborted, and replaced, whenever what is desired of this cell changes. */
  #change = new AbortController();
  #halted = false;
  #abandoned = false;
  readonly #living: Promise<void>;

  /** Takes on a new cell; durable before anything of it exists. */
  static async begin(assignment: CellAssignment, tools: RunnerTools): Promise<CellRunner> {
    const record = newRecord(assignment);
    await tools.records.write(record);
    return CellRunner.resume(record, tools);
  }

  /** Takes over a cell that an earlier agent began: a running one stays as it is. */
  static async resume(record: CellRecord, tools: RunnerTools, attachment?: Attachment): Promise<CellRunner> {
    return new CellRunner(await CellJournal.open(record, tools), tools, attachment);
  }

  private constructor(journal: CellJournal, tools: RunnerTools, attachment: Attachment | undefined) {
    this.#tools = tools;
    this.#journal = journal;
    this.#network = new CellNetwork(
      journal.assignment,
      { stateDir: `${tools.dir}/mesh`, publishAddress: tools.publishAddress },
      attachment,
    );
    this.#living = this.#live();
  }

  get id(): string {
    return this.#journal.assignment.id;
  }

  get log(): CellLog {
    return this.#journal.log;
  }

  get report(): CellReport {
    return this.#journal.report;
  }

  /** What the region now says of the cell. Only whether it is to run, and whose signatures count, ever changes. */
  async update(assignment: CellAssignment): Promise<void> {
    if (JSON.stringify(assignment) === JSON.stringify(this.#journal.assignment)) return;
    const isAsked = assignment.desired !== this.#journal.assignment.desired;
    this.#journal.assignment = assignment;
    if (isAsked) this.#journal.isOver = false;
    await this.#journal.save();
    if (isAsked) this.#signalChange();
  }

  async exec(options: ExecOptions): Promise<ExecSession> {
    if (this.#cell === undefined) throw new ForgeError("CONFLICT", `the cell is ${this.report.state}: it can run nothing now`);
    return this.#cell.exec(options);
  }

  /** Stops the cell, and forgets it and its lines. */
  async remove(): Promise<void> {
    await this.halt();
    await this.#journal.erase();
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
    while (!this.#abandoned && !(this.#halted && this.#isAtRest)) {
      const change = this.#change.signal; // before anything is looked at: what changes from here on is not missed
      try {
        await this.#step(change);
      } catch (error) {
        // What was to happen could not even be recorded, or not be undone: nothing goes on until it can.
        const { code, message } = toForgeError(error);
        this.#tools.log.error({ cell: this.id, code, err: message }, "a cell cannot go on for now");
        this.#journal.tell({ reason: `${code}: ${message}` });
        await this.#pause(troublePauseMs, change);
      }
    }
  }

  async #step(change: AbortSignal): Promise<void> {
    if (!this.#hasLooked) return this.#lookForRunning(change);
    if (this.#halted || this.#journal.assignment.desired !== "running") {
      await this.#rest();
      return this.#halted ? undefined : aborted(change);
    }
    if (this.#journal.isOver) return aborted(change);
    const outcome = await this.#stay(change);
    if (outcome.kind === "asked" || this.#abandoned) return; // a running cell is stopped in order by #rest
    await this.#release();
    await this.#afterEnd(outcome, change);
  }

  get #isAtRest(): boolean {
    return this.#hasLooked && this.#cell === undefined && (this.report.state === "stopped" || this.report.state === "failed");
  }

  /** The boot an earlier agent left: taken over where it runs, undone and accounted for where it does not. */
  async #lookForRunning(change: AbortSignal): Promise<void> {
    this.#cell ??= await this.#tools.isocells.reattach(this.id, this.#handlers(), await this.log.lastSequence(this.#journal.boot));
    if (this.#cell !== undefined) {
      const { measurement } = this.#cell;
      await this.#journal.fact("cell.reattached", "success", { measurement });
      this.#journal.tell({ measurement });
      this.#hasLooked = true;
      return;
    }
    await this.#release();
    this.#hasLooked = true;
    if (this.report.measurement === null || this.#isAtRest) return;
    const reason = "the microVM ended while no agent watched";
    await this.#afterEnd({ kind: "ended", end: { status: null, failure: { code: "CELL_FAILED", reason }, reason } }, change);
  }

  /** Brings the cell up (unless it already runs) and stays with it until it ends, or until something else is desired. */
  async #stay(change: AbortSignal): Promise<Outcome> {
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
      return first.kind === "error" && cell.isEnding ? await ended : first;
    } catch (error) {
      return change.aborted ? { kind: "asked" } : { kind: "error", error: toForgeError(error) };
    }
  }

  /** Image -> interface and policy -> VM: in this order, the facts durable before the VM exists. */
  async #bring(signal: AbortSignal): Promise<Cell> {
    const { assignment } = this.#journal;
    const { spec } = assignment;
    this.#journal.boot += 1;
    const nothing = { reason: null, exitStatus: null, measurement: null, startedAt: null, phases: {}, published: [] };
    this.#journal.tell({ state: "preparing", ...nothing });
    this.#network.checkPorts();
    const gateway = await Promise.race([this.#tools.gateway, aborted(signal)]);
    if (gateway === undefined) throw new ForgeError("UNAVAILABLE", "the region has not yet told this node its network");
    const artifact = await this.#timed("prepareMs", () => this.#tools.images.prepare(assignment.image, signal));
    signal.throwIfAborted();
    this.#journal.cpus = this.#tools.cpus.allocate(this.id, spec.vcpus);
    const attachment = await this.#timed("attachMs", async () => this.#network.attach(gateway));
    const guest = guestConfigOf(assignment, artifact, attachment);
    const tapFd = attachment.openTap();
    try {
      this.#journal.tell({ state: "starting" });
      this.#bootedAtMs = this.#tools.clock.monotonicMs();
      this.#started = Promise.withResolvers();
      const size = { vcpus: spec.vcpus, memoryMib: memoryBytes(spec.memory) / (1024 * 1024), cpus: this.#journal.cpus };
      const network = { netnsPath: attachment.netnsPath, tapFd, guestMac: attachment.guestMac };
      const handlers = { ...this.#handlers(), measured: (measurement: string) => this.#recordStart(artifact, measurement) };
      return await this.#tools.isocells.start({ cellId: this.id, artifact, guest, ...size, network }, handlers);
    } finally {
      closeSync(tapFd);
    }
  }

  /** One durable write for the facts that stand before the VM exists. */
  async #recordStart(artifact: RootfsArtifact, measurement: string): Promise<void> {
    const { image, address } = this.#journal.assignment;
    const { name: vmm, emulated } = this.#tools.isocells.vmm;
    this.#journal.tell({ measurement, vmm, emulated });
    const facts = [
      this.#journal.factOf("cell.prepared", "success", { imageDigest: image.digest, rootHash: artifact.rootHash }),
      this.#journal.factOf("cell.attached", "success", { address, allow: this.#network.allowedPorts.length }),
      this.#journal.factOf("cell.started", "success", { measurement, vmm, emulated }),
    ];
    await Promise.all([this.#journal.facts(...facts), this.#journal.save()]);
  }

  #handlers(): CellHandlers {
    const { boot } = this.#journal;
    return {
      started: () => this.#started.resolve(this.#tools.clock.monotonicMs()),
      log: (log) => this.#journal.keep(boot, log),
      dropped: ({ fromSequence, toSequence }) =>
        this.#journal.say(`${toSequence - fromSequence + 1} pieces of output were lost while nobody could take them`),
    };
  }

  /** Waits for readiness, publishes, and then watches health until the signal. Rejects when the cell must end. */
  async #serve(cell: Cell, signal: AbortSignal): Promise<Outcome> {
    if (this.report.state !== "running") await this.#becomeReady(cell, signal);
    else await this.#network.publish(cell.cgroupProcsFiles); // by an earlier agent; what lives is left alone
    await this.#watch(cell, signal);
    return { kind: "asked" };
  }

  async #becomeReady(cell: Cell, signal: AbortSignal): Promise<void> {
    const { health } = this.#journal.assignment.spec;
    const graceMs = health === undefined ? readyMsWithoutHealth : durationMs(health.grace);
    const detail = await this.#notReadyBecause(cell, AbortSignal.any([signal, AbortSignal.timeout(graceMs)]));
    signal.throwIfAborted();
    if (detail !== undefined) throw new ForgeError("GUEST_NOT_READY", `the cell did not become ready within ${graceMs} ms: ${detail}`);
    const published = await this.#network.publish(cell.cgroupProcsFiles);
    signal.throwIfAborted();
    const nowMs = this.#tools.clock.monotonicMs();
    const entrypointMs = nowMs - (await this.#started.promise);
    await this.#journal.fact("cell.ready", "success", { afterMs: Math.round(nowMs - this.#bootedAtMs) });
    const phases = { ...this.report.phases, ...cell.phases, entrypointMs };
    this.#journal.tell({ state: "running", startedAt: new Date().toISOString(), published, phases });
    await this.#journal.save();
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
    const failures = this.#journal.assignment.spec.health?.failures;
    await this.#journal.fact("cell.unhealthy", "failure", { failures });
    throw new ForgeError("CELL_FAILED", `its health check failed ${failures} times in a row: ${detail}`);
  }

  #healthOf(cell: Cell): HealthCheck | undefined {
    const { health } = this.#journal.assignment.spec;
    return health === undefined ? undefined : new HealthCheck(cell, health, this.#tools.clock);
  }

  /** As desired: not running. Graceful first. */
  async #rest(): Promise<void> {
    if (this.#isAtRest) return;
    this.#journal.tell({ state: "stopping", reason: null });
    await this.#network.unpublish();
    const end = await this.#cell?.stop(durationMs(this.#journal.assignment.spec.stopTimeout));
    await this.#release();
    const exitStatus = end === undefined ? null : exitStatusOf(end);
    await this.#journal.fact("cell.stopped", "success", { exitStatus, graceful: exitStatus !== null });
    this.#journal.tell({ state: "stopped", exitStatus, published: [] });
    await this.#journal.save();
  }

  /** The cell ended by itself, or could not be brought up: again after a pause, or rest, as its policy says. */
  async #afterEnd(ending: Ending, change: AbortSignal): Promise<void> {
    const exitStatus = ending.kind === "ended" ? exitStatusOf(ending.end) : null;
    const reason = ending.kind === "ended" ? ending.end.reason : `${ending.error.code}: ${ending.error.message}`;
    const code = ending.kind === "ended" ? "CELL_FAILED" : ending.error.code;
    await this.#journal.say(reason);
    if (refusals.has(code))
      await this.#journal.fact("cell.refused", "denied", { code, imageDigest: this.#journal.assignment.image.digest });
    else if (this.report.measurement !== null) await this.#journal.fact("cell.exited", "failure", { exitStatus, reason });
    if (refusals.has(code) || !(passing.has(code) || this.#mayRestart(exitStatus))) return this.#giveUp(exitStatus, reason, code);
    if (this.#tools.clock.monotonicMs() - this.#bootedAtMs > settledMs) this.#backoffMs = backoffMsLeast;
    const delayMs = this.#backoffMs;
    this.#backoffMs = Math.min(this.#backoffMs * 2, backoffMsMost);
    const restarts = this.report.restarts + 1;
    await this.#journal.fact("cell.restarting", "success", { restarts, delayMs, reason });
    this.#journal.tell({ state: "backoff", reason, exitStatus, measurement: null, restarts, published: [] });
    await this.#journal.save();
    await this.#pause(delayMs, change);
  }

  #mayRestart(exitStatus: number | null): boolean {
    const { restart } = this.#journal.assignment.spec;
    return restart === "always" || (restart === "on-failure" && exitStatus !== 0);
  }

  async #giveUp(exitStatus: number | null, reason: string, code: ErrorCode): Promise<void> {
    const isFailure = exitStatus !== 0;
    if (isFailure) await this.#journal.fact("cell.failed", "failure", { code, reason });
    this.#journal.isOver = true;
    this.#journal.tell({ state: isFailure ? "failed" : "stopped", reason, exitStatus, published: [] });
    await this.#journal.save();
  }

  /** Nothing of the boot is left after this: idempotent, in the reverse order of making. */
  async #release(): Promise<void> {
    this.#cell = undefined;
    await this.#network.unpublish();
    await this.#tools.isocells.remove(this.id);
    this.#network.detach();
    this.#tools.cpus.free(this.id);
    this.#journal.cpus = null;
  }

  async #timed<T>(phase: "prepareMs" | "attachMs", work: () => Promise<T>): Promise<T> {
    const begunMs = this.#tools.clock.monotonicMs();
    const result = await work();
    this.#journal.tell({ phases: { ...this.report.phases, [phase]: this.#tools.clock.monotonicMs() - begunMs } });
    return result;
  }

  /** Ends early when what is desired changes. */
  async #pause(ms: number, change: AbortSignal): Promise<void> {
    await this.#tools.clock.sleep(ms, change).catch(() => undefined);
  }

  #signalChange(): void {
    this.#change.abort();
    this.#change = new AbortController();
  }
}

/** Resolves when the signal is aborted. */
async function aborted(signal: AbortSignal): Promise<undefined> {
  if (signal.aborted) return;
  await new Promise<void>((resolve) => signal.addEventListener("abort", () => resolve(), { once: true }));
}

/** As a shell tells it: the status, or 128 and the signal's number. */
function exitStatusOf({ status }: CellEnd): number | null {
  if (status === null) return null;
  return "code" in status ? status.code : 128 + status.signal;
}
