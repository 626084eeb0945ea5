export type { CellEvent, CellLog, CellNetwork, CellOptions, CellPhases, CellSpec, CellState } from "./cell.ts";
