import { mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { afterEach, beforeEach, expect, test } from "vitest";
import { excludeKvm } from "./probe.ts";

let folder: string;
beforeEach(async () => {
  folder = await mkdtemp(join(tmpdir(), "forge-probe-"));
});
afterEach(async () => {
  await rm(folder, { recursive: true });
});

async function exclusion(device: boolean, cpuInfo: string): Promise<string | undefined> {
  const paths = [join(folder, "kvm"), join(folder, "cpuinfo")] as const;
  if (device) await writeFile(paths[0], "");
  await writeFile(paths[1], cpuInfo);
  return await excludeKvm(...paths);
}

test("without the device there is no hardware virtualisation", async () => {
  expect(await exclusion(false, "flags\t\t: fpu vmx\n")).toContain("cannot be opened");
});

test("a device without the processor's feature proves nothing", async () => {
  expect(await exclusion(true, "flags\t\t: fpu sse vmxish\nvmx flags : vnmi\nbugs : vmx\n")).toContain("neither VMX nor SVM");
});

test("device and feature are worth a try, whoever made the processor", async () => {
  expect(await exclusion(true, "processor : 0\nflags\t\t: fpu vmx sse\n")).toBeUndefined();
  expect(await exclusion(true, "processor : 0\nflags\t\t: fpu svm\n")).toBeUndefined();
});
