import { execFileSync } from "node:child_process";
import { existsSync, readFileSync } from "node:fs";
import { dirname, join, normalize, relative, resolve } from "node:path";
import { describe, expect, test } from "vitest";
import { type ErrorCode, errorCodes } from "../src/base/errors.ts";

/** House rules as a test. A rule that is in the way is changed here, with its reason; it is not gone around. */

const root = resolve(import.meta.dirname, "..");
const files = trackedFiles();
const code = files.filter((file) => /^(src|tools|test|bench)\/.*\.ts$/.test(file));
const source = code.filter((file) => file.startsWith("src/"));
const product = source.filter((file) => !isTest(file));
const texts = new Map(files.filter(isText).map((file) => [file, readFileSync(join(root, file), "utf8")]));

interface ImportRule {
  /** The folder below src/ that the rule is about; "" is src/ itself. */
  readonly folder: string;
  /** Folders it may import from, besides its own. A primitive's name means its index.ts alone. */
  readonly from: readonly string[];
  /** npm packages: all, or these. */
  readonly packages: "any" | readonly string[];
  readonly reason: string;
}

const primitives = ["isocell", "mesh", "vault", "observe", "audit"];
const primitiveDoors = primitives.flatMap((name) => [`${name}/index.ts`]).concat("isocell/image/index.ts");
const notTheDatabase = ["zod", "koffi", "execa", "fast-check", "tar-stream", "yaml", "pino", "ws", "@peculiar/x509", "reflect-metadata"];
const primitiveReason = "a primitive is usable alone: it knows neither its siblings nor the database, and states the interfaces it needs";

const importRules: readonly ImportRule[] = [
  { folder: "base", from: [], packages: "any", reason: "everything stands on base, so base stands on libraries only" },
  { folder: "api", from: [], packages: ["zod"], reason: "the contract is shared with browsers: schemas and nothing that needs Node" },
  ...primitives.map((folder) => ({ folder, from: ["base/", "api/"], packages: notTheDatabase, reason: primitiveReason })),
  {
    folder: "control",
    from: ["base/", "api/", "../package.json", ...primitiveDoors],
    packages: "any",
    reason: "control and agent meet only in the contract, so that each can be replaced and run elsewhere",
  },
  {
    folder: "agent",
    from: ["base/", "api/", "../package.json", ...primitiveDoors],
    packages: "any",
    reason: "control and agent meet only in the contract, so that each can be replaced and run elsewhere",
  },
  {
    folder: "cli",
    from: ["api/", "base/", "../package.json", "isocell/image/index.ts"],
    packages: "any",
    reason: "the CLI is a client like any other: what it can do, the API can do",
  },
  { folder: "", from: ["base/", "cli/", "control/", "agent/"], packages: [], reason: "main only chooses an entry point" },
];

describe("imports", () => {
  test("every folder of src/ has a rule", () => {
    const folders = new Set(source.map(folderOf));
    expect([...folders].filter((folder) => !importRules.some((rule) => rule.folder === folder))).toEqual([]);
  });

  test.each(importRules)("src/$folder: $reason", ({ folder, from, packages }) => {
    const offences: string[] = [];
    for (const file of product.filter((candidate) => folderOf(candidate) === folder)) {
      for (const target of importsOf(file)) {
        if (target.startsWith("node:")) continue;
        const inside = resolveImport(file, target);
        const isAllowed =
          inside === undefined
            ? packages === "any" || packages.includes(packageName(target))
            : (folder !== "" && inside.startsWith(`${folder}/`)) ||
              from.some((prefix) => inside === prefix || (prefix.endsWith("/") && inside.startsWith(prefix)));
        if (!isAllowed) offences.push(`${file} imports ${target}`);
      }
    }
    expect(offences).toEqual([]);
  });

  test("nothing imports from test/, and product code imports no test", () => {
    const offences = product.flatMap((file) =>
      importsOf(file)
        .filter((target) => /(^|\/)test\/|\.test\.ts$/.test(target))
        .map((target) => `${file}: ${target}`),
    );
    expect(offences).toEqual([]);
  });

  test("every imported file exists and is named with its ending", () => {
    const offences = code.flatMap((file) =>
      importsOf(file)
        .filter((target) => target.startsWith(".") && !existsSync(join(root, dirname(file), target)))
        .map((target) => `${file}: ${target}`),
    );
    expect(offences).toEqual([]);
  });

  test("every file of src/ is reached from an entry point or a test", () => {
    const entries = code.filter(
      (file) => !file.startsWith("src/") || file === "src/main.ts" || isTest(file) || /import\.meta\.main/.test(textOf(file)),
    );
    const reached = new Set<string>();
    const queue = [...entries];
    for (let file = queue.pop(); file !== undefined; file = queue.pop()) {
      if (reached.has(file)) continue;
      reached.add(file);
      for (const target of importsOf(file)) if (target.startsWith(".")) queue.push(normalize(join(dirname(file), target)));
    }
    expect(product.filter((file) => !reached.has(file) && !isStartedByPath(file))).toEqual([]);
  });
});

describe("form", () => {
  test("a file beyond 450 lines is asking to be two", () => {
    const exceptions: Record<string, string> = {}; // file: why it must be long
    const long = product
      .filter((file) => lineCount(file) > 450 && !(file in exceptions))
      .map((file) => `${file}: ${lineCount(file)} lines`);
    expect(long).toEqual([]);
    expect(Object.keys(exceptions).filter((file) => !product.includes(file) || lineCount(file) <= 450)).toEqual([]);
  });

  test("no line is longer than 140 characters, unless one text in it is what is long", () => {
    const watched = files.filter((file) => /\.(ts|c|h)$/.test(file) && /^(src|tools|test|bench)\//.test(file));
    const breakable = /^(?!.*(["'`/]).{60,}\1).{141,}$/;
    const long = watched.flatMap((file) => linesMatching(file, breakable));
    expect(long).toEqual([]);
  });

  test.each<[string, RegExp, string]>([
    ["no default exports: a thing has one name", /^export default /, "*.config.ts"],
    ["no notes to self: what is open is an issue", new RegExp(`\\b(${["TO", "DO"].join("")}|${["FIX", "ME"].join("")}|XXX|HACK)\\b`), ""],
    ["no switched-off rules", /oxlint-disable|eslint-disable|@ts-ignore|@ts-nocheck|@ts-expect-error/, ""],
    ["no focused tests", /\b(test|describe|it)\.only\b/, ""],
  ])("%s", (_, pattern, except) => {
    const suffix = except.replace("*", "");
    const watched = code.filter((file) => file !== "test/tidy.test.ts" && !(suffix !== "" && file.endsWith(suffix)));
    expect(watched.flatMap((file) => linesMatching(file, pattern).filter((place) => !/: *(\/\/|\*|\/\*\*)/.test(place)))).toEqual([]);
  });

  test("names say what is inside: no utils, helpers, common, misc", () => {
    expect(files.filter((file) => /(^|\/)(utils?|helpers?|common|misc|shared)(\.|\/)/.test(file))).toEqual([]);
  });

  test("re-exports stand only at a primitive's door", () => {
    const doors = new Set([...primitives.map((name) => `src/${name}/index.ts`), "src/isocell/image/index.ts"]);
    const offences = product.filter((file) => !doors.has(file)).flatMap((file) => linesMatching(file, /^export (\*|\{.*\}) from /));
    expect(offences).toEqual([]);
    expect(source.filter((file) => file.endsWith("/index.ts") && !doors.has(file) && file !== "src/cli/index.ts")).toEqual([]);
  });

  test("a test stands beside what it tests, or in test/", () => {
    const lonely = source
      .filter((file) => file.endsWith(".test.ts"))
      .filter((file) => {
        const stem = file.replace(/(\.[a-z-]+)?(\.e2e)?\.test\.ts$/, "");
        return (
          !files.some(
            (other) => !isTest(other) && (other.startsWith(`${stem}.`) || other.startsWith(`${file.replace(/(\.e2e)?\.test\.ts$/, "")}.`)),
          ) && !files.includes(join(dirname(file), "index.ts"))
        );
      });
    expect(lonely).toEqual([]);
  });
});

describe("error codes", () => {
  const raised = new Map<string, string>();
  for (const file of product) {
    for (const [, name] of textOf(file).matchAll(/"([A-Z][A-Z_]+)"/g)) if (name !== undefined && name in errorCodes) raised.set(name, file);
    for (const [, name] of textOf(file).matchAll(/\bnew ForgeError\(\s*"([A-Z_]+)"/g)) if (name !== undefined) raised.set(name, file);
  }

  test("every code that is raised is registered", () => {
    expect([...raised].filter(([name]) => !(name in errorCodes))).toEqual([]);
  });

  test("every registered code is raised somewhere", () => {
    expect((Object.keys(errorCodes) as ErrorCode[]).filter((name) => !raised.has(name))).toEqual([]);
  });
});

describe("packages", () => {
  const manifest = JSON.parse(readFileSync(join(root, "package.json"), "utf8")) as Record<string, Record<string, string> | undefined>;
  const groups = ["dependencies", "devDependencies", "optionalDependencies"];
  const all = groups.flatMap((group) => Object.entries(manifest[group] ?? {}).map(([name, version]) => ({ group, name, version })));

  test("are pinned to one version", () => {
    expect(all.filter(({ version }) => !/^\d+\.\d+\.\d+(-[0-9a-z.]+)?$/.test(version))).toEqual([]);
  });

  test("are used", () => {
    const imported = new Set(code.concat("vitest.config.ts").flatMap((file) => importsOf(file).map(packageName)));
    const types = (name: string) => imported.has(name.replace("@types/", "")) || name === "@types/node";
    // programs, and what fastify-type-provider-zod asks for beside itself
    const programs = new Set(["typescript", "oxlint", "oxlint-tsgolint", "oxfmt", "@fastify/swagger"]);
    const unused = all.filter(
      ({ group, name }) =>
        group !== "optionalDependencies" && !imported.has(name) && !programs.has(name) && !(name.startsWith("@types/") && types(name)),
    );
    expect(unused.map(({ name }) => name)).toEqual([]);
  });

  test("that run in the product are dependencies, not development ones", () => {
    const development = new Set(Object.keys(manifest["devDependencies"] ?? {}));
    const offences = product.flatMap((file) =>
      importsOf(file)
        .filter((target) => development.has(packageName(target)))
        .map((target) => `${file}: ${target}`),
    );
    expect(offences).toEqual([]);
  });
});

describe("the repository speaks of the product alone", () => {
  test("no path of somebody's machine", () => {
    const machine = new RegExp(`(?<![\\w.])/(${["Users", "root", "work"].join("|")})/(?!\\.)[a-z]`);
    const watched = [...texts.keys()].filter((file) => !/^(package-lock\.json|test\/tidy\.test\.ts)$/.test(file));
    expect(watched.flatMap((file) => linesMatching(file, machine))).toEqual([]);
  });

  test("the lock names no registry", () => {
    const hosts = new Set(
      [...(texts.get("package-lock.json") ?? "").matchAll(/"resolved": "https?:\/\/([^/"]+)/g)].map(([, host]) => host),
    );
    expect([...hosts]).toEqual([]);
  });

  test("has its licence", () => {
    expect(textOf("LICENSE")).toContain("Apache License");
    expect(textOf("package.json")).toContain('"license": "Apache-2.0"');
  });
});

/** What git would commit: tracked files, and new ones that are not ignored. */
function trackedFiles(): string[] {
  const listed = execFileSync("git", ["ls-files", "--cached", "--others", "--exclude-standard"], { cwd: root, encoding: "utf8" });
  return [...new Set(listed.split("\n"))].filter((file) => file !== "" && existsSync(join(root, file)));
}

function isText(file: string): boolean {
  return /\.(ts|c|h|json|md|ya?ml|service|config)$|(^|\/)(LICENSE|setup|run|forge|\.[a-z]+)$/.test(file);
}

/** Tests, and the fixtures beside them. */
function isTest(file: string): boolean {
  return file.endsWith(".test.ts") || file.endsWith(".fixture.ts");
}

function textOf(file: string): string {
  return texts.get(file) ?? "";
}

function lineCount(file: string): number {
  return textOf(file).split("\n").length - 1;
}

function linesMatching(file: string, pattern: RegExp): string[] {
  return textOf(file)
    .split("\n")
    .flatMap((line, index) => (pattern.test(line) ? [`${file}:${index + 1}: ${line.trim()}`] : []));
}

/** The folder below src/ a file is in; "" for src/ itself. */
function folderOf(file: string): string {
  return /^src\/([^/]+)\//.exec(file)?.[1] ?? "";
}

function importsOf(file: string): string[] {
  const text = file === "vitest.config.ts" ? readFileSync(join(root, file), "utf8") : textOf(file);
  const found = text.matchAll(/^(?:import|export)\b[^;"']*?from "([^"]+)"|^import "([^"]+)"|\bimport\("([^"]+)"\)/gm);
  return [...found].map(([, from, bare, dynamic]) => from ?? bare ?? dynamic ?? "");
}

/** The target's path as seen from src/, or undefined for a package. */
function resolveImport(file: string, target: string): string | undefined {
  if (!target.startsWith(".")) return undefined;
  return relative("src", join(dirname(file), target));
}

function packageName(target: string): string {
  return target
    .split("/")
    .slice(0, target.startsWith("@") ? 2 : 1)
    .join("/");
}

/** A program of its own (a worker, a child) that another file names by its path. */
function isStartedByPath(file: string): boolean {
  const name = file.split("/").at(-1) ?? file;
  return code.some((other) => other !== file && textOf(other).includes(`${name}"`));
}
