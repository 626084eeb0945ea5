import { closeSync } from "node:fs";
import { ForgeError } from "./errors.ts";
import { addressOf, isErrno, lastErrno, libbpf, systemError } from "./linux.ts";

/**
 * eBPF programs and maps. Nothing is pinned: a program attached to a device's traffic control lives exactly as long
 * as the device, its maps as long as the program, and both are found again through the device.
 */

/** Loads a compiled object into the kernel, with `constants` as its read-only data, and lends its programs' descriptors. */
export function withBpfObject<T>(path: string, constants: Buffer, body: (programFd: (name: string) => number) => T): T {
  const library = libbpf();
  const object = pointer("bpf_object__open_file", library.bpf_object__open_file(path, null));
  try {
    const map = pointer("bpf_object__find_map_by_name", library.bpf_object__find_map_by_name(object, ".rodata"));
    check("bpf_map__set_initial_value", library.bpf_map__set_initial_value(map, constants, constants.length));
    check("bpf_object__load", library.bpf_object__load(object));
    return body((name) => {
      const program = pointer("bpf_object__find_program_by_name", library.bpf_object__find_program_by_name(object, name));
      return check("bpf_program__fd", library.bpf_program__fd(program));
    });
  } finally {
    library.bpf_object__close(object);
  }
}

export type TrafficDirection = "ingress" | "egress";

/** Attaches a program to a direction of a device of the current network namespace (clsact: also before Linux 6.6's TCX). */
export function attachTraffic(interfaceIndex: number, direction: TrafficDirection, programFd: number): void {
  const hook = trafficHook(interfaceIndex, direction);
  const created = libbpf().bpf_tc_hook_create(hook);
  if (created < 0 && !isErrno(systemError("bpf_tc_hook_create", -created), "EEXIST")) check("bpf_tc_hook_create", created);
  const options = trafficOptions();
  options.writeInt32LE(programFd, 8);
  check("bpf_tc_attach", libbpf().bpf_tc_attach(hook, options));
}

/** The identifier of the program attached there, or undefined. */
export function attachedProgram(interfaceIndex: number, direction: TrafficDirection): number | undefined {
  const options = trafficOptions();
  const result = libbpf().bpf_tc_query(trafficHook(interfaceIndex, direction), options);
  if (result === 0) return options.readUInt32LE(16);
  const error = systemError("bpf_tc_query", -result);
  if (isErrno(error, "ENOENT") || isErrno(error, "EINVAL")) return undefined; // no such filter, no such hook
  throw error;
}

/** Opens a loaded program and its maps by the program's identifier, lends them to `body`, and closes them. */
export function withProgram<T>(id: number, body: (program: BpfProgram) => T): T {
  const fds: number[] = [];
  const keep = (fd: number): number => {
    fds.push(fd);
    return fd;
  };
  try {
    const fd = keep(check("bpf_prog_get_fd_by_id", libbpf().bpf_prog_get_fd_by_id(id)));
    const maps = mapIdsOf(fd).map((mapId) => new BpfMap(keep(check("bpf_map_get_fd_by_id", libbpf().bpf_map_get_fd_by_id(mapId)))));
    return body({
      fd,
      map(name) {
        const map = maps.find((candidate) => candidate.name === name || candidate.name.endsWith(`.${name}`));
        if (map === undefined) throw new ForgeError("INTERNAL", `the eBPF program ${id} has no map ${name}`);
        return map;
      },
    });
  } finally {
    for (const fd of fds) closeSync(fd);
  }
}

export interface BpfProgram {
  readonly fd: number;
  /** By name; a section's map (`.rodata`) by the section's. */
  map(name: string): BpfMap;
}

/** A map behind an open descriptor. Keys and values are the program's own bytes. */
export class BpfMap {
  readonly name: string;
  private readonly fd: number;
  private readonly keySize: number;
  private readonly valueSize: number;
  private readonly maxEntries: number;

  constructor(fd: number) {
    const BPF_MAP_TYPE_PERCPU_ARRAY = 6;
    const info = infoOf(fd, 40); // struct bpf_map_info up to its name
    const perCpu = info.readUInt32LE(0) === BPF_MAP_TYPE_PERCPU_ARRAY;
    this.fd = fd;
    this.keySize = info.readUInt32LE(8);
    this.valueSize = perCpu ? alignTo8(info.readUInt32LE(12)) * possibleCpus() : info.readUInt32LE(12);
    this.maxEntries = info.readUInt32LE(16);
    this.name = textOf(info.subarray(24, 40));
  }

  /** The value, or undefined. A per-CPU map's is the values of all CPUs in a row, each aligned to 8 bytes. */
  get(key: Buffer): Buffer | undefined {
    const value = Buffer.alloc(this.valueSize);
    const result = libbpf().bpf_map_lookup_elem(this.fd, key, value);
    return result === 0 ? value : absentOrThrow("bpf_map_lookup_elem", result);
  }

  set(key: Buffer, value: Buffer): void {
    check("bpf_map_update_elem", libbpf().bpf_map_update_elem(this.fd, key, value, 0));
  }

  delete(key: Buffer): void {
    const result = libbpf().bpf_map_delete_elem(this.fd, key);
    if (result !== 0) absentOrThrow("bpf_map_delete_elem", result);
  }

  /** All keys; a map that changes meanwhile may start over, so twice its size is the bound. */
  keys(): Buffer[] {
    const keys: Buffer[] = [];
    let previous: Buffer | null = null;
    while (keys.length < 2 * this.maxEntries) {
      const next = Buffer.alloc(this.keySize);
      const result = libbpf().bpf_map_get_next_key(this.fd, previous, next);
      if (result !== 0) {
        absentOrThrow("bpf_map_get_next_key", result);
        break;
      }
      keys.push(next);
      previous = next;
    }
    return keys;
  }
}

/** Runs a program on a frame without a device (BPF_PROG_TEST_RUN); the duration is the mean of all repetitions. */
export function testRun(programFd: number, frame: Buffer, repeat = 1): { verdict: number; durationNs: number } {
  const options = Buffer.alloc(80); // struct bpf_test_run_opts
  options.writeBigUInt64LE(BigInt(options.length), 0);
  options.writeBigUInt64LE(addressOf(frame), 8);
  options.writeUInt32LE(frame.length, 24);
  options.writeInt32LE(repeat, 60);
  check("bpf_prog_test_run_opts", libbpf().bpf_prog_test_run_opts(programFd, options));
  return { verdict: options.readUInt32LE(56), durationNs: options.readUInt32LE(64) };
}

/** struct bpf_tc_hook */
function trafficHook(interfaceIndex: number, direction: TrafficDirection): Buffer {
  const hook = Buffer.alloc(24);
  hook.writeBigUInt64LE(BigInt(hook.length), 0);
  hook.writeInt32LE(interfaceIndex, 8);
  hook.writeInt32LE(direction === "ingress" ? 1 : 2, 12);
  return hook;
}

/** struct bpf_tc_opts; each device direction of ours has one filter, the first. */
function trafficOptions(): Buffer {
  const options = Buffer.alloc(32);
  options.writeBigUInt64LE(BigInt(options.length), 0);
  options.writeUInt32LE(1, 20); // handle
  options.writeUInt32LE(1, 24); // priority
  return options;
}

/** The identifiers of a program's maps (struct bpf_prog_info). */
function mapIdsOf(programFd: number): number[] {
  const ids = Buffer.alloc(4 * 16);
  const request = Buffer.alloc(80);
  request.writeUInt32LE(ids.length / 4, 52);
  request.writeBigUInt64LE(addressOf(ids), 56);
  const count = infoOf(programFd, request.length, request).readUInt32LE(52);
  return Array.from({ length: Math.min(count, ids.length / 4) }, (_, index) => ids.readUInt32LE(index * 4));
}

function infoOf(fd: number, size: number, info = Buffer.alloc(size)): Buffer {
  const length = Buffer.alloc(4);
  length.writeUInt32LE(size);
  check("bpf_obj_get_info_by_fd", libbpf().bpf_obj_get_info_by_fd(fd, info, length));
  return info;
}

function possibleCpus(): number {
  return check("libbpf_num_possible_cpus", libbpf().libbpf_num_possible_cpus());
}

function alignTo8(size: number): number {
  return (size + 7) & ~7;
}

function textOf(bytes: Buffer): string {
  return bytes.toString("latin1", 0, bytes.indexOf(0) === -1 ? bytes.length : bytes.indexOf(0));
}

function check(call: string, result: number): number {
  if (result < 0) throw systemError(call, -result);
  return result;
}

function pointer(call: string, value: bigint | null): bigint {
  if (value === null || value === 0n) throw systemError(call, lastErrno());
  return value;
}

function absentOrThrow(call: string, result: number): undefined {
  const error = systemError(call, -result);
  if (!isErrno(error, "ENOENT")) throw error;
}
