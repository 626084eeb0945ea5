import * as fc from "fast-check";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { run } from "../base/exec.ts";
import { encodeConfigDrive, type GuestConfig, guestCommandLine } from "./config-drive.ts";
import { buildHarness } from "./guest/harness.fixture.ts";

const example: GuestConfig = {
  cellId: "cell_1",
  hostname: "web-1",
  argv: ["/bin/sh", "-c", "true"],
  env: { B: "2", A: "1=x" },
  cwd: "/srv",
  user: "app:extra",
  stopSignal: 3,
  address: "fd12:3456:789a:0:1:2:3:4",
  gateway: "fd12:3456:789a::1",
  gatewayMac: "02:f0:00:00:00:01",
  mtu: 1400,
  overlaySizeMib: 64,
};

describe("the config drive", () => {
  test("is the same for the same configuration, whatever the order of the variables", () => {
    expect(encodeConfigDrive(example)).toEqual(encodeConfigDrive({ ...example, env: { A: "1=x", B: "2" } }));
    expect(encodeConfigDrive(example).length % 512).toBe(0);
  });

  test.each([
    [{ argv: [] }, "INVALID_INPUT"],
    [{ argv: ["a\0b"] }, "INVALID_INPUT"],
    [{ env: { "A=B": "c" } }, "INVALID_INPUT"],
    [{ env: { "": "c" } }, "INVALID_INPUT"],
    [{ address: "192.0.2.1" }, "INVALID_INPUT"],
    [{ address: "fe80::1%eth0" }, "INVALID_INPUT"],
    [{ gatewayMac: "02:f0" }, "INVALID_INPUT"],
    [{ mtu: 576 }, "INVALID_INPUT"],
    [{ stopSignal: 65 }, "INVALID_INPUT"],
    [{ env: { BIG: "x".repeat(1024 * 1024) } }, "TOO_LARGE"],
  ])("refuses %o", (change, code) => {
    expect(() => encodeConfigDrive({ ...example, ...change })).toThrow(expect.objectContaining({ code }));
  });
});

describe("the guest's reader", () => {
  let harness: Awaited<ReturnType<typeof buildHarness>>;

  beforeAll(async () => {
    harness = await buildHarness();
  });

  afterAll(async () => {
    await harness[Symbol.asyncDispose]();
  });

  const readInC = async (drive: Uint8Array): Promise<string> => await run(harness.path, ["config"], { input: drive });

  test("reads every field", async () => {
    expect(await readInC(encodeConfigDrive(example))).toBe(
      "cell_1\nweb-1\n/srv\napp:extra\n3 1400 64\nfd123456789a00000001000200030004fd123456789a0000000000000000000102f000000001\n" +
        "3 2\n/bin/sh\0-c\0true\0A=1=x\0B=2\0",
    );
  });

  test("reads what was encoded, whatever the words", async () => {
    const word = fc.string({ unit: "grapheme", maxLength: 40 }).filter((text) => !text.includes("\0"));
    await fc.assert(
      fc.asyncProperty(
        fc.array(word, { minLength: 1, maxLength: 8 }),
        fc.dictionary(fc.stringMatching(/^[A-Za-z_]\w{0,9}$/), word),
        async (argv, env) => {
          const words = (await readInC(encodeConfigDrive({ ...example, argv, env })))
            .split("\n")
            .slice(7)
            .join("\n")
            .split("\0")
            .slice(0, -1);
          const variables = Object.entries(env)
            .sort(([a], [b]) => (a < b ? -1 : 1))
            .map(([name, value]) => `${name}=${value}`);
          expect(words).toEqual([...argv, ...variables]);
        },
      ),
      { numRuns: 25 },
    );
  });

  test("refuses any altered byte and any cut", async () => {
    const drive = encodeConfigDrive(example);
    const usedBytes = 20 + drive.readUInt32LE(12);
    await fc.assert(
      fc.asyncProperty(fc.nat(usedBytes - 1), fc.integer({ min: 1, max: 255 }), async (at, change) => {
        const altered = Buffer.from(drive);
        altered.writeUInt8((altered[at] ?? 0) ^ change, at);
        expect(await readInC(altered)).toMatch(/^refused: /);
      }),
      { numRuns: 25 },
    );
    expect(await readInC(drive.subarray(0, usedBytes - 1))).toMatch(/^refused: /);
  });

  test("survives two seconds of mutated drives under the sanitisers", async () => {
    await run(harness.path, ["fuzz", "2", "1"], { input: encodeConfigDrive(example) });
  });
});

test("the kernel command line carries the root hash, and refuses what is none", () => {
  const verity = { rootHash: "ab".repeat(32), salt: "", dataBlocks: 10, hashStartBlock: 11 };
  expect(guestCommandLine(verity)).toContain(` forge.verity=${"ab".repeat(32)},-,10,11`);
  expect(() => guestCommandLine({ ...verity, rootHash: "ab cd" })).toThrow(/root hash/);
  expect(() => guestCommandLine({ ...verity, salt: "x init=/bin/sh" })).toThrow(/salt/);
});
