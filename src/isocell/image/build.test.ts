import { mkdir, mkdtemp, readdir, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import fc from "fast-check";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { ForgeError } from "../../base/errors.ts";
import { hostSources } from "./apt.ts";
import { buildImage } from "./build.ts";
import { parseRecipe, readRecipe } from "./recipe.ts";

let base: string;
beforeEach(async () => {
  base = await mkdtemp(join(tmpdir(), "forge-build-"));
});
afterEach(async () => {
  await rm(base, { recursive: true, force: true });
});

describe("image.yaml", () => {
  test("the examples are valid", async () => {
    const examples = join(import.meta.dirname, "../../../examples");
    for (const name of ["web", "postgres", "redis"]) expect((await readRecipe(join(examples, name))).suite).toBe("bookworm");
  });

  test.each<[string, RegExp]>([
    ["suite: bookworm\npackages: [a1]\ncolour: red", /colour/],
    ["packages: [nginx]", /suite/],
    ["suite: bookworm\npackages: [--hook=x]", /packages\.0/],
    ["suite: --x\npackages: [nginx]", /suite/],
    ["suite: bookworm\npackages: [nginx]\nfiles: [{from: a, to: /../etc/x}]", /files\.0\.to/],
    ["suite: bookworm\npackages: [nginx]\nfiles: [{from: a, to: etc/x}]", /files\.0\.to/],
    ["suite: bookworm\npackages: [nginx]\nports: [70000]", /ports\.0/],
    ["suite: bookworm\nsuite: other\npackages: [nginx]", /unique/i],
    ["a: [", /./],
  ])("%j is refused with its place", (source, reason) => {
    expect(() => parseRecipe(source)).toThrow(expect.objectContaining({ code: "INVALID_INPUT", message: expect.stringMatching(reason) }));
  });

  test("no text makes it throw anything else", () => {
    fc.assert(
      fc.property(fc.oneof(fc.string(), fc.json()), (source) => {
        try {
          parseRecipe(source);
        } catch (error) {
          expect(error).toBeInstanceOf(ForgeError);
        }
      }),
    );
  });

  test("a missing recipe is NOT_FOUND, and a folder that is no layout is not replaced", async () => {
    await expect(readRecipe(base)).rejects.toMatchObject({ code: "NOT_FOUND" });
    await writeFile(join(base, "image.yaml"), "suite: bookworm\npackages: [nginx]\n");
    await mkdir(join(base, "precious"));
    await writeFile(join(base, "precious/file"), "kept");
    await expect(buildImage(base, { output: join(base, "precious") })).rejects.toMatchObject({ code: "CONFLICT" });
    expect(await readFile(join(base, "precious/file"), "utf8")).toBe("kept");
    expect((await readdir(base)).sort()).toEqual(["image.yaml", "precious"]);
  });
});

describe("the machine's apt sources", () => {
  test("both forms are read; other suites and repositories stay out", async () => {
    await mkdir(join(base, "sources.list.d"));
    await writeFile(
      join(base, "sources.list"),
      [
        "# a note",
        "deb  http://mirror.example/debian   bookworm main contrib",
        "deb-src http://mirror.example/debian bookworm main",
        "deb http://mirror.example/debian sid main",
        "",
      ].join("\n"),
    );
    const stanzas = [
      "Types: deb deb-src\nURIs: http://mirror.example/security\n# between\nSuites: bookworm-security trixie-security",
      "Components: main\nSigned-By: /usr/share/keyrings/k.gpg\n",
      "Types: deb\nURIs: http://other.example\nSuites: bookworm\nComponents: stable\n",
      "Enabled: no\nTypes: deb\nURIs: http://off.example\nSuites: bookworm\nComponents: main\n",
    ].join("\n");
    await writeFile(join(base, "sources.list.d/debian.sources"), stanzas);
    expect(await hostSources("bookworm", base)).toEqual([
      "deb http://mirror.example/debian bookworm main contrib",
      "deb [signed-by=/usr/share/keyrings/k.gpg] http://mirror.example/security bookworm-security main",
    ]);
    expect(await hostSources("noble", base)).toEqual([]);
    expect(await hostSources("bookworm", join(base, "absent"))).toEqual([]);
  });
});
