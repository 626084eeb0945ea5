import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { ForgeError } from "../../base/errors.ts";
import { formatImageReference, isLoopback, parseImageReference } from "./reference.ts";

const parse = (text: string): ReturnType<typeof parseImageReference> => parseImageReference(text, "/base");
const digest = `sha256:${"ab".repeat(32)}`;

describe("image references", () => {
  test.each([
    ["./image", { kind: "folder", path: "/base/image" }],
    ["../image", { kind: "folder", path: "/image" }],
    ["/abs/image", { kind: "folder", path: "/abs/image" }],
    ["oci:image", { kind: "folder", path: "/base/image" }],
    ["oci:./image:v1", { kind: "folder", path: "/base/image", tag: "v1" }],
    ["oci-archive:a.tar", { kind: "oci-archive", path: "/base/a.tar" }],
    ["docker-archive:/x/a.tar:1.0", { kind: "docker-archive", path: "/x/a.tar", tag: "1.0" }],
    ["example.org/team/app", { kind: "registry", registry: "example.org", repository: "team/app" }],
    ["127.0.0.1:5000/app:1", { kind: "registry", registry: "127.0.0.1:5000", repository: "app", tag: "1" }],
    ["[::1]:5000/app:1", { kind: "registry", registry: "[::1]:5000", repository: "app", tag: "1" }],
    [`localhost/app:1@${digest}`, { kind: "registry", registry: "localhost", repository: "app", tag: "1", digest }],
  ])("%s", (text, expected) => {
    expect(parse(text)).toEqual(expected);
  });

  test.each([
    "",
    "nginx",
    "nginx:latest",
    "library/nginx",
    "oci:",
    "oci:a:b:c",
    "oci:a:",
    "oci:a:-x",
    "docker-archive:",
    "a b",
    "./a\nb",
    "example.org/",
    "example.org/UPPER",
    "example.org/a//b",
  ])("refuses %j", (text) => {
    expect(() => parse(text)).toThrow(expect.objectContaining({ code: "INVALID_INPUT" }));
  });

  test.each([
    "example.org:0/a",
    "example.org:70000/a",
    "-a.b/c",
    "example.org/a@sha256:12",
    `example.org/a@${digest.toUpperCase()}`,
    "example.org/a:",
    `x.y/${"a".repeat(600)}`,
  ])("refuses %s", (text) => {
    expect(() => parse(text)).toThrow(expect.objectContaining({ code: "INVALID_INPUT" }));
  });

  test("never throws anything but INVALID_INPUT, and what it reads it writes back", () => {
    const word = fc.stringMatching(/^[a-z0-9]{1,8}$/);
    const likely = fc.tuple(
      fc.constantFrom("oci:", "oci-archive:", "docker-archive:", "./", "/", "", "h.example/", "localhost:5000/"),
      word,
      fc.constantFrom("", ":", ":t1", `@${digest}`, "/x:y"),
    );
    fc.assert(
      fc.property(
        fc.oneof(
          fc.string({ maxLength: 60 }),
          likely.map((parts) => parts.join("")),
        ),
        (text) => {
          let reference: ReturnType<typeof parse>;
          try {
            reference = parse(text);
          } catch (error) {
            expect(error).toBeInstanceOf(ForgeError);
            expect((error as ForgeError).code).toBe("INVALID_INPUT");
            return;
          }
          if (reference.kind !== "registry" && reference.path.includes(":")) return; // a folder with a colon has only the plain form
          expect(parse(formatImageReference(reference))).toEqual(reference);
        },
      ),
      { numRuns: 2000 },
    );
  });

  test("only addresses of this machine are loopback", () => {
    const loopback = (text: string): boolean => {
      const reference = parse(text);
      return reference.kind === "registry" && isLoopback(reference);
    };
    expect(["127.0.0.1:5000/a", "127.9.9.9/a", "localhost:1/a", "[::1]:2/a"].map(loopback)).toEqual([true, true, true, true]);
    expect(
      ["127.example.org/a", "localhost.example.org/a", "192.0.2.1:5000/a", "[2001:db8::1]/a", "127.0.0.1.example.org/a"].map(loopback),
    ).toEqual([false, false, false, false, false]);
  });
});
