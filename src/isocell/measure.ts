import { createHash } from "node:crypto";
import { ForgeError } from "../base/errors.ts";

/** What a cell boots, all of it: two boots with one measurement ran the same bytes with the same configuration. */
export interface BootInputs {
  readonly kernelDigest: string;
  readonly initramfsDigest: string;
  /** Of the root file system's verity tree: it stands for every byte of it. */
  readonly rootHash: string;
  readonly commandLine: string;
  readonly configDrive: Uint8Array;
}

/**
 * One digest over what is booted, version 1: SHA-256 of this text, UTF-8, each line ended by a line feed:
 *
 *     forge measurement v1
 *     kernel sha256:<hex of the kernel image's bytes>
 *     initramfs sha256:<hex of the initramfs's bytes>
 *     root <hex of the verity root hash>
 *     command-line sha256:<hex of the command line's bytes>
 *     config sha256:<hex of the config drive's bytes, padding included>
 *
 * No field can hold a line feed, so the text reads in one way only. Another version begins with another first line.
 */
export function measureBoot(inputs: BootInputs): string {
  const lines = [
    "forge measurement v1",
    `kernel ${checked(inputs.kernelDigest, /^sha256:[0-9a-f]{64}$/)}`,
    `initramfs ${checked(inputs.initramfsDigest, /^sha256:[0-9a-f]{64}$/)}`,
    `root ${checked(inputs.rootHash, /^[0-9a-f]{64}$/)}`,
    `command-line ${sha256(inputs.commandLine)}`,
    `config ${sha256(inputs.configDrive)}`,
  ];
  return sha256(lines.map((line) => `${line}\n`).join(""));
}

function checked(value: string, pattern: RegExp): string {
  if (!pattern.test(value)) throw new ForgeError("INVALID_INPUT", `"${value}" is not a digest`);
  return value;
}

function sha256(data: string | Uint8Array): string {
  return `sha256:${createHash("sha256").update(data).digest("hex")}`;
}
