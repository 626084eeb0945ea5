import { type Selectable, sql } from "kysely";
import { randomUUID } from "node:crypto";
import { ForgeError, toForgeError } from "../base/errors.ts";
import { appendEvents } from "./audit-log.ts";
import type { Control } from "./context.ts";
import { transact, type Trx } from "./db/database.ts";
import type { JobTable } from "./db/schema.ts";
import { cellFact, deploySteps, type Step, type StepContext } from "./deploy.ts";

export interface ReconcilerOptions {
  readonly steps?: readonly Step[];
  /** After this, a job whose runner went silent is another runner's. */
  readonly leaseMs?: number;
}

const concurrentJobs = 8;
/** A defect must not spin for ever: after so many unexpected errors the job fails. */
const maxAttempts = 12;

type Job = Selectable<JobTable>;

/**
 * Runs the jobs, one step a transaction. What a job has done is in its row, so whoever leases it next goes on from
 * there: after a crash that is the next process, when the lease is over. Rows are locked cell first, then job.
 */
export class Reconciler {
  readonly #control: Control;
  readonly #steps: readonly Step[];
  readonly #leaseMs: number;
  readonly #owner = randomUUID();
  readonly #stop = new AbortController();
  readonly #active = new Set<Promise<void>>();
  #running: Promise<void> | undefined;

  constructor(control: Control, options: ReconcilerOptions = {}) {
    this.#control = control;
    this.#steps = options.steps ?? deploySteps;
    this.#leaseMs = options.leaseMs ?? 15_000;
  }

  start(): void {
    this.#running = this.#run();
  }

  /** Waits for the steps under way; jobs stay where they are. */
  async stop(): Promise<void> {
    this.#stop.abort();
    await this.#running;
    await Promise.all(this.#active);
  }

  async #run(): Promise<void> {
    const wakes = this.#control.wakes.subscribe("jobs");
    while (!this.#stop.signal.aborted) {
      try {
        const free = concurrentJobs - this.#active.size;
        const claimed = await this.#claim(free);
        for (const job of claimed) this.#follow(this.#runJob(job));
        if (this.#active.size >= concurrentJobs) await Promise.race(this.#active);
        else if (claimed.length < free) await wakes.wait(await this.#idleMs(), this.#stop.signal);
      } catch (error) {
        this.#control.log.warn({ err: error }, "jobs cannot be read");
        await this.#control.clock.sleep(500, this.#stop.signal).catch(() => undefined);
      }
    }
    wakes.close();
  }

  #follow(work: Promise<void>): void {
    const tracked = work.finally(() => this.#active.delete(tracked));
    this.#active.add(tracked);
  }

  /** Leases due jobs. A lease the machine forgets in a crash does no harm, so it does not wait for the disk. */
  async #claim(limit: number): Promise<Job[]> {
    const { rows } = await sql<Job>`
      with due as (
        select id from jobs where run_at <= now() and (lease_until is null or lease_until <= now())
        order by run_at limit ${limit} for update skip locked
      )
      update jobs set lease_owner = ${this.#owner}, lease_until = now() + ${this.#leaseMs} * interval '1 millisecond'
      from due, set_config('synchronous_commit', 'off', true) where jobs.id = due.id
      returning jobs.*`.execute(this.#control.db);
    return rows;
  }

  /** Until the next job is due, or its lease is over. */
  async #idleMs(): Promise<number> {
    const { rows } = await sql<{ ms: number | null }>`
      select extract(epoch from min(greatest(run_at, coalesce(lease_until, run_at))) - now())::float8 * 1000 as ms from jobs`.execute(
      this.#control.db,
    );
    return Math.min(Math.max(rows[0]?.ms ?? 60_000, 10), 60_000);
  }

  async #runJob(job: Job): Promise<void> {
    try {
      while (!this.#stop.signal.aborted && (await this.#advance(job)));
    } catch (error) {
      await this.#afterError(job, toForgeError(error)).catch((later: unknown) =>
        this.#control.log.warn({ err: later, job: job.id }, "a job could not be put back; its lease will end"),
      );
    }
  }

  /**
   * One step forward, or back when it failed. Internal steps share the transaction of the step after them: nobody outside
   * the database has learnt of them, so a crash may undo them all. False when there is nothing more to do now.
   */
  async #advance({ id, cell_id: cellId }: Job): Promise<boolean> {
    return transact(this.#control.db, async (trx) => {
      const cell = await trx.selectFrom("cells").selectAll().where("id", "=", cellId).forUpdate().executeTakeFirst();
      const job = await trx
        .selectFrom("jobs")
        .selectAll()
        .where("id", "=", id)
        .where("lease_owner", "=", this.#owner)
        .forUpdate()
        .executeTakeFirst();
      if (cell === undefined || job === undefined) return false; // removed meanwhile, or no longer ours
      const context: StepContext = { trx, control: this.#control, cell, facts: [] };
      if (job.failure !== null) return this.#stepBack(context, job, job.failure);
      const goesOn = await this.#stepForward(context, job);
      if (context.facts.length > 0) await appendEvents(trx, this.#control.signer, context.facts);
      return goesOn;
    });
  }

  /** The next step, after the internal ones before it. */
  async #stepForward(context: StepContext, job: Job): Promise<boolean> {
    const step = this.#steps[this.#indexOf(job) + 1];
    if (step === undefined) return this.#finish(context.trx, job);
    if ((await step.do(context)) === "wait") return this.#putToSleep(context, job, step);
    if (step === this.#steps.at(-1)) return this.#finish(context.trx, job);
    if (step.internal === true) {
      const cell = await context.trx.selectFrom("cells").selectAll().where("id", "=", context.cell.id).executeTakeFirstOrThrow();
      return this.#stepForward({ ...context, cell }, { ...job, step: step.name, deadline_at: null });
    }
    await this.#renew(context.trx, job, { step: step.name, deadline_at: null });
    return true;
  }

  /** A report that changes the cell sets run_at to now; else the deadline comes. */
  async #putToSleep(context: StepContext, job: Job, step: Step): Promise<boolean> {
    const deadline = job.deadline_at ?? new Date(Date.now() + ((await step.patienceMs?.(context)) ?? 60_000));
    if (Date.now() >= deadline.getTime()) throw step.tooLate?.(context) ?? new ForgeError("TIMEOUT", `the step ${step.name} took too long`);
    await context.trx
      .updateTable("jobs")
      .set({ step: job.step, run_at: deadline, deadline_at: deadline, lease_owner: null, lease_until: null })
      .where("id", "=", job.id)
      .execute();
    return false;
  }

  async #stepBack(context: StepContext, job: Job, failure: { code: string; message: string }): Promise<boolean> {
    const index = this.#indexOf(job);
    const step = this.#steps[index];
    await step?.undo?.(context);
    if (index > 0) {
      await this.#renew(context.trx, job, { step: this.#steps[index - 1]?.name ?? null });
      return true;
    }
    const { trx, cell } = context;
    await trx.updateTable("cells").set({ state: "failed", reason: failure.message }).where("id", "=", cell.id).execute();
    await appendEvents(trx, this.#control.signer, [
      cellFact(cell, "cell.failed", { code: failure.code, reason: failure.message.slice(0, 2000) }, "failure"),
    ]);
    return this.#finish(trx, job);
  }

  async #finish(trx: Trx, job: Job): Promise<boolean> {
    await trx.deleteFrom("jobs").where("id", "=", job.id).execute();
    return false;
  }

  async #renew(trx: Trx, job: Job, change: { step: string | null; deadline_at?: null }): Promise<void> {
    await trx
      .updateTable("jobs")
      .set({ ...change, attempts: 0, lease_until: sql<Date>`now() + ${this.#leaseMs} * interval '1 millisecond'` })
      .where("id", "=", job.id)
      .execute();
  }

  #indexOf(job: Job): number {
    return this.#steps.findIndex((step) => step.name === job.step);
  }

  /** What the world answered is a failure and is undone; what is unavailable or unexpected is tried again, later and later. */
  async #afterError(job: Job, error: ForgeError): Promise<void> {
    const passing = ["DATABASE_UNAVAILABLE", "AUDIT_UNAVAILABLE", "DISK_FULL", "INTERNAL"].includes(error.code);
    if (passing) this.#control.log.warn({ err: error, job: job.id }, "a step of a deploy did not work; it will be tried again");
    await transact(this.#control.db, async (trx) => {
      const current = await trx
        .selectFrom("jobs")
        .selectAll()
        .where("id", "=", job.id)
        .where("lease_owner", "=", this.#owner)
        .forUpdate()
        .executeTakeFirst();
      if (current === undefined) return;
      const attempts = current.attempts + 1;
      const pauseMs = Math.min(250 * 2 ** attempts, 30_000);
      const giveUp = !passing || (error.code === "INTERNAL" && attempts >= maxAttempts);
      const change = giveUp
        ? {
            failure:
              current.failure === null ? JSON.stringify({ code: error.code, message: error.message }) : JSON.stringify(current.failure),
            run_at: new Date(),
          }
        : { run_at: new Date(Date.now() + pauseMs) };
      await trx
        .updateTable("jobs")
        .set({ ...change, attempts, lease_owner: null, lease_until: null })
        .where("id", "=", job.id)
        .execute();
      await sql`select pg_notify('forge', 'jobs')`.execute(trx);
    });
  }
}
