import { ForgeError } from "../base/errors.ts";

/** Deeper JSON than this is refused: nothing Forge records comes near it, and recursion stays bounded. */
const maxDepth = 32;

/**
 * JSON in the one form RFC 8785 (JSON Canonicalization Scheme) allows, so that a hash over it means one value.
 * Object members that are `undefined` are left out, as JSON.stringify does. Whatever JSON cannot say exactly is refused
 * with INVALID_INPUT: NaN, infinities, bigint, functions, class instances, lone surrogates, `undefined` in an array.
 */
export function canonicalJson(value: unknown): string {
  return serialise(value, "$", 0);
}

/** Is this text exactly what canonicalJson would write for the value it holds? False for anything that is not JSON. */
export function isCanonicalJson(text: string): boolean {
  try {
    return canonicalJson(JSON.parse(text)) === text;
  } catch {
    return false;
  }
}

function serialise(value: unknown, path: string, depth: number): string {
  if (depth > maxDepth) throw refuse(path, `is nested deeper than ${maxDepth} levels`);
  if (value === null || typeof value === "boolean") return String(value);
  if (typeof value === "string") return serialiseString(value, path);
  if (typeof value === "number") {
    if (!Number.isFinite(value)) throw refuse(path, "is not a finite number");
    return JSON.stringify(value); // ECMAScript's number form is the one RFC 8785 section 3.2.2.3 prescribes
  }
  if (Array.isArray(value)) return `[${Array.from(value, (item, index) => serialise(item, `${path}[${index}]`, depth + 1)).join(",")}]`;
  if (isPlainObject(value)) return serialiseObject(value, path, depth);
  throw refuse(path, `is of a type JSON does not have (${typeof value})`);
}

/** Members sorted by the UTF-16 code units of their names (section 3.2.3), which is how JavaScript compares strings. */
function serialiseObject(object: Record<string, unknown>, path: string, depth: number): string {
  const members: string[] = [];
  for (const name of Object.keys(object).toSorted(compareCodeUnits)) {
    const value = object[name];
    if (value === undefined) continue;
    members.push(`${serialiseString(name, path)}:${serialise(value, `${path}.${name}`, depth + 1)}`);
  }
  return `{${members.join(",")}}`;
}

/** JSON.stringify escapes as section 3.2.2.2 asks, apart from lone surrogates, which have no UTF-8 form to hash. */
function serialiseString(text: string, path: string): string {
  if (!text.isWellFormed()) throw refuse(path, "holds a lone surrogate");
  return JSON.stringify(text);
}

function compareCodeUnits(left: string, right: string): number {
  return left < right ? -1 : Number(left > right);
}

function isPlainObject(value: unknown): value is Record<string, unknown> {
  if (typeof value !== "object" || value === null) return false;
  const prototype: unknown = Object.getPrototypeOf(value);
  return prototype === Object.prototype || prototype === null;
}

function refuse(path: string, problem: string): ForgeError {
  return new ForgeError("INVALID_INPUT", `a value to be recorded cannot be written as canonical JSON: ${path} ${problem}`);
}
