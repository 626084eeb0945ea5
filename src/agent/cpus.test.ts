import { describe, expect, test } from "vitest";
import { CpuPool, parseCpuList } from "./cpus.ts";

describe("CPUs of a node", () => {
  test("production gives each CPU once, keeps one for the host, and says when there is no room", () => {
    const pool = new CpuPool("production", [0, 1, 2, 3]);
    expect(pool.vcpus).toBe(3);
    expect(pool.allocate("cell_a", 2)).toEqual([1, 2]);
    expect(pool.allocate("cell_a", 2)).toEqual([1, 2]);
    expect(() => pool.allocate("cell_b", 2)).toThrow(/2 CPUs were asked for, 1 are free/);
    pool.free("cell_a");
    expect(pool.allocate("cell_b", 3)).toEqual([1, 2, 3]);
  });

  test("a cell that outlived the agent keeps what it had", () => {
    const pool = new CpuPool("production", [0, 1, 2]);
    pool.adopt("cell_a", [2]);
    expect(pool.allocate("cell_b", 1)).toEqual([1]);
  });

  test("development shares", () => {
    expect(new CpuPool("development", [0, 1]).allocate("cell_a", 8)).toBeNull();
  });

  test("reads the kernel's list form", () => {
    expect(parseCpuList("0-2,5,7-8\n")).toEqual([0, 1, 2, 5, 7, 8]);
  });
});
