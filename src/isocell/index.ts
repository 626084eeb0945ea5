/** Isolated cells: one microVM per workload, its own kernel, measured at boot. */
export { Cell, type CellEnd, type CellHandlers, type CellPhases, type CellState } from "./cell.ts";
export { type CellNetwork, type CellSpec, IsoCells, type IsoCellsOptions } from "./cells.ts";
export type { ExecOptions, ExecSession, ExitStatus, GuestLog, ProbeResult } from "./channel.ts";
export type { GuestConfig } from "./config-drive.ts";
export { buildGuest, type GuestFiles, loadGuest } from "./guest/build.ts";
export { chooseVmm, type VmmChoice } from "./vmm/probe.ts";
export type { Vmm } from "./vmm/vmm.ts";
