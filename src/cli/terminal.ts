import { styleText } from "node:util";
import { type Column, renderTable } from "./table.ts";

export type Style = "bold" | "dim" | "red" | "green" | "yellow" | "cyan";

/** What the CLI writes to; the process's own streams, or a test's. */
export interface OutputStream {
  readonly isTTY?: boolean | undefined;
  readonly columns?: number | undefined;
  write(text: string | Uint8Array): boolean;
}

export interface TerminalOptions {
  readonly stdout: OutputStream;
  readonly stderr: OutputStream;
  readonly env: Readonly<Record<string, string | undefined>>;
  readonly json: boolean;
}

/**
 * Where a command's words go. Results go to stdout: a table or sentences for people, or with `--json` one stable
 * document (or one line an item where it is a stream). Progress and problems go to stderr.
 */
export class Terminal {
  readonly stdout: OutputStream;
  readonly stderr: OutputStream;
  readonly json: boolean;
  readonly #env: Readonly<Record<string, string | undefined>>;
  #progressLines = 0;

  constructor(options: TerminalOptions) {
    this.stdout = options.stdout;
    this.stderr = options.stderr;
    this.json = options.json;
    this.#env = options.env;
  }

  /** One line for a person on stdout; nothing with --json. The caller made foreign text printable. */
  print(line = ""): void {
    if (!this.json) this.stdout.write(`${line}\n`);
  }

  /** One line about what is going on, on stderr; nothing with --json. */
  note(line: string): void {
    if (this.json) return;
    this.#clearProgress();
    this.stderr.write(`${line}\n`);
  }

  /** Lines that replace the ones before, on a terminal; elsewhere nothing, so that logs hold each fact once. */
  progress(lines: readonly string[]): void {
    if (this.json || !this.isLive) return;
    this.#clearProgress();
    for (const line of lines) this.stderr.write(`${line}\n`);
    this.#progressLines = lines.length;
  }

  table<T>(columns: readonly Column<T>[], rows: readonly T[]): void {
    const width = this.stdout.isTTY === true ? (this.stdout.columns ?? 80) : undefined;
    for (const [index, line] of renderTable(columns, rows, width).entries()) this.print(index === 0 ? this.paint("bold", line) : line);
  }

  /** The command's result as JSON; nothing without --json. */
  document(value: unknown): void {
    if (this.json) this.stdout.write(`${safeJson(value, 2)}\n`);
  }

  /** One item of a streamed result as a line of JSON. */
  jsonLine(value: unknown): void {
    this.stdout.write(`${safeJson(value)}\n`);
  }

  /** The text in a style, where stdout and stderr are terminals and NO_COLOR (no-color.org) is not set. */
  paint(style: Style, text: string): string {
    return this.colours ? styleText(style, text, { validateStream: false }) : text;
  }

  painter(style: Style): (text: string) => string {
    return (text) => this.paint(style, text);
  }

  get colours(): boolean {
    const refused = (this.#env["NO_COLOR"] ?? "") !== "" || this.#env["TERM"] === "dumb";
    return !this.json && !refused && this.stdout.isTTY === true && this.stderr.isTTY === true;
  }

  /** Can lines be overwritten? */
  get isLive(): boolean {
    return this.stderr.isTTY === true && this.#env["TERM"] !== "dumb";
  }

  #clearProgress(): void {
    if (this.#progressLines === 0) return;
    this.stderr.write(`\u001b[${this.#progressLines}A\u001b[J`);
    this.#progressLines = 0;
  }
}

/** JSON whose strings cannot move a terminal: what JSON.stringify leaves raw (DEL, C1, bidi) is escaped too. */
export function safeJson(value: unknown, indent?: number): string {
  const escape = (character: string): string => `\\u${character.charCodeAt(0).toString(16).padStart(4, "0")}`;
  return JSON.stringify(value, null, indent).replace(/[\u007f-\u009f\u200e\u200f\u2028-\u202e\u2066-\u2069]/g, escape);
}
