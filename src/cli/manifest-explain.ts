import { z } from "zod";
import { manifestSchema } from "../api/manifest.ts";

/** What one schema issue means to the person who wrote the manifest. */
export interface Finding {
  readonly path: readonly PropertyKey[];
  /** A key inside `path` that nothing knows. */
  readonly unknownKey?: string;
  readonly message: string;
}

type Issue = z.core.$ZodIssue;

/** The findings of one issue; `root` is the whole document as plain values, for the value that was refused. */
export function explainIssue(issue: Issue, root: unknown): Finding[] {
  const { path } = issue;
  if (issue.code === "unrecognized_keys") return issue.keys.map((key) => ({ path, unknownKey: key, message: explainUnknown(key, path) }));
  if (issue.code === "invalid_key") return [{ path, message: `is not a name: ${issue.issues[0]?.message ?? "malformed"}` }];
  const value = valueAt(root, path);
  const message = explainValue(issue, value);
  const remedy = remedyFor(path, value);
  return [{ path, message: remedy === undefined ? message : `${message}; ${remedy}` }];
}

function explainUnknown(key: string, path: readonly PropertyKey[]): string {
  const known = knownKeys(path);
  const close = nearest(key, known);
  if (close !== undefined) return `is not a known key; did you mean ${close}?`;
  return known.length === 0 ? "is not a known key" : `is not a known key here; there are ${known.join(", ")}`;
}

function explainValue(issue: Issue, value: unknown): string {
  if (value === undefined) return issue.code === "invalid_type" ? `is missing: it must be ${article(issue.expected)}` : issue.message;
  switch (issue.code) {
    case "invalid_type":
      return `must be ${article(issue.expected)}, not ${describeValue(value)}`;
    case "invalid_value":
      return `must be ${listed(issue.values.map(String))}, not ${describeValue(value)}`;
    case "too_small":
      return sized(issue.origin, "at least", Number(issue.minimum), value);
    case "too_big":
      return sized(issue.origin, "at most", Number(issue.maximum), value);
    default:
      return issue.message;
  }
}

function sized(origin: string, bound: string, limit: number, value: unknown): string {
  if (origin === "string") return `must have ${bound} ${limit} characters`;
  if (origin === "array") return `must have ${bound} ${limit} ${limit === 1 ? "entry" : "entries"}`;
  return `must be ${bound} ${limit}, not ${describeValue(value)}`;
}

/** What to write instead, where the mistake is a usual one. */
function remedyFor(path: readonly PropertyKey[], value: unknown): string | undefined {
  const field = path.at(-1);
  if (field === "memory") return memoryRemedy(value);
  if (["interval", "timeout", "grace", "stopTimeout"].includes(String(field))) return durationRemedy(value);
  const isText = path.at(-2) === "env" || path.at(-2) === "command" || field === "user";
  if (isText && ["number", "boolean"].includes(typeof value)) return `write it in quotes: "${String(value)}"`;
  if (isText && value === null) return 'write "" for an empty text';
  if (field === "command" && typeof value === "string")
    return `write a list: [${value
      .split(/\s+/)
      .slice(0, 8)
      .map((word) => JSON.stringify(word))
      .join(", ")}]`;
  return undefined;
}

function memoryRemedy(value: unknown): string | undefined {
  if (typeof value === "number")
    return value >= 1024 * 1024
      ? `bytes are written with their unit: ${Math.ceil(value / (1024 * 1024))}MiB`
      : `give the unit: ${value}MiB`;
  const match = typeof value === "string" ? /^\s*([0-9]{1,7})\s*([kmgt]?)i?b?\s*$/i.exec(value) : null;
  const unit = match?.[2]?.toLowerCase();
  if (match === null || value === `${match[1]}MiB` || value === `${match[1]}GiB`) return undefined;
  if (unit === "m" || unit === "") return `write ${match[1]}MiB`;
  return unit === "g" ? `write ${match[1]}GiB` : undefined;
}

function durationRemedy(value: unknown): string | undefined {
  if (typeof value === "number") return `give the unit: ${value}s`;
  const match = typeof value === "string" ? /^\s*([0-9]{1,7})\s*(ms|millis\w*|s|sec\w*|m|min\w*|h|hours?)?\s*$/i.exec(value) : null;
  if (match === null) return undefined;
  const unit = (match[2] ?? "s").toLowerCase();
  if (value === `${match[1]}${unit}` && unit !== "h") return undefined;
  if (unit.startsWith("h")) return `write ${Number(match[1]) * 60}m`;
  return `write ${match[1]}${unit === "ms" || unit.startsWith("milli") ? "ms" : unit.charAt(0)}`;
}

/** The known key that is a small slip away, if one is. */
function nearest(key: string, known: readonly string[]): string | undefined {
  const ranked = known.map((candidate) => ({ candidate, edits: editDistance(key.toLowerCase().slice(0, 40), candidate.toLowerCase()) }));
  const best = ranked.sort((one, other) => one.edits - other.edits)[0];
  return best !== undefined && best.edits <= Math.max(1, Math.floor(best.candidate.length / 3)) ? best.candidate : undefined;
}

/** Keys the schema knows in the mapping at `path`, read off its JSON Schema so that no second list exists. */
function knownKeys(path: readonly PropertyKey[]): string[] {
  let schema: JsonSchema | undefined = z.toJSONSchema(manifestSchema, { io: "input" }) as JsonSchema;
  for (const part of path) {
    if (typeof part === "number") schema = schema?.items;
    else
      schema =
        schema?.properties?.[String(part)] ?? (typeof schema?.additionalProperties === "object" ? schema.additionalProperties : undefined);
  }
  return Object.keys(schema?.properties ?? {}).filter((key) => !key.startsWith("$"));
}

interface JsonSchema {
  readonly properties?: Readonly<Record<string, JsonSchema>>;
  readonly additionalProperties?: JsonSchema | boolean;
  readonly items?: JsonSchema;
}

/** Levenshtein distance, where two neighbours exchanged count as one edit. */
function editDistance(one: string, other: string): number {
  const rows: number[][] = [Array.from({ length: other.length + 1 }, (_, index) => index)];
  const at = (row: number, column: number): number => rows[row]?.[column] ?? 0;
  for (let row = 1; row <= one.length; row += 1) {
    const line = [row];
    rows.push(line);
    for (let column = 1; column <= other.length; column += 1) {
      const cost = one[row - 1] === other[column - 1] ? 0 : 1;
      line[column] = Math.min(at(row - 1, column) + 1, at(row, column - 1) + 1, at(row - 1, column - 1) + cost);
      const isSwap = row > 1 && column > 1 && one[row - 1] === other[column - 2] && one[row - 2] === other[column - 1];
      if (isSwap) line[column] = Math.min(line[column] ?? 0, at(row - 2, column - 2) + 1);
    }
  }
  return at(one.length, other.length);
}

function valueAt(root: unknown, path: readonly PropertyKey[]): unknown {
  let value = root;
  for (const part of path) {
    if (typeof value !== "object" || value === null || !Object.hasOwn(value, part)) return undefined;
    value = (value as Record<PropertyKey, unknown>)[part];
  }
  return value;
}

function article(type: string): string {
  const names: Record<string, string> = {
    string: "a text",
    number: "a number",
    int: "a whole number",
    boolean: "true or false",
    object: "a mapping",
    record: "a mapping",
    array: "a list",
  };
  return names[type] ?? type;
}

function describeValue(value: unknown): string {
  if (value === null) return "empty";
  if (Array.isArray(value)) return "a list";
  if (typeof value === "object") return "a mapping";
  return JSON.stringify(typeof value === "string" && value.length > 40 ? `${value.slice(0, 40)}…` : value) ?? "nothing";
}

function listed(values: readonly string[]): string {
  return values.length < 2 ? values.join("") : `${values.slice(0, -1).join(", ")} or ${values.at(-1)}`;
}
