import fc from "fast-check";
import { sql } from "kysely";
import { setTimeout as delay } from "node:timers/promises";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { FakeNode } from "../../test/support/fake-node.ts";
import { failureOf, TestControl } from "../../test/support/control.ts";
import { startPostgres, type TestPostgres } from "../../test/support/postgres.ts";
import type { ForgeClient } from "../api/client.ts";
import { type Route, routes } from "../api/routes.ts";

let postgres: TestPostgres;
let plane: TestControl;
let client: ForgeClient;
let node: FakeNode;
let image: string;

beforeAll(async () => {
  postgres = await startPostgres();
  plane = await TestControl.start(await postgres.createDatabase());
  client = await plane.client();
  node = await FakeNode.join(plane);
  image = await plane.admitImage();
}, 120_000);

afterAll(async () => {
  node?.close();
  await plane?.stop();
  await postgres?.stop();
}, 60_000);

const count = async (table: "services" | "tokens" | "trusted_keys" | "log_entries"): Promise<number> =>
  (await plane.control.db.selectFrom(table).selectAll().execute()).length;

describe("the log refuses", () => {
  test("and so does everything that would have to be in it", async () => {
    const before = [await count("services"), await count("tokens"), await count("trusted_keys"), await count("log_entries")];
    await sql`create function no() returns trigger language plpgsql as $$ begin raise exception 'injected'; end $$`.execute(
      plane.control.db,
    );
    await sql`create trigger no before insert on log_entries execute function no()`.execute(plane.control.db);
    try {
      expect(await failureOf(client.call("applyService", { body: plane.apply("web", image) }))).toBe("AUDIT_UNAVAILABLE");
      expect(await failureOf(client.call("createToken", { body: { name: "ci", role: "developer" } }))).toBe("AUDIT_UNAVAILABLE");
      expect(await failureOf((await plane.client("nonsense")).call("getStatus", {}))).toBe("AUDIT_UNAVAILABLE");
    } finally {
      await sql`drop trigger no on log_entries`.execute(plane.control.db);
    }
    expect([await count("services"), await count("tokens"), await count("trusted_keys"), await count("log_entries")]).toEqual(before);
    expect((await client.call("verifyAudit", {})).ok).toBe(true);
  });

  test("an entry that was altered is named", async () => {
    const { event } = await plane.control.db.selectFrom("log_entries").select("event").where("sequence", "=", 3).executeTakeFirstOrThrow();
    await plane.control.db
      .updateTable("log_entries")
      .set({ event: event.replace("success", "failure") })
      .where("sequence", "=", 3)
      .execute();
    expect(await client.call("verifyAudit", {})).toMatchObject({ ok: false, firstBad: { sequence: 3, problem: "altered event" } });
    await plane.control.db.updateTable("log_entries").set({ event }).where("sequence", "=", 3).execute();
    expect(await client.call("verifyAudit", {})).toMatchObject({ ok: true });
  });
});

describe("requests that make no sense", () => {
  test("never meet a defect", async () => {
    const token = await plane.ownerToken();
    const paths = Object.values(routes as Record<string, Route>).filter(
      (route) => route.stream === undefined && route.path !== "/v1/images/pull",
    );
    const text = fc.oneof(
      fc.string({ maxLength: 30, unit: "binary" }),
      fc.constantFrom("..", "%", "%00", "a".repeat(600), "web", "\u0000", "\ud800"),
    );
    const value = fc.oneof(fc.json({ maxDepth: 3 }), fc.constantFrom("{", "null", "[]", '{"__proto__":1}', '{"name":"\\u0000"}'), bodies());
    await fc.assert(
      fc.asyncProperty(fc.constantFrom(...paths), text, text, value, async (route, name, search, body) => {
        const path = route.path.replace(/:[a-z]+/, () => encodeURIComponent(name.toWellFormed()) || "x");
        const query = search === "" ? "" : `?${encodeURIComponent(search.toWellFormed())}=1`;
        const { status, body: answer } = await plane.fetch(route.method, path + query, {
          token,
          ...(route.method === "GET" ? {} : { body }),
        });
        expect({ status, answer, path, body }).not.toMatchObject({ status: 500 });
      }),
      { numRuns: 250, interruptAfterTimeLimit: 15_000 },
    );
  }, 120_000);

  /** Nearly right: the reader must get past the first check. */
  function bodies(): fc.Arbitrary<string> {
    const name = fc.constantFrom("web", "a\u0000b", "", "Ä");
    const memory = fc.constantFrom("96MiB", "0MiB", "9999999GiB", 5);
    const env = fc.dictionary(fc.constantFrom("A", "B", "1"), fc.string({ unit: "binary", maxLength: 5 }));
    const reference = fc.constantFrom("x", "a\u0000b", "\ud800");
    return fc
      .record({
        name,
        jurisdiction: fc.constantFrom("de", "x"),
        imageDigest: fc.constant(image ?? `sha256:${"0".repeat(64)}`),
        imageReference: reference,
        spec: fc.record({ memory, env }),
      })
      .map((body) => JSON.stringify(body));
  }
});

test("the database dies and comes back: said so meanwhile, and nobody has to help", async () => {
  await node.desired(0);
  const follow = client.lines("listEvents", { query: { follow: "true", after: 100_000 } });
  void follow.next().catch(() => undefined);
  await postgres.crash();
  try {
    expect(await failureOf(client.call("listServices", {}))).toBe("DATABASE_UNAVAILABLE");
    expect(await failureOf(client.call("applyService", { body: plane.apply("back", image) }))).toBe("DATABASE_UNAVAILABLE");
  } finally {
    await postgres.start();
  }
  let code = "";
  for (let attempt = 0; attempt < 100 && code !== "no failure"; attempt++) {
    code = await failureOf(client.call("applyService", { body: plane.apply("back", image) }));
    if (code !== "no failure") await delay(100);
  }
  expect(code).toBe("no failure");
  await node.desiredWhen(({ cells }) => cells.some((cell) => cell.service === "back"), 25_000);
  expect((await client.call("verifyAudit", {})).ok).toBe(true);
});
