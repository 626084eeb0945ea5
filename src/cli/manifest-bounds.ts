import { CST, Lexer } from "yaml";
import { ForgeError } from "../base/errors.ts";

const maximumBytes = 1024 * 1024;
/** A full manifest of 64 services stays well below; a mapping with more keys than this allows takes the parser seconds. */
const maximumTokens = 65_536;
const maximumDepth = 32;

/**
 * Refuses a document that would cost the YAML parser minutes or its stack: measured on a 1 MiB text of `[` or `? `.
 * Works on tokens, one pass, no recursion.
 */
export function checkYamlBounds(text: string, file: string): void {
  if (Buffer.byteLength(text) > maximumBytes) throw tooMuch(file, 1, "is larger than 1 MiB");
  let line = 1;
  let tokens = 0;
  let flowDepth = 0;
  let openersInLine = 0;
  let isScalar = false; // the lexer announces a scalar with a token of its own
  for (const token of new Lexer().lex(text)) {
    tokens += 1;
    if (tokens > maximumTokens) throw tooMuch(file, line, "has more parts than a manifest can need");
    const type: CST.TokenType | null = isScalar ? "scalar" : CST.tokenType(token);
    isScalar = !isScalar && type === "scalar";
    if (type === "flow-seq-start" || type === "flow-map-start") flowDepth += 1;
    else if (type === "flow-seq-end" || type === "flow-map-end") flowDepth = Math.max(0, flowDepth - 1);
    else if (isBlockOpener(type) && flowDepth === 0) openersInLine += 1;
    else if (type === "space" && openersInLine === 0 && token.length > 4 * maximumDepth)
      throw tooMuch(file, line, "is indented deeper than a manifest can need");
    if (flowDepth > maximumDepth || openersInLine > maximumDepth) throw tooMuch(file, line, "is nested deeper than a manifest can need");
    const newlines = token.split("\n").length - 1;
    line += newlines;
    if (newlines > 0) openersInLine = 0;
  }
}

function isBlockOpener(type: CST.TokenType | null): boolean {
  return type === "seq-item-ind" || type === "explicit-key-ind" || type === "map-value-ind" || type === "anchor" || type === "tag";
}

function tooMuch(file: string, line: number, message: string): ForgeError {
  return new ForgeError("MANIFEST_INVALID", `${file}:${line}:1: ${message}`, {
    details: { file, problems: [{ line, column: 1, key: "", message }] },
  });
}
