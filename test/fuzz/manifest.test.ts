import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { stringify } from "yaml";
import { ForgeError } from "../../src/base/errors.ts";
import { type ManifestProblem, parseManifest } from "../../src/cli/manifest.ts";

const valid = `# the front
jurisdiction: de-by
services:
  web:
    image: oci-archive:./web.tar
    replicas: 2
    vcpus: 2
    memory: 256MiB
    env: { GREETING: "hello\\tworld", EMPTY: "" }
    command: [nginx, -g, "daemon off;"]
    user: www-data:www-data
    ports:
      - name: http
        port: 80
        publish: 8080
    health: { http: /, port: 80, interval: 500ms, failures: 2 }
    restart: on-failure
    stopTimeout: 5s
    policy:
      allow:
        - { from: api, port: http }
  api:
    image: &image registry.example/team/api:1.0
    env:
      TEXT: |
        several
        lines
  worker: { image: *image }
`;

const parts = [
  ":",
  "-",
  "?",
  "[",
  "]",
  "{",
  "}",
  ",",
  "&a",
  "*a",
  "!!str",
  "|",
  ">",
  "#",
  "'",
  '"',
  "\n",
  "\n  ",
  "\t",
  "---",
  "...",
  "%YAML 1.1\n---\n",
  "<<",
  "\0",
  "\ufeff",
  "🦀",
  "null",
  "1e9",
  "services",
  "__proto__",
  "constructor",
];

/** Either a manifest, or MANIFEST_INVALID whose every problem has a place in the text. */
function readOrLocate(text: string): void {
  try {
    parseManifest(text, "forge.yaml");
  } catch (error) {
    expect(error).toBeInstanceOf(ForgeError);
    expect((error as ForgeError).code).toBe("MANIFEST_INVALID");
    const problems = (error as ForgeError).details?.["problems"] as ManifestProblem[];
    expect(problems.length).toBeGreaterThan(0);
    const lines = text.split("\n").length;
    for (const { line, column, message } of problems) {
      expect(line).toBeGreaterThanOrEqual(1);
      expect(line).toBeLessThanOrEqual(lines);
      expect(column).toBeGreaterThanOrEqual(1);
      expect(message).not.toBe("");
    }
  }
}

describe("the manifest parser", { timeout: 60_000 }, () => {
  test("takes any text", () => {
    fc.assert(fc.property(fc.string({ unit: "binary", maxLength: 400 }), readOrLocate), { numRuns: 1000 });
  });

  test("takes any sequence of YAML's own marks", () => {
    const soup = fc.array(fc.oneof(fc.constantFrom(...parts), fc.stringMatching(/^[a-z0-9 ]{0,6}$/)), { maxLength: 80 });
    fc.assert(
      fc.property(soup, (tokens) => readOrLocate(tokens.join(""))),
      { numRuns: 2000 },
    );
  });

  test("takes any document", () => {
    const document = fc.object({ maxDepth: 5, withNullPrototype: false, withBigInt: false, withDate: false });
    fc.assert(
      fc.property(document, (value) => readOrLocate(stringify(value))),
      { numRuns: 500 },
    );
  });

  test("takes a valid manifest whose values are anything", () => {
    const keys = [
      "image",
      "replicas",
      "vcpus",
      "memory",
      "env",
      "command",
      "user",
      "ports",
      "health",
      "restart",
      "stopTimeout",
      "policy",
      "zzz",
    ] as const;
    const service = fc.dictionary(fc.constantFrom(...keys), fc.jsonValue({ maxDepth: 3 }));
    fc.assert(
      fc.property(service, (web) => readOrLocate(stringify({ jurisdiction: "de", services: { web: { image: "./i", ...web } } }))),
      { numRuns: 500 },
    );
  });

  test("takes every small mutation of a valid manifest", () => {
    const at = fc.integer({ min: 0, max: valid.length });
    const mutation = fc.oneof(
      fc.record({ kind: fc.constant("insert" as const), at, text: fc.constantFrom(...parts) }),
      fc.record({ kind: fc.constant("delete" as const), at, length: fc.integer({ min: 1, max: 40 }) }),
      fc.record({ kind: fc.constant("copy" as const), at, from: at, length: fc.integer({ min: 1, max: 60 }) }),
    );
    const mutated = fc.array(mutation, { minLength: 1, maxLength: 4 }).map((steps) =>
      steps.reduce((text, step) => {
        if (step.kind === "insert") return text.slice(0, step.at) + step.text + text.slice(step.at);
        if (step.kind === "delete") return text.slice(0, step.at) + text.slice(step.at + step.length);
        return text.slice(0, step.at) + text.slice(step.from, step.from + step.length) + text.slice(step.at);
      }, valid),
    );
    expect(() => parseManifest(valid, "forge.yaml")).not.toThrow();
    fc.assert(fc.property(mutated, readOrLocate), { numRuns: 3000 });
  });
});
