import type { Logger } from "../base/log.ts";

/** What a cell is to be: complete, so that starting it needs nothing else. */
export interface CellSpec {
  /** `cell_…`; names the folder, the cgroup and the guest. */
  readonly cellId: string;
  readonly artifact: { readonly digest: string; readonly path: string; readonly rootHash: string; readonly salt: string; readonly dataBlocks: number; readonly hashStartBlock: number };
  /** What runs inside, already merged from image and manifest. */
  readonly guest: unknown;
  readonly vcpus: number;
  readonly memoryMib: number;
  /** Host CPUs this cell has for itself; null: shared. Allocated by the caller. */
  readonly cpus: readonly number[] | null;
  readonly network: CellNetwork | null;
}

/** The cell's side of the mesh: made before the VMM process exists. */
export interface CellNetwork {
  readonly netnsPath: string;
  /** Open TAP device; the caller closes its own copy after `start` settled. */
  readonly tapFd: number;
  readonly guestMac: string;
}

/** booting: no word from init yet. booted: init speaks. running: the entrypoint runs. exited: the VMM is gone. */
export type CellState = "booting" | "booted" | "running" | "stopping" | "exited";

/** Host-side durations in milliseconds; absent until known. */
export interface CellPhases {
  /** From `start` to the VMM process running, measurement and config drive included. */
  readonly spawnMs?: number;
  /** From the VMM's spawn to init's first word. */
  readonly kernelMs?: number;
  /** From init's first word to the entrypoint's start. */
  readonly initMs?: number;
}

export interface CellLog {
  /** Grows by one per line from the boot on; the reattaching side asks for what comes after the last it has. */
  readonly sequence: number;
  readonly stream: "stdout" | "stderr" | "system";
  readonly timeMs: number;
  readonly line: Uint8Array;
}

export type CellEvent =
  | { readonly kind: "booted"; readonly kernelRelease: string }
  | { readonly kind: "started"; readonly pid: number }
  | { readonly kind: "log"; readonly log: CellLog }
  /** The entrypoint ended, or the VMM did before it: exactly one of these ends the life of a cell. */
  | { readonly kind: "exited"; readonly exitStatus: number | null; readonly signal: number | null; readonly reason: string };

export interface CellOptions {
  /** Holds everything of every cell on disk; private to root. */
  readonly dir: string;
  /** Guest kernel and initramfs, as tools/setup made them. */
  readonly buildDir: string;
  readonly log: Logger;
}
