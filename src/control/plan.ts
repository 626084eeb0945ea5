import { canonicalJson } from "../audit/index.ts";
import type { ServiceSpec } from "../api/manifest.ts";

/** What a service is, or is to be, as far as a plan compares it. */
export interface Shape {
  readonly jurisdiction: string;
  readonly imageDigest: string;
  readonly spec: ServiceSpec;
}

/** Human sentences, one a change. Values of variables are never told, only their names. */
export function describeChanges(before: Shape, after: Shape): string[] {
  const changes: string[] = [];
  if (before.jurisdiction !== after.jurisdiction) changes.push(`jurisdiction: ${before.jurisdiction} -> ${after.jurisdiction}`);
  if (before.imageDigest !== after.imageDigest) changes.push(`image: ${short(before.imageDigest)} -> ${short(after.imageDigest)}`);
  const fields = new Set([...Object.keys(before.spec), ...Object.keys(after.spec)] as (keyof ServiceSpec)[]);
  for (const field of fields) {
    const [old, next] = [before.spec[field], after.spec[field]];
    if (canonicalJson(old ?? null) === canonicalJson(next ?? null)) continue;
    changes.push(
      field === "env" ? `env: ${describeEnvironment(before.spec.env, after.spec.env)}` : `${field}: ${text(old)} -> ${text(next)}`,
    );
  }
  return changes;
}

/** Do these need new cells? Another number of replicas alone does not. */
export function needsNewCells(before: Shape, after: Shape): boolean {
  const { replicas: _, ...old } = before.spec;
  const { replicas: __, ...next } = after.spec;
  return (
    before.jurisdiction !== after.jurisdiction || before.imageDigest !== after.imageDigest || canonicalJson(old) !== canonicalJson(next)
  );
}

function describeEnvironment(before: Readonly<Record<string, string>>, after: Readonly<Record<string, string>>): string {
  const names = [...new Set([...Object.keys(before), ...Object.keys(after)])].toSorted();
  const words = names.map((name) => {
    if (!(name in before)) return `${name} added`;
    if (!(name in after)) return `${name} removed`;
    return before[name] === after[name] ? "" : `${name} changed`;
  });
  return words.filter((word) => word !== "").join(", ");
}

function text(value: unknown): string {
  if (value === undefined) return "none";
  return typeof value === "string" ? value : canonicalJson(value).slice(0, 300);
}

function short(digest: string): string {
  return digest.slice(0, "sha256:".length + 12);
}
