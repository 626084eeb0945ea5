import { createHash } from "node:crypto";
import { describe, expect, test } from "vitest";
import { type BootInputs, measureBoot } from "./measure.ts";

const digest = (fill: string): string => `sha256:${fill.repeat(64)}`;
const inputs: BootInputs = {
  kernelDigest: digest("1"),
  initramfsDigest: digest("2"),
  rootHash: "3".repeat(64),
  commandLine: "quiet",
  configDrive: Buffer.from("config"),
};

describe("the measurement of a boot", () => {
  test("is the digest of the documented text", () => {
    const sha256 = (text: string): string => createHash("sha256").update(text).digest("hex");
    const text =
      `forge measurement v1\nkernel ${digest("1")}\ninitramfs ${digest("2")}\nroot ${"3".repeat(64)}\n` +
      `command-line sha256:${sha256("quiet")}\nconfig sha256:${sha256("config")}\n`;
    expect(measureBoot(inputs)).toBe(`sha256:${sha256(text)}`);
  });

  test("changes with each of its parts", () => {
    const others: Partial<BootInputs>[] = [
      { kernelDigest: digest("a") },
      { initramfsDigest: digest("a") },
      { rootHash: "a".repeat(64) },
      { commandLine: "quiet " },
      { configDrive: Buffer.from("config\0") },
    ];
    const all = [inputs, ...others.map((other) => ({ ...inputs, ...other }))].map(measureBoot);
    expect(new Set(all).size).toBe(all.length);
  });

  test("takes nothing that is not a digest", () => {
    expect(() => measureBoot({ ...inputs, kernelDigest: "sha256:1\nroot" })).toThrow("not a digest");
    expect(() => measureBoot({ ...inputs, rootHash: `${"3".repeat(64)}\n` })).toThrow("not a digest");
  });
});
