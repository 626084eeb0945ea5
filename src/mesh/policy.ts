import { ForgeError } from "../base/errors.ts";

export interface Counter {
  readonly packets: number;
  readonly bytes: number;
}
export interface CellCounters {
  readonly fromCell: { readonly passed: Counter; readonly dropped: Readonly<Record<string, Counter>> };
  readonly toCell: { readonly passed: Counter; readonly dropped: Readonly<Record<string, Counter>> };
}

export function updatePolicy(_cellId: string, _ports: readonly number[], _stateDir: string): void {
  throw new ForgeError("UNSUPPORTED", "not yet");
}
export function readCounters(_cellId: string, _stateDir: string): CellCounters {
  throw new ForgeError("UNSUPPORTED", "not yet");
}
