import { afterAll, beforeAll, beforeEach, expect, test } from "vitest";
import { TestControl } from "../../test/support/control.ts";
import { startPostgres, type TestPostgres } from "../../test/support/postgres.ts";
import { ForgeError } from "../base/errors.ts";
import { Authenticator } from "./authenticate.ts";

let postgres: TestPostgres;
let plane: TestControl;
let authenticator: Authenticator;
let nowMs: number;

beforeAll(async () => {
  postgres = await startPostgres();
  plane = await TestControl.start(await postgres.createDatabase());
}, 120_000);

afterAll(async () => {
  await plane?.stop();
  await postgres?.stop();
}, 60_000);

beforeEach(() => {
  nowMs = 1000;
  const clock = { ...plane.control.clock, monotonicMs: () => nowMs };
  authenticator = new Authenticator({ ...plane.control, clock });
});

const refuse = (address: string): Promise<string> =>
  authenticator.refuse("unknown token", address, "getStatus").then(
    () => "recorded",
    (error: unknown) => (error instanceof ForgeError ? error.code : String(error)),
  );

/** What the log says since `work` began. */
async function recordedBy(work: () => Promise<void>): Promise<Record<string, unknown>[]> {
  const { sequence } = await plane.control.db.selectFrom("log_head").select("sequence").executeTakeFirstOrThrow();
  await work();
  const rows = await plane.control.db
    .selectFrom("log_entries")
    .select("event")
    .where("sequence", ">", sequence)
    .orderBy("sequence")
    .execute();
  return rows.map(({ event }) => (JSON.parse(event) as { details: Record<string, unknown> }).details);
}

test("addresses of one /64 are one source; those of IPv4 are not, mapped or plain", async () => {
  const records = await recordedBy(async () => {
    for (let n = 1; n <= 30; n++) expect(await refuse(`2001:db8:0:1::${n.toString(16)}`)).toBe("recorded");
  });
  expect(records).toHaveLength(5);
  expect(await refuse("2001:db8::1:ffff:0:0:1")).toBe("TOO_MANY_ATTEMPTS");
  expect(await refuse("2001:db8:0:2::1")).toBe("recorded");
  for (let n = 0; n < 30; n++) expect(await refuse(n % 2 === 0 ? "192.0.2.1" : "::ffff:192.0.2.1")).toBe("recorded");
  expect(await refuse("::ffff:192.0.2.1")).toBe("TOO_MANY_ATTEMPTS");
  expect(await refuse("::ffff:192.0.2.2")).toBe("recorded");
});

test("a flood from everywhere is summed, and limited once the table is full", async () => {
  const network = (n: number): string => `2001:db8:${(n >> 8).toString(16)}:${(n & 255).toString(16)}::1`;
  const flood = await recordedBy(async () => {
    for (let n = 0; n < 4096; n++) expect(await refuse(network(n))).toBe("recorded");
    for (let n = 4096; n < 4126; n++) expect(await refuse(network(n))).toBe("recorded");
    expect(await refuse(network(5000))).toBe("TOO_MANY_ATTEMPTS");
  });
  expect(flood).toHaveLength(200);
  nowMs += 60_000;
  const after = await recordedBy(async () => void (await refuse("192.0.2.1")));
  expect(after.map(({ reason }) => reason)).toEqual([`${4096 + 31 - 200} more refusals in an earlier minute`, "unknown token"]);
});
