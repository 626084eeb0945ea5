import { readFileSync } from "node:fs";
import { describe, expect, test } from "vitest";
import { ForgeError } from "../base/errors.ts";
import { type ManifestProblem, parseManifest } from "./manifest.ts";

const valid = `
jurisdiction: de
services:
  web:
    image: ./image
    memory: 512MiB
    env:
      GREETING: "hello"
    ports:
      - { name: http, port: 80, publish: 8080 }
    health: { http: /, port: 80 }
`;

function problemsOf(text: string): ManifestProblem[] {
  try {
    parseManifest(text, "forge.yaml");
  } catch (error) {
    expect(error).toBeInstanceOf(ForgeError);
    expect((error as ForgeError).code).toBe("MANIFEST_INVALID");
    return (error as ForgeError).details?.["problems"] as ManifestProblem[];
  }
  throw new Error("the manifest was accepted");
}

/** A service with one line replaced or added. */
function withLine(line: string): string {
  return `jurisdiction: de\nservices:\n  web:\n    image: ./image\n    ${line}\n`;
}

describe("parseManifest", () => {
  test("reads a manifest and fills in the defaults", () => {
    const manifest = parseManifest(valid, "forge.yaml");
    expect(manifest.services["web"]).toMatchObject({ image: "./image", replicas: 1, vcpus: 1, memory: "512MiB", restart: "always" });
    expect(manifest.services["web"]?.health?.interval).toBe("2s");
  });

  test("JSON is YAML", () => {
    expect(parseManifest(JSON.stringify({ jurisdiction: "de", services: { web: { image: "./image" } } }), "forge.json").jurisdiction).toBe(
      "de",
    );
  });

  test.each([
    ["memory: 256MB", 13, "services.web.memory", "write 256MiB"],
    ["memory: 2GB", 13, "services.web.memory", "write 2GiB"],
    ["memory: 256", 13, "services.web.memory", "give the unit: 256MiB"],
    ["memory: 268435456", 13, "services.web.memory", "256MiB"],
    ["memory: 1MiB", 13, "services.web.memory", "between 96MiB and 1024GiB"],
    ["stopTimeout: 10", 18, "services.web.stopTimeout", "give the unit: 10s"],
    ["stopTimeout: 10 sec", 18, "services.web.stopTimeout", "write 10s"],
    ["stopTimeout: 1h", 18, "services.web.stopTimeout", "write 60m"],
    ["vcpu: 2", 5, "services.web.vcpu", "did you mean vcpus?"],
    ["Memory: 256MiB", 5, "services.web.Memory", "did you mean memory?"],
    ["zzz: 1", 5, "services.web.zzz", "there are image, replicas"],
    ["replicas: 0", 15, "services.web.replicas", "must be at least 1, not 0"],
    ["replicas: 1.5", 15, "services.web.replicas", "must be a whole number"],
    ["vcpus: many", 12, "services.web.vcpus", 'must be a number, not "many"'],
    ["restart: allways", 14, "services.web.restart", "always, on-failure or never"],
    ["command: nginx -g", 14, "services.web.command", 'write a list: ["nginx", "-g"]'],
    ["env: { PORT: 80 }", 18, "services.web.env.PORT", 'write it in quotes: "80"'],
    ["env: { PORT: }", 18, "services.web.env.PORT", 'write ""'],
    ["health: { http: / }", 5, "services.web.health.port", "is missing: it must be a number"],
    ["ports: [{ name: a, port: 1 }, { name: a, port: 2 }]", 43, "services.web.ports[1].name", "is used twice"],
    ["ports: [{ name: http, port: 80, pubish: 1 }]", 37, "services.web.ports[0].pubish", "did you mean publish?"],
  ])("%s", (line, column, key, words) => {
    const [problem, ...others] = problemsOf(withLine(line));
    expect(others).toEqual([]);
    expect(problem).toMatchObject({ line: 5, column, key });
    expect(problem?.message).toContain(words);
  });

  test("tells all problems at once, in the order of the file", () => {
    const found = problemsOf("jurisdiction: DE\nservices:\n  web: { image: ./i, memory: 1MB }\n  api: { vcpus: 0 }\n");
    expect(found.map(({ line, key }) => `${line} ${key}`)).toEqual([
      "1 jurisdiction",
      "3 services.web.memory",
      "4 services.api.image",
      "4 services.api.vcpus",
    ]);
  });

  test("each line of the message starts with file, line and column", () => {
    expect(() => parseManifest(withLine("memory: 1MB"), "dir/forge.yaml")).toThrow(
      /^dir\/forge\.yaml:5:13: services\.web\.memory: must be /,
    );
  });

  test.each([
    ["a key given twice", "jurisdiction: de\njurisdiction: fr\n", 2, "already there"],
    ["a tab as indent", "services:\n\tweb: 1\n", 2, "spaces"],
    ["two documents", "jurisdiction: de\n---\njurisdiction: de\n", 2, "one document"],
    ["an open bracket", "services: [1\n", 2, "not valid YAML"],
    ["an alias without anchor", "jurisdiction: *de\n", 1, "no anchor"],
    ["a list", "- web\n", 1, "must be a mapping, not a list"],
    ["nothing", "", 1, "must be a mapping"],
    ["no service", "jurisdiction: de\nservices: {}\n", 2, "at least one service"],
    ["a name with capitals", "jurisdiction: de\nservices:\n  Web: { image: ./i }\n", 3, "is not a name"],
  ])("refuses %s", (_, text, line, words) => {
    const [problem] = problemsOf(text);
    expect(problem?.line).toBe(line);
    expect(problem?.message).toContain(words);
  });

  test("an anchor may be used", () => {
    const text = "jurisdiction: de\nservices:\n  a: { image: ./i, env: &common { A: b } }\n  b: { image: ./i, env: *common }\n";
    expect(parseManifest(text, "forge.yaml").services["b"]?.env).toEqual({ A: "b" });
  });

  test("YAML 1.1's surprises stay texts", () => {
    const text = withLine("env: { A: no, B: 1_000, C: 2001-12-14 }");
    expect(parseManifest(text, "forge.yaml").services["web"]?.env).toEqual({ A: "no", B: "1_000", C: "2001-12-14" });
  });

  const bomb = `a: &a [x,x,x,x,x,x,x,x,x]\n${"bcdefgh"
    .split("")
    .map((name, index) => `${name}: &${name} [${Array(9).fill(`*${"abcdefgh"[index]}`).join(",")}]`)
    .join("\n")}`;
  test.each([
    ["an alias bomb", bomb],
    ["a mebibyte of [", "[".repeat(1024 * 1024)],
    ["a mebibyte of {a:", "{a: ".repeat(256 * 1024)],
    ["a mebibyte of -", "- ".repeat(512 * 1024)],
    ["a mebibyte of ?", "? ".repeat(512 * 1024)],
    ["a staircase", Array.from({ length: 1400 }, (_, depth) => `${" ".repeat(depth)}a:`).join("\n")],
    ["100,000 keys", Array.from({ length: 100_000 }, (_, index) => `k${index}: v`).join("\n")],
    ["more than a mebibyte", `# ${"x".repeat(1024 * 1024)}`],
  ])("refuses %s within a second", { timeout: 10_000 }, (_, text) => {
    const start = performance.now();
    expect(problemsOf(text).length).toBeGreaterThan(0);
    expect(performance.now() - start).toBeLessThan(process.env["CI"] === undefined ? 2000 : 5000);
  });

  test("a long text is no nesting", () => {
    const text = `jurisdiction: de\nservices:\n  web:\n    image: ./i\n    env:\n      LONG: |\n        ${`x${" ".repeat(200)}x\n        `.repeat(50)}\n`;
    expect(parseManifest(text, "forge.yaml").services["web"]?.env["LONG"]?.length).toBeGreaterThan(10_000);
  });

  test("every example manifest is valid", () => {
    for (const name of ["web", "postgres", "redis"]) {
      const path = new URL(`../../examples/${name}/forge.yaml`, import.meta.url);
      expect(Object.keys(parseManifest(readFileSync(path, "utf8"), path.pathname).services).length).toBeGreaterThan(0);
    }
  });
});
