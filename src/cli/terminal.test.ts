import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { type Column, renderTable } from "./table.ts";
import { safeJson, Terminal, type TerminalOptions } from "./terminal.ts";
import { age, displayWidth, formatBytes, printable, truncate } from "./text.ts";

const columns: readonly Column<readonly [string, string]>[] = [
  { title: "NAME", value: ([name]) => name, shrink: true },
  { title: "COUNT", value: ([, count]) => count, align: "right" },
];

/** Everything that could move a cursor, retitle a window, or reorder what is read. */
const unsafe = /[\p{Cc}\u200e\u200f\u2028-\u202e\u2066-\u2069]/u;

describe("renderTable", () => {
  test("aligns by what a terminal shows", () => {
    expect(
      renderTable(columns, [
        ["web", "1"],
        ["日本", "23"],
      ]),
    ).toEqual(["NAME  COUNT", "web       1", "日本     23"]);
  });

  test("cuts the columns that may shrink, and only on a narrow terminal", () => {
    const rows = [["a-rather-long-service-name", "1"]] as const;
    expect(renderTable(columns, rows)[1]).toContain("a-rather-long-service-name");
    const narrow = renderTable(columns, rows, 20);
    expect(narrow[1]).toBe("a-rather-lon…      1");
    for (const line of narrow) expect(displayWidth(line)).toBeLessThanOrEqual(20);
  });

  test("leaves out a column with nothing in it", () => {
    expect(renderTable(columns, [["web", ""]])).toEqual(["NAME", "web"]);
  });

  test("is safe and rectangular whatever a server says", () => {
    fc.assert(
      fc.property(fc.array(fc.tuple(fc.string({ unit: "binary" }), fc.string({ unit: "binary" })), { maxLength: 5 }), (rows) => {
        const lines = renderTable(columns, rows, 40);
        expect(lines).toHaveLength(rows.length + 1);
        for (const line of lines) expect(line).not.toMatch(unsafe);
      }),
    );
  });
});

describe("printable", () => {
  test.each([
    ["plain", "plain"],
    ["\u001b[31mred\u001b[0m", "red"],
    ["\u001b]0;title\u0007text", "text"],
    ["a\tb\r", "a    b"],
    ["one\ntwo", "one\\u{a}two"],
    ["\u009b31m", ""],
    ["\u202eevil", "\\u{202e}evil"],
  ])("%j -> %j", (text, expected) => {
    expect(printable(text)).toBe(expected);
  });

  test("nothing unsafe survives", () => {
    fc.assert(
      fc.property(fc.string({ unit: "binary" }), (text) => {
        expect(printable(text)).not.toMatch(unsafe);
      }),
    );
  });
});

test("JSON keeps its value and cannot move a terminal", () => {
  fc.assert(
    fc.property(fc.jsonValue(), (value) => {
      expect(JSON.parse(safeJson(value))).toEqual(JSON.parse(JSON.stringify(value)));
      expect(safeJson(value)).not.toMatch(unsafe);
    }),
  );
});

test("truncate keeps within the width", () => {
  fc.assert(
    fc.property(fc.string({ unit: "grapheme" }).map(printable), fc.integer({ min: 1, max: 30 }), (text, width) => {
      expect(displayWidth(truncate(text, width))).toBeLessThanOrEqual(width);
    }),
  );
});

test("ages and sizes read well", () => {
  const nowMs = Date.parse("2026-01-02T00:00:00Z");
  const ages = ["2026-01-01T23:59:00Z", "2026-01-01T23:00:00Z", "2026-01-01T00:00:00Z", "2025-12-01T00:00:00Z"].map((time) =>
    age(time, nowMs),
  );
  expect([...ages, age(null), age("2026-01-03T00:00:00Z", nowMs)]).toEqual(["60s", "60m", "24h", "32d", "-", "0s"]);
  expect([0, 1023, 1024, 67_633_152].map(formatBytes)).toEqual(["0 B", "1023 B", "1.0 KiB", "64.5 MiB"]);
});

describe("Terminal", () => {
  function terminal(options: Partial<TerminalOptions> & { isTTY?: boolean }): { terminal: Terminal; out: string[]; err: string[] } {
    const [out, err]: [string[], string[]] = [[], []];
    const stream = (to: string[]) => ({
      isTTY: options.isTTY ?? false,
      columns: 80,
      write: (text: string | Uint8Array) => to.push(String(text)) > 0,
    });
    return { terminal: new Terminal({ stdout: stream(out), stderr: stream(err), env: {}, json: false, ...options }), out, err };
  }

  test("colours only a terminal, and not where NO_COLOR is set", () => {
    expect(terminal({ isTTY: true }).terminal.paint("red", "x")).toBe("\u001b[31mx\u001b[39m");
    expect(terminal({ isTTY: false }).terminal.paint("red", "x")).toBe("x");
    expect(terminal({ isTTY: true, env: { NO_COLOR: "1" } }).terminal.paint("red", "x")).toBe("x");
    expect(terminal({ isTTY: true, env: { TERM: "dumb" } }).terminal.paint("red", "x")).toBe("x");
    expect(terminal({ isTTY: true, json: true }).terminal.paint("red", "x")).toBe("x");
  });

  test("with --json stdout is one document and nothing else", () => {
    const { terminal: json, out, err } = terminal({ json: true, isTTY: true });
    json.print("words");
    json.note("words");
    json.progress(["words"]);
    json.table(columns, [["web", "1"]]);
    json.document({ items: [] });
    expect(JSON.parse(out.join(""))).toEqual({ items: [] });
    expect(err).toEqual([]);
  });

  test("progress replaces itself on a terminal and is silent in a pipe", () => {
    const live = terminal({ isTTY: true });
    live.terminal.progress(["one", "two"]);
    live.terminal.progress(["three"]);
    expect(live.err.join("")).toBe("one\ntwo\n\u001b[2A\u001b[Jthree\n");
    const piped = terminal({ isTTY: false });
    piped.terminal.progress(["one"]);
    expect(piped.err).toEqual([]);
  });
});
