import { readFile } from "node:fs/promises";
import { join } from "node:path";
import { parseDocument } from "yaml";
import { z } from "zod";
import { errnoOf, ForgeError } from "../../base/errors.ts";

/** `image.yaml`: what an image is made of. Every object is strict. */

const text = z
  .string()
  .max(4096)
  .regex(/^[^\0]*$/, "must not contain NUL");
/** Neither an option nor a path for apt: a package name, optionally with architecture and version. */
const packageSchema = z
  .string()
  .regex(/^[a-z0-9][a-z0-9+.-]{0,127}(:[a-z0-9]{1,16})?(=[A-Za-z0-9.+:~-]{1,64})?$/, "must be a package name, optionally with =version");

const fileSchema = z.strictObject({
  /** A file, relative to image.yaml. */
  from: text.min(1),
  /** Where it lies in the image. */
  to: text.regex(/^\/[^/]/, "must be an absolute path").refine((path) => !path.split("/").includes(".."), "must not contain .."),
  mode: z
    .string()
    .regex(/^0?[0-7]{3,4}$/, 'must be octal in quotes, such as "0644"')
    .default("0644"),
  owner: z
    .string()
    .regex(/^[0-9]{1,9}:[0-9]{1,9}$/, 'must be uid:gid in quotes, such as "0:0"')
    .default("0:0"),
});

const recipeSchema = z.strictObject({
  /** A suite of the distribution, such as bookworm, found in this machine's apt sources. */
  suite: z.string().regex(/^[a-z][a-z0-9.-]{0,63}$/, "must be a suite such as bookworm"),
  packages: z.array(packageSchema).min(1).max(256),
  files: z.array(fileSchema).max(256).default([]),
  entrypoint: z.array(text).max(256).default([]),
  cmd: z.array(text).max(256).default([]),
  env: z.record(z.string().regex(/^[A-Za-z_][A-Za-z0-9_]*$/, "must be a variable name"), text).default({}),
  user: text.default(""),
  workdir: text.regex(/^\//, "must be an absolute path").default("/"),
  ports: z.array(z.int().min(1).max(65_535)).max(64).default([]),
  stopSignal: z
    .string()
    .regex(/^SIG[A-Z0-9]{2,8}$/, "must be a signal's name such as SIGTERM")
    .default("SIGTERM"),
});
export type ImageRecipe = z.output<typeof recipeSchema>;

/** Reads and checks `image.yaml` in the folder. INVALID_INPUT names what is wrong, and where. */
export async function readRecipe(folder: string): Promise<ImageRecipe> {
  const path = join(folder, "image.yaml");
  try {
    return parseRecipe(await readFile(path, "utf8"));
  } catch (error) {
    if (errnoOf(error) === "ENOENT" || errnoOf(error) === "ENOTDIR") throw new ForgeError("NOT_FOUND", `there is no ${path}`);
    if (error instanceof ForgeError) throw new ForgeError(error.code, `${path}: ${error.message}`);
    throw error;
  }
}

export function parseRecipe(source: string): ImageRecipe {
  const document = parseDocument(source, { uniqueKeys: true });
  const problem = document.errors[0];
  if (problem !== undefined) throw new ForgeError("INVALID_INPUT", problem.message.split("\n")[0] ?? "not YAML");
  const result = recipeSchema.safeParse(toPlain(document));
  if (result.success) return result.data;
  const issues = result.error.issues.slice(0, 5).map(({ path, message }) => `${path.join(".") || "the recipe"}: ${message}`);
  throw new ForgeError("INVALID_INPUT", issues.join("; "));
}

/** Aliases are bounded, or a few lines of YAML could fill the memory. */
function toPlain(document: ReturnType<typeof parseDocument>): unknown {
  try {
    return document.toJS({ maxAliasCount: 100 });
  } catch (error) {
    throw new ForgeError("INVALID_INPUT", error instanceof Error ? error.message : "not YAML");
  }
}
