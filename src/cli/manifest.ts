import { type Document, isMap, isNode, isScalar, LineCounter, type Node, parseDocument, visit } from "yaml";
import { type Manifest, manifestSchema } from "../api/manifest.ts";
import { ForgeError } from "../base/errors.ts";
import { checkYamlBounds } from "./manifest-bounds.ts";
import { explainIssue, type Finding } from "./manifest-explain.ts";

/** Aliases may multiply the document at most this often; a manifest has no use for more. */
const maximumAliases = 100;
const reportedProblems = 20;

/** One thing wrong with a manifest, and where. Lines and columns count from 1. */
export interface ManifestProblem {
  readonly line: number;
  readonly column: number;
  /** `services.web.memory`; empty for the document as a whole. */
  readonly key: string;
  readonly message: string;
}

/**
 * Reads `forge.yaml`: YAML 1.2 with the core schema, then the contract's own schema. Throws MANIFEST_INVALID with all
 * problems at once, each as `file:line:column: key: what it must be`; the same list is in `details.problems`.
 */
export function parseManifest(text: string, file: string): Manifest {
  checkYamlBounds(text, file);
  const lines = new LineCounter();
  const document = composeDocument(text, file, lines);
  if (document.errors.length > 0)
    throw invalid(
      file,
      document.errors.map((error) => yamlProblem(error, lines)),
    );
  const value = toPlain(document, file, lines);
  const parsed = manifestSchema.safeParse(value);
  if (parsed.success) return parsed.data;
  throw invalid(
    file,
    parsed.error.issues.flatMap((issue) => explainIssue(issue, value)).map((finding) => locate(document, lines, finding)),
  );
}

type Parsed = Document.Parsed;

function composeDocument(text: string, file: string, lineCounter: LineCounter): Parsed {
  try {
    return parseDocument(text, {
      version: "1.2",
      schema: "core",
      stringKeys: true,
      prettyErrors: false,
      logLevel: "error",
      resolveKnownTags: false,
      lineCounter,
    });
  } catch (error) {
    // The bounds keep the parser within its stack; should it still give up, that is the document's doing.
    throw invalid(file, [
      { line: 1, column: 1, key: "", message: `cannot be read as YAML: ${error instanceof Error ? error.message : String(error)}` },
    ]);
  }
}

function toPlain(document: Parsed, file: string, lines: LineCounter): unknown {
  try {
    return document.toJS({ maxAliasCount: maximumAliases });
  } catch (error) {
    const message =
      error instanceof Error && error.message.startsWith("Unresolved alias")
        ? "an alias (*name) has no anchor (&name) before it"
        : "aliases (*name) multiply beyond what a manifest may; write the values out";
    const { line, col } = lines.linePos(firstAlias(document));
    throw invalid(file, [{ line: Math.max(1, line), column: Math.max(1, col), key: "", message }]);
  }
}

function firstAlias(document: Parsed): number {
  let offset = 0;
  visit(document, {
    Alias(_, alias) {
      offset = alias.range?.[0] ?? 0;
      return visit.BREAK;
    },
  });
  return offset;
}

function yamlProblem(error: { message: string; code: string; pos: [number, number] }, lines: LineCounter): ManifestProblem {
  const { line, col } = lines.linePos(error.pos[0]);
  const messages: Record<string, string> = {
    DUPLICATE_KEY: "this key is already there: a key may be given once",
    TAB_AS_INDENT: "indent with spaces: YAML does not take tabs",
    MULTIPLE_DOCS: "a manifest is one document: remove what follows ---",
    NON_STRING_KEY: "a key must be a plain name",
  };
  return {
    line: Math.max(1, line),
    column: Math.max(1, col),
    key: "",
    message: messages[error.code] ?? `not valid YAML: ${error.message}`,
  };
}

/** Where a finding stands: at its value, at the unknown key itself, or for what is missing at the mapping that lacks it. */
function locate(document: Parsed, lines: LineCounter, finding: Finding): ManifestProblem {
  const offset =
    finding.unknownKey === undefined
      ? offsetOf(document, finding.path)
      : (keyOffset(nodeAt(document, finding.path), finding.unknownKey) ?? 0);
  const { line, col } = lines.linePos(offset);
  const path = finding.unknownKey === undefined ? finding.path : [...finding.path, finding.unknownKey];
  return { line: Math.max(1, line), column: Math.max(1, col), key: formatPath(path), message: finding.message };
}

function offsetOf(document: Parsed, path: readonly PropertyKey[]): number {
  for (let length = path.length; length > 0; length -= 1) {
    const node = nodeAt(document, path.slice(0, length));
    if (node === undefined) continue;
    const isMissing = length < path.length;
    const parent = nodeAt(document, path.slice(0, length - 1));
    // A missing key is shown at the key of the mapping that lacks it: its own line, not its first child's.
    return (isMissing || isMap(node) ? keyOffset(parent, String(path[length - 1])) : undefined) ?? node.range?.[0] ?? 0;
  }
  return document.contents?.range?.[0] ?? 0;
}

function nodeAt(document: Parsed, path: readonly PropertyKey[]): Node | undefined {
  const node: unknown = path.length === 0 ? document.contents : document.getIn(path, true);
  return isNode(node) ? node : undefined;
}

function keyOffset(node: Node | undefined, key: string): number | undefined {
  if (!isMap(node)) return undefined;
  const pair = node.items.find(({ key: candidate }) => isScalar(candidate) && String(candidate.value) === key);
  return isNode(pair?.key) ? pair.key.range?.[0] : undefined;
}

function formatPath(path: readonly PropertyKey[]): string {
  return path.reduce<string>(
    (text, part) => (typeof part === "number" ? `${text}[${part}]` : text === "" ? String(part) : `${text}.${String(part)}`),
    "",
  );
}

function invalid(file: string, problems: readonly ManifestProblem[]): ForgeError {
  const ordered = problems.toSorted((one, other) => one.line - other.line || one.column - other.column);
  const sorted = ordered.filter(({ key }, index) => key === "" || key !== ordered[index - 1]?.key); // one word on one value
  const shown = sorted
    .slice(0, reportedProblems)
    .map(({ line, column, key, message }) => `${file}:${line}:${column}: ${key === "" ? "" : `${key}: `}${message}`);
  const more = sorted.length > reportedProblems ? [`… and ${sorted.length - reportedProblems} more`] : [];
  return new ForgeError("MANIFEST_INVALID", [...shown, ...more].join("\n"), { details: { file, problems: sorted.slice(0, 200) } });
}
