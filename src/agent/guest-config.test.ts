import { describe, expect, test } from "vitest";
import { type CellAssignment, cellAssignmentSchema } from "../api/node.ts";
import type { RootfsArtifact } from "../isocell/image/index.ts";
import type { Attachment } from "../mesh/index.ts";
import { guestConfigOf } from "./guest-config.ts";

const attachment = { address: "fd00::2", gateway: "fd00::1", gatewayMac: "02:f0:00:00:00:01", mtu: 1420 } as Attachment;
const image = {
  user: "www",
  env: ["PATH=/bin", "A=1", "EMPTY"],
  entrypoint: ["/start"],
  cmd: ["-x"],
  workingDir: "",
  exposedPorts: [],
  stopSignal: "QUIT",
};
const artifact = (config: object = {}) => ({ config: { ...image, ...config } }) as unknown as RootfsArtifact;

function assignment(spec: object): CellAssignment {
  const digest = `sha256:${"0".repeat(64)}`;
  const cell = {
    id: "cell_0123456789abcdefghjkmnpq",
    tenantId: "ten_1",
    service: "web",
    revision: 1,
    desired: "running",
    address: "fd00::2",
  };
  return cellAssignmentSchema.parse({ ...cell, image: { digest, reference: "web", signatures: [], trustedKeysPem: [] }, spec });
}

describe("what runs inside", () => {
  test("is what the image says", () => {
    const guest = guestConfigOf(assignment({}), artifact(), attachment);
    expect(guest).toMatchObject({ argv: ["/start", "-x"], user: "www", cwd: "/", stopSignal: 3, env: { PATH: "/bin", A: "1", EMPTY: "" } });
    expect(guest.hostname).toBe("web-jkmnpq");
  });

  test("and over it what the manifest says; a command replaces entrypoint and command together", () => {
    const guest = guestConfigOf(assignment({ command: ["sh"], user: "1000:1000", env: { A: "2" } }), artifact(), attachment);
    expect(guest).toMatchObject({ argv: ["sh"], user: "1000:1000", env: { PATH: "/bin", A: "2" } });
  });

  test.each([
    ["", 15],
    ["SIGINT", 2],
    ["9", 9],
    ["NONSENSE", 15],
  ])("the stop signal %s is number %i", (stopSignal, number) => {
    expect(guestConfigOf(assignment({}), artifact({ stopSignal }), attachment).stopSignal).toBe(number);
  });

  test("an image without a program needs a command", () => {
    expect(() => guestConfigOf(assignment({}), artifact({ entrypoint: [], cmd: [] }), attachment)).toThrow(/which program to run/);
  });
});
