import { setTimeout as delay } from "node:timers/promises";
import type { Cell, LogLine, Phases, Plan, Service } from "../api/resources.ts";
import { ForgeError } from "../base/errors.ts";
import type { Connection } from "./context.ts";
import type { Cli } from "./index.ts";
import { formatLine } from "./logs.ts";
import { printable, shortId } from "./text.ts";

const lookEveryMs = 200;
const lastLogLines = 20;

/**
 * Waits until every cell of each plan's revision runs. A cell that fails for good, or goes round in restarts, ends the
 * wait with its last log lines and CELL_FAILED; a wait beyond its bound with GUEST_NOT_READY where a guest booted, else
 * with TIMEOUT.
 */
export async function awaitCells(cli: Cli, api: Connection, plans: readonly Plan[], timeoutMs: number): Promise<Service[]> {
  const deadline = performance.now() + timeoutMs;
  const shown = new Map<string, string>();
  for (;;) {
    const services = await Promise.all(plans.map(({ service }) => api.call("getService", { params: { name: service } })));
    const cells = services.flatMap(currentCells);
    showProgress(cli, cells, shown);
    const broken = cells.find(hasFailed);
    if (broken !== undefined) throw await failure(cli, api, broken);
    if (services.every(isUp)) {
      cli.terminal.progress([]);
      return services;
    }
    if (performance.now() > deadline) throw await lateness(cli, api, cells, timeoutMs);
    await delay(lookEveryMs, undefined, { signal: cli.signal });
  }
}

function currentCells(service: Service): Cell[] {
  return service.cells.filter(({ revision }) => revision === service.revision);
}

function isUp(service: Service): boolean {
  return service.desired === "stopped" || currentCells(service).filter(({ state }) => state === "running").length >= service.spec.replicas;
}

/** Two restarts say that the first failure was no accident. */
function hasFailed(cell: Cell): boolean {
  return cell.state === "failed" || (cell.state === "backoff" && cell.restarts >= 2);
}

/** On a terminal one living line a cell; elsewhere one line a change. */
function showProgress({ terminal }: Cli, cells: readonly Cell[], shown: Map<string, string>): void {
  const lines = cells.map((cell) => ({ id: cell.id, text: describeCell(cell) }));
  if (terminal.isLive) return terminal.progress(lines.map(({ text }) => `  ${text}`));
  for (const { id, text } of lines) {
    if (shown.get(id) !== text) terminal.note(`  ${text}`);
    shown.set(id, text);
  }
}

function describeCell(cell: Cell): string {
  const reason = cell.reason === null || cell.state === "running" ? "" : `: ${printable(cell.reason)}`;
  const phases = describePhases(cell.phases);
  return `${cell.service} ${shortId(cell.id)} ${cell.state}${reason}${phases === "" ? "" : ` (${phases})`}`;
}

const phaseNames: Record<keyof Phases, string> = {
  prepareMs: "prepare",
  attachMs: "attach",
  spawnMs: "spawn",
  kernelMs: "kernel",
  initMs: "init",
  entrypointMs: "entrypoint",
};

function describePhases(phases: Phases): string {
  const keys = Object.keys(phaseNames) as (keyof Phases)[];
  return keys.flatMap((key) => (phases[key] === undefined ? [] : [`${phaseNames[key]} ${Math.round(phases[key])} ms`])).join(", ");
}

async function failure(cli: Cli, api: Connection, cell: Cell): Promise<ForgeError> {
  cli.terminal.progress([]);
  const logLines = await printLastLines(cli, api, cell);
  const exit = cell.exitStatus === null ? "" : ` (exit status ${cell.exitStatus})`;
  return new ForgeError("CELL_FAILED", `a cell of ${cell.service} does not run${exit}: ${cell.reason ?? cell.state}`, {
    details: { cell, logLines },
  });
}

async function lateness(cli: Cli, api: Connection, cells: readonly Cell[], timeoutMs: number): Promise<ForgeError> {
  cli.terminal.progress([]);
  const waiting = cells.filter(({ state }) => state !== "running");
  const logLines = waiting[0] === undefined ? [] : await printLastLines(cli, api, waiting[0]);
  const states = waiting.map((cell) => `${cell.service} ${shortId(cell.id)} is ${cell.state}`).join(", ") || "no cell was placed";
  const hasBooted = waiting.some(({ state }) => state === "starting" || state === "backoff");
  return new ForgeError(hasBooted ? "GUEST_NOT_READY" : "TIMEOUT", `not all cells ran within ${timeoutMs / 1000} s: ${states}`, {
    details: { cells, logLines },
  });
}

/** What the cell said last; a cell that said nothing, or cannot be asked any more, must not hide the failure itself. */
async function printLastLines(cli: Cli, api: Connection, cell: Cell): Promise<LogLine[]> {
  const lines: LogLine[] = [];
  try {
    for await (const line of api.lines("getLogs", { params: { name: cell.service }, query: { cell: cell.id, tail: lastLogLines } }))
      lines.push(line);
  } catch (error) {
    cli.terminal.note(`  its log cannot be read: ${error instanceof Error ? printable(error.message) : "unknown"}`);
  }
  if (lines.length > 0) cli.terminal.note(`last lines of ${cell.service} ${shortId(cell.id)}:`);
  for (const line of lines) cli.terminal.note(`  ${formatLine(cli.terminal, line, { timestamps: false, cell: false })}`);
  return lines;
}
