import { constants } from "node:os";
import type { CellAssignment, CellReport } from "../api/node.ts";
import { durationMs, memoryBytes } from "../api/manifest.ts";
import type { AuditEvent } from "../audit/index.ts";
import type { Clock } from "../base/clock.ts";
import { ForgeError, toForgeError } from "../base/errors.ts";
import { closeSync } from "node:fs";
import type { Logger } from "../base/log.ts";
import type { Cell, CellEnd, CellHandlers, ExecOptions, ExecSession, GuestConfig, IsoCells } from "../isocell/index.ts";
import type { RootfsArtifact } from "../isocell/image/index.ts";
import { attach, type Attachment, checkPublishable, detach, publish, unpublish } from "../mesh/index.ts";
import type { CellRecord, CellRecords } from "./cell-records.ts";
import type { CpuPool } from "./cpus.ts";
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
const probePauseMsLeast = 25;
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
  #assignment: CellAssignment;
  #boot: number;
  /** Host CPUs this boot has for itself; null: shared. */
  #cpus: readonly number[] | null;
  #report: CellReport;
  #cell: Cell | undefined;
  #attachment: Attachment | undefined;
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
    const record: CellRecord = { assignment, boot: 0, report: firstReport(assignment), cpus: null };
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
    this.#attachment = attachment;
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
    try {
      const cell = (this.#cell ??= await this.#bring(change));
      const ended = cell.ended.then((end): Outcome => ({ kind: "ended", end }));
      const asked = aborted(change).then((): Outcome => ({ kind: "asked" }));
      const served = this.#serve(cell, change).catch((error: unknown): Outcome => ({ kind: "error", error: toForgeError(error) }));
      // A guest that dies makes probes fail too: what it said of its end is the better reason.
      const first = await Promise.race([ended, asked, served]);
      return first.kind === "error" && cell.state === "ended" ? await ended : first;
    } catch (error) {
      return change.aborted ? { kind: "asked" } : { kind: "error", error: toForgeError(error) };
    }
  }

  /** Image -> interface and policy -> VM: in this order, each fact durable before the next act. */
  async #bring(signal: AbortSignal): Promise<Cell> {
    this.#boot += 1;
    this.#set({ state: "preparing", reason: null, exitStatus: null, measurement: null, startedAt: null, phases: {}, published: [] });
    this.#checkPorts();
    const artifact = await this.#timed("prepareMs", () => this.#tools.images.prepare(this.#assignment.image, signal));
    signal.throwIfAborted();
    const { spec } = this.#assignment;
    this.#cpus = this.#tools.cpus.allocate(this.id, spec.vcpus);
    const [attachment] = await this.#timed("attachMs", () => Promise.all([this.#attach(), this.#write()]));
    this.#attachment = attachment;
    const guest = this.#guestConfig(artifact, attachment);
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
    else await this.#publish(); // by an earlier agent; what lives is left alone
    await this.#watch(cell, signal);
    return { kind: "asked" };
  }

  async #becomeReady(cell: Cell, signal: AbortSignal): Promise<void> {
    const { health } = this.#assignment.spec;
    const graceMs = health === undefined ? readyMsWithoutHealth : durationMs(health.grace);
    const deadline = AbortSignal.any([signal, AbortSignal.timeout(graceMs)]);
    const detail = await this.#firstSuccess(cell, deadline);
    signal.throwIfAborted();
    if (detail !== undefined) throw new ForgeError("GUEST_NOT_READY", `the cell did not become ready within ${graceMs} ms: ${detail}`);
    const published = await this.#publish();
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

  /** Undefined when ready; else what the last probe said when time was up. */
  async #firstSuccess(cell: Cell, deadline: AbortSignal): Promise<string | undefined> {
    const { health } = this.#assignment.spec;
    await Promise.race([this.#started.promise, aborted(deadline)]);
    if (deadline.aborted) return "its program did not start";
    if (health === undefined) return undefined;
    let detail = "it was not asked yet";
    for (let pauseMs = probePauseMsLeast; !deadline.aborted; pauseMs = Math.min(pauseMs * 1.5, durationMs(health.interval))) {
      const result = await this.#probe(cell);
      if (result.ok) return undefined;
      detail = result.detail;
      await this.#tools.clock.sleep(pauseMs, deadline).catch(() => undefined); // time is up: the loop ends
    }
    return detail;
  }

  /** Resolves at the change; rejects when health failed too often in a row. */
  async #watch(cell: Cell, signal: AbortSignal): Promise<void> {
    const { health } = this.#assignment.spec;
    if (health === undefined) return aborted(signal);
    let failures = 0;
    while (!signal.aborted) {
      await this.#tools.clock.sleep(durationMs(health.interval), signal).catch(() => undefined); // changed: the loop ends
      if (signal.aborted) return;
      const result = await this.#probe(cell);
      failures = result.ok ? 0 : failures + 1;
      if (failures < health.failures) continue;
      await this.#fact("cell.unhealthy", "failure", { failures });
      throw new ForgeError("CELL_FAILED", `its health check failed ${failures} times in a row: ${result.detail}`);
    }
  }

  #probe(cell: Cell): Promise<{ ok: boolean; detail: string }> {
    const { health } = this.#assignment.spec;
    const httpPath = health?.http === undefined ? {} : { httpPath: health.http };
    return cell.probe({ port: health?.port ?? 0, timeoutMs: durationMs(health?.timeout ?? "1s"), ...httpPath });
  }

  /** Known taken before anything is made; the listener itself comes with readiness. */
  #checkPorts(): void {
    for (const { publish: port } of this.#assignment.spec.ports) {
      if (port !== undefined) checkPublishable(this.#tools.publishAddress, port, this.#meshDir);
    }
  }

  async #attach(): Promise<Attachment> {
    const ports = this.#assignment.spec.ports.filter(({ publish: published }) => published !== undefined).map(({ port }) => port);
    if (this.#tools.gateway === "") throw new ForgeError("UNAVAILABLE", "the control plane has not yet told this node its network");
    return attach({
      cellId: this.id,
      address: this.#assignment.address,
      gateway: this.#tools.gateway,
      allow: { ports },
      stateDir: this.#meshDir,
    });
  }

  async #publish(): Promise<CellReport["published"]> {
    const { spec, address } = this.#assignment;
    const netnsPath = this.#attachment?.netnsPath;
    const cgroupProcsFiles = this.#cell?.cgroupProcsFiles;
    if (netnsPath === undefined || cgroupProcsFiles === undefined)
      throw new ForgeError("INTERNAL", "a cell without an interface cannot be published");
    const published: CellReport["published"] = [];
    for (const { name, port, publish: publishedPort } of spec.ports) {
      if (publishedPort === undefined) continue;
      const listenAddress = this.#tools.publishAddress;
      await publish({
        cellId: this.id,
        netnsPath,
        cgroupProcsFiles,
        listenAddress,
        publishedPort,
        cellAddress: address,
        cellPort: port,
        stateDir: this.#meshDir,
      });
      published.push({ name, address: listenAddress, port: publishedPort });
    }
    return published;
  }

  /** What the image says, and over it what the manifest says. */
  #guestConfig(artifact: RootfsArtifact, attachment: Attachment): GuestConfig {
    const { spec, service } = this.#assignment;
    const { config } = artifact;
    const argv = spec.command ?? [...config.entrypoint, ...config.cmd];
    if (argv.length === 0) throw new ForgeError("INVALID_INPUT", "neither the image nor the manifest says which program to run");
    return {
      cellId: this.id,
      hostname: `${service}-${this.id.slice(-6)}`,
      argv,
      env: { ...Object.fromEntries(config.env.map(splitVariable)), ...spec.env },
      cwd: config.workingDir === "" ? "/" : config.workingDir,
      user: spec.user ?? config.user,
      stopSignal: signalNumber(config.stopSignal),
      address: attachment.address,
      gateway: attachment.gateway,
      gatewayMac: attachment.gatewayMac,
      mtu: attachment.mtu,
    };
  }

  /** One durable write for the three facts that stand before the VM exists. */
  async #recordStart(artifact: RootfsArtifact, measurement: string): Promise<void> {
    const { image, address, spec } = this.#assignment;
    const allow = spec.ports.filter(({ publish: published }) => published !== undefined).length;
    const { vmm } = this.#tools.isocells;
    await this.#tools.record(
      this.#factOf("cell.prepared", "success", { imageDigest: image.digest, rootHash: artifact.rootHash }),
      this.#factOf("cell.attached", "success", { address, allow }),
      this.#factOf("cell.started", "success", { measurement, vmm: vmm.name, emulated: vmm.emulated }),
    );
    this.#set({ measurement, vmm: vmm.name, emulated: vmm.emulated });
  }

  #handlers(): CellHandlers {
    const boot = this.#boot;
    return {
      started: () => this.#started.resolve(this.#tools.clock.monotonicMs()),
      log: ({ sequence, time, stream, bytes }) => this.log.append(boot, sequence, time, stream, bytes),
      dropped: ({ fromSequence, toSequence }) =>
        void this.#say(`${toSequence - fromSequence + 1} pieces of output were lost while nobody could take them`),
    };
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
    await unpublish(this.id, this.#meshDir);
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
    await unpublish(this.id, this.#meshDir);
    await this.#tools.isocells.remove(this.id);
    detach(this.id, this.#meshDir);
    this.#attachment = undefined;
    this.#tools.cpus.free(this.id);
    this.#cpus = null;
  }

  get #meshDir(): string {
    return `${this.#tools.dir}/mesh`;
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

function firstReport(assignment: CellAssignment): CellReport {
  const nothing = { reason: null, measurement: null, vmm: null, emulated: null, exitStatus: null, startedAt: null };
  return { id: assignment.id, revision: assignment.revision, state: "assigned", restarts: 0, phases: {}, published: [], ...nothing };
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

function splitVariable(text: string): [string, string] {
  const at = text.indexOf("=");
  return at === -1 ? [text, ""] : [text.slice(0, at), text.slice(at + 1)];
}

/** Number of `SIGQUIT`, `QUIT` or `3`; SIGTERM where the image names none. */
function signalNumber(name: string): number {
  if (name === "") return constants.signals.SIGTERM;
  if (/^[0-9]{1,2}$/.test(name)) return Number(name);
  const key = name.startsWith("SIG") ? name : `SIG${name}`;
  return (constants.signals as Record<string, number>)[key] ?? constants.signals.SIGTERM;
}
