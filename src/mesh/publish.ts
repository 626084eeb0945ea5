import { ForgeError } from "../base/errors.ts";

export interface PublishOptions {
  readonly cellId: string;
  readonly netnsPath: string;
  /** cgroup.procs files (v1: one per controller) the proxy joins before it runs. */
  readonly cgroupProcsFiles: readonly string[];
  readonly listenAddress: string;
  readonly publishedPort: number;
  readonly cellAddress: string;
  readonly cellPort: number;
  readonly stateDir: string;
}
export interface Published {
  readonly cellId: string;
  readonly publishedPort: number;
  readonly pid: number;
}

export async function publish(_options: PublishOptions): Promise<Published> {
  throw new ForgeError("UNSUPPORTED", "not yet");
}
/** Stops every published port of the cell, or only the one named. Idempotent. */
export async function unpublish(_cellId: string, _stateDir: string, _publishedPort?: number): Promise<void> {
  throw new ForgeError("UNSUPPORTED", "not yet");
}
/** The publications whose process lives, as they are after a restart of the agent. */
export function listPublished(_stateDir: string): Published[] {
  throw new ForgeError("UNSUPPORTED", "not yet");
}
