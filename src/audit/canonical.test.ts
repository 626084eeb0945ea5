import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { canonicalJson, isCanonicalJson } from "./canonical.ts";

/** JSON values as JSON.parse can return them: well-formed text, no undefined, no -0. */
const character = fc
  .integer({ min: 0, max: 0x10_ffff })
  .filter((point) => point < 0xd800 || point > 0xdfff)
  .map((point) => String.fromCodePoint(point));
const json = fc.jsonValue({ stringUnit: character });

describe("canonicalJson", () => {
  test("the example of RFC 8785, section 3.2.3", () => {
    const value = {
      numbers: [Number("333333333.33333329"), 1e30, 4.5, 2e-3, 0.000000000000000000000000001],
      string: "\u20ac$\u000f\u000aA'\u0042\u0022\u005c\\\"/",
      literals: [null, true, false],
    };
    const expected =
      '{"literals":[null,true,false],"numbers":[333333333.3333333,1e+30,4.5,0.002,1e-27],"string":"€$\\u000f\\nA\'B\\"\\\\\\\\\\"/"}';
    expect(canonicalJson(value)).toBe(expected);
  });

  test("members are sorted by UTF-16 code units (section 3.2.3)", () => {
    const names = ["\u20ac", "\r", "\ufb33", "1", "\u{1f600}", "\u0080", "\u00f6"];
    const sorted = Object.keys(JSON.parse(canonicalJson(Object.fromEntries(names.map((name) => [`k${name}`, 0])))) as object);
    expect(sorted).toEqual(["\r", "1", "\u0080", "\u00f6", "\u20ac", "\u{1f600}", "\ufb33"].map((name) => `k${name}`));
  });

  test("a value survives the trip, and its canonical text is a fixed point", () => {
    fc.assert(
      fc.property(json, (value) => {
        const text = canonicalJson(value);
        expect(JSON.parse(text)).toEqual(JSON.parse(JSON.stringify(value)));
        expect(isCanonicalJson(text)).toBe(true);
      }),
    );
  });

  test("the order in which members were added does not matter", () => {
    fc.assert(
      fc.property(fc.uniqueArray(fc.tuple(fc.string(), json), { selector: ([name]) => name }), (members) => {
        expect(canonicalJson(Object.fromEntries(members))).toBe(canonicalJson(Object.fromEntries(members.toReversed())));
      }),
    );
  });

  test("undefined members are left out", () => {
    expect(canonicalJson({ b: undefined, a: 1 })).toBe('{"a":1}');
  });

  test("a member called __proto__ is a member like any other", () => {
    expect(canonicalJson(JSON.parse('{"__proto__":{"a":1}}'))).toBe('{"__proto__":{"a":1}}');
  });

  const deep = Array.from({ length: 40 }).reduce<unknown>((inner) => [inner], 0);
  test.each([
    ["NaN", Number.NaN],
    ["infinity", { a: Number.POSITIVE_INFINITY }],
    ["a lone surrogate", ["\ud800"]],
    ["a lone surrogate in a name", { "\udc00": 1 }],
    ["bigint", 1n],
    ["undefined in an array", [undefined]],
    ["a hole in an array", Array.from({ length: 1 })],
    ["a function", { f: () => 1 }],
    ["a date", new Date()],
    ["a map", new Map()],
    ["a buffer", Buffer.from("x")],
    ["too deep a nesting", deep],
  ])("refuses %s", (_, value) => {
    expect(() => canonicalJson(value)).toThrow(expect.objectContaining({ code: "INVALID_INPUT" }));
  });
});

describe("isCanonicalJson", () => {
  test.each([
    '{"b":1,"a":2}',
    '{"a": 1}',
    '{"a":1,"a":1}',
    "1.0",
    "1E3",
    "-0",
    '"\\u0041"',
    '"\\ud800"',
    '"\\/"',
    "",
    "{",
    '"\ud800"',
    "1 ",
    "\ufeff1",
  ])("no: %j", (text) => {
    expect(isCanonicalJson(text)).toBe(false);
  });

  test("never throws", () => {
    fc.assert(
      fc.property(fc.array(fc.integer({ min: 0, max: 0xffff })), (units) => {
        isCanonicalJson(String.fromCharCode(...units));
      }),
    );
  });
});
