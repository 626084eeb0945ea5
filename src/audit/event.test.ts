import { globSync, readFileSync } from "node:fs";
import { resolve } from "node:path";
import { describe, expect, test } from "vitest";
import { eventText } from "./chain.ts";
import { type EventKind, eventKinds, newEvent } from "./event.ts";

const root = resolve(import.meta.dirname, "../..");

describe("event kinds", () => {
  test.each(Object.keys(eventKinds) as EventKind[])("%s has a sentence and an example the log takes", (kind) => {
    const { meaning, details } = eventKinds[kind];
    expect(kind).toMatch(/^[a-z]+\.[a-z]+(-[a-z]+)*$/);
    expect(meaning).toMatch(/^[A-Z].*\.$/);
    const example = newEvent({ tenant: null, kind, actor: "platform", outcome: "success", subject: "example", details });
    expect(JSON.parse(eventText(example))).toEqual(example);
  });

  test("no example has a member that would hold a secret", () => {
    for (const { details } of Object.values(eventKinds)) {
      for (const name of Object.keys(details)) expect(name).not.toMatch(/secret|password|private|token$|env$/i);
    }
  });

  test("every kind that the code names is registered", () => {
    const unknown = namedKinds().filter(({ kind }) => !(kind in eventKinds));
    expect(unknown).toEqual([]);
  });
});

test("every registered kind is emitted somewhere", () => {
  const sources = globSync("src/**/*.ts", { cwd: root, exclude: ["**/*.test.ts", "src/audit/event.ts"] });
  const text = sources.map((file) => readFileSync(resolve(root, file), "utf8")).join("\n");
  expect(Object.keys(eventKinds).filter((kind) => !text.includes(`"${kind}"`))).toEqual([]);
});

/** Literals in `kind: …` members of the product's code, such as `kind: ok ? "cell.ready" : "cell.failed"`. */
function namedKinds(): { file: string; kind: string }[] {
  return globSync("src/**/*.ts", { cwd: root, exclude: ["**/*.test.ts"] }).flatMap((file) => {
    const members = readFileSync(resolve(root, file), "utf8").matchAll(/\bkind: [^,}\n]+/g);
    const literals = [...members].flatMap(([member]) => [...member.matchAll(/"([a-z]+\.[a-z-]+)"/g)]);
    return literals.map(([, kind]) => ({ file, kind: kind ?? "" }));
  });
}
