import type { CellAssignment, CellReport } from "../api/node.ts";
import type { AuditEvent } from "../audit/index.ts";
import type { Logger } from "../base/log.ts";
import type { GuestLog } from "../isocell/index.ts";
import type { CellRecord, CellRecords } from "./cell-records.ts";
import { CellLog } from "./logs.ts";

export type Fact = Omit<AuditEvent, "id" | "time" | "actor">;

/** Where a journal writes to. */
export interface JournalTools {
  readonly records: CellRecords;
  readonly log: Logger;
  readonly dir: string;
  /** Puts facts into the node's audit spool; resolves when they are durable. No fact, no action. */
  record(...facts: readonly Fact[]): Promise<void>;
  /** The cell's report is another. */
  changed(cellId: string): void;
}

const reasonLengthMost = 2000;

/** All that is written of one cell: its report to the region, its record on disk, its facts in the log, its lines. */
export class CellJournal {
  readonly log: CellLog;
  assignment: CellAssignment;
  /** Boots begun, the present one included. */
  boot: number;
  /** It ended, and its policy lets it rest: nothing but a change of what is desired starts it again. */
  isOver: boolean;
  /** Host CPUs this boot has for itself; null: shared. */
  cpus: readonly number[] | null;
  readonly #tools: JournalTools;
  #report: CellReport;
  #writing: Promise<void> = Promise.resolve();
  #isLogFailing = false;

  static async open(record: CellRecord, tools: JournalTools): Promise<CellJournal> {
    const { id } = record.assignment;
    return new CellJournal(record, await CellLog.open(`${tools.dir}/logs/${id}`, id), tools);
  }

  private constructor(record: CellRecord, log: CellLog, tools: JournalTools) {
    this.log = log;
    this.assignment = record.assignment;
    this.boot = record.boot;
    this.isOver = record.isOver;
    this.cpus = record.cpus;
    this.#report = record.report;
    this.#tools = tools;
  }

  get report(): CellReport {
    return this.#report;
  }

  /** Changes what the region is told. */
  tell(change: Partial<CellReport>): void {
    const reason = change.reason === undefined || change.reason === null ? {} : { reason: change.reason.slice(0, reasonLengthMost) };
    this.#report = { ...this.#report, ...change, ...reason };
    this.#tools.changed(this.assignment.id);
  }

  /** Makes the record what it is now; durable when it resolves. Writes follow one another. */
  save(): Promise<void> {
    const cpus = this.cpus === null ? null : [...this.cpus];
    const record = { assignment: this.assignment, boot: this.boot, isOver: this.isOver, report: this.#report, cpus };
    const written = this.#writing.then(() => this.#tools.records.write(record));
    this.#writing = written.catch(() => undefined); // told to whoever asked for that write
    return written;
  }

  /** One fact, durable when it resolves. */
  async fact(kind: Fact["kind"], outcome: Fact["outcome"], details: Record<string, unknown>): Promise<void> {
    await this.#tools.record(this.factOf(kind, outcome, details));
  }

  async facts(...facts: readonly Fact[]): Promise<void> {
    await this.#tools.record(...facts);
  }

  factOf(kind: Fact["kind"], outcome: Fact["outcome"], details: Record<string, unknown>): Fact {
    const { id, tenantId, service, revision } = this.assignment;
    return { tenant: tenantId, kind, outcome, subject: `cell/${id}`, details: { service, revision, ...details } };
  }

  /** A line of the node's own among the cell's. */
  async say(text: string): Promise<void> {
    await this.log.say(this.boot, text).catch(() => this.#logFailed());
  }

  /** What the guest wrote. A disk that is full costs the lines, not the cell. */
  async keep(boot: number, { sequence, time, stream, bytes }: GuestLog): Promise<void> {
    await this.log.append(boot, sequence, time, stream, bytes).catch(() => this.#logFailed());
  }

  /** Forgets the cell and all its lines. */
  async erase(): Promise<void> {
    await this.log.remove();
    await this.#tools.records.remove(this.assignment.id);
  }

  #logFailed(): void {
    if (!this.#isLogFailing) this.#tools.log.error({ cell: this.assignment.id }, "the cell's output cannot be written: lines are lost");
    this.#isLogFailing = true;
  }
}
