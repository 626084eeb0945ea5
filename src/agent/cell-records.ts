import { readdir, readFile } from "node:fs/promises";
import { join } from "node:path";
import { z } from "zod";
import { type CellAssignment, cellAssignmentSchema, cellReportSchema } from "../api/node.ts";
import { makeDirectory, removeDurable, writeDurable } from "../base/durable.ts";
import { ForgeError } from "../base/errors.ts";
import type { Logger } from "../base/log.ts";

const recordSchema = z.object({
  assignment: cellAssignmentSchema,
  /** Boots begun, this one included. */
  boot: z.int().min(0),
  /** It ended, and its restart policy lets it rest. */
  isOver: z.boolean(),
  report: cellReportSchema,
  /** Host CPUs the running boot has for itself. */
  cpus: z.array(z.int()).nullable(),
});
/** What the agent must know of a cell to take it over after its own restart. */
export type CellRecord = z.infer<typeof recordSchema>;

/** Of a cell that was assigned and nothing more. */
export function newRecord(assignment: CellAssignment): CellRecord {
  const nothing = {
    reason: null,
    measurement: null,
    vmm: null,
    emulated: null,
    exitStatus: null,
    startedAt: null,
    restarts: 0,
    phases: {},
    published: [],
  };
  return {
    assignment,
    boot: 0,
    isOver: false,
    report: { id: assignment.id, revision: assignment.revision, state: "assigned", ...nothing },
    cpus: null,
  };
}

/** One small durable file a cell. */
export class CellRecords {
  readonly #dir: string;
  readonly #log: Logger;

  private constructor(dir: string, log: Logger) {
    this.#dir = dir;
    this.#log = log;
  }

  static async open(dir: string, log: Logger): Promise<CellRecords> {
    await makeDirectory(dir);
    return new CellRecords(dir, log);
  }

  async write(record: CellRecord): Promise<void> {
    await writeDurable(this.#path(record.assignment.id), JSON.stringify(record));
  }

  async remove(cellId: string): Promise<void> {
    await removeDurable(this.#path(cellId));
  }

  /** Every whole record. A damaged one is passed over: its cell is then nobody's, is removed, and is started anew where desired. */
  async list(): Promise<CellRecord[]> {
    const names = (await readdir(this.#dir)).filter((name) => /^cell_[0-9a-z]+\.json$/.test(name));
    const records = await Promise.all(names.toSorted().map((name) => this.#read(join(this.#dir, name))));
    return records.filter((record) => record !== undefined);
  }

  async #read(path: string): Promise<CellRecord | undefined> {
    try {
      return recordSchema.parse(JSON.parse(await readFile(path, "utf8")));
    } catch {
      this.#log.error({ path }, "the record of a cell is damaged");
      await removeDurable(path);
      return undefined;
    }
  }

  #path(cellId: string): string {
    if (!/^cell_[0-9a-z]+$/.test(cellId)) throw new ForgeError("INVALID_INPUT", `${cellId} is no cell identifier`);
    return join(this.#dir, `${cellId}.json`);
  }
}
