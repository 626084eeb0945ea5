import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { FakeNode, nodeFacts } from "../../test/support/fake-node.ts";
import { failureOf, TestControl } from "../../test/support/control.ts";
import { startPostgres, type TestPostgres } from "../../test/support/postgres.ts";
import uncovered from "../../test/authz-uncovered.json" with { type: "json" };
import { type Role, roleSchema } from "../api/resources.ts";
import { type Route, type RouteName, routes } from "../api/routes.ts";

let postgres: TestPostgres;
let plane: TestControl;
let node: FakeNode;
let image: string;
const tokens = new Map<Role, string>();

beforeAll(async () => {
  postgres = await startPostgres();
  plane = await TestControl.start(await postgres.createDatabase());
  node = await FakeNode.join(plane);
  image = await plane.admitImage();
  await (await plane.client()).call("applyService", { body: plane.apply("web", image) });
  await node.desiredWhen(({ cells }) => cells.length === 1);
  for (const role of roleSchema.options) tokens.set(role, role === "owner" ? await plane.ownerToken() : await plane.tokenFor(role));
}, 120_000);

afterAll(async () => {
  node?.close();
  await plane?.stop();
  await postgres?.stop();
}, 60_000);

/** A request that would be valid, so that a refusal can only come from authorisation. */
const samples: Partial<Record<RouteName, { path?: string; body?: unknown; type?: string }>> = {
  getService: { path: "/v1/services/web" },
  applyService: { body: { name: "other", jurisdiction: "de", imageDigest: `sha256:${"1".repeat(64)}`, imageReference: "x", spec: {} } },
  stopService: { path: "/v1/services/web/stop" },
  startService: { path: "/v1/services/web/start" },
  removeService: { path: "/v1/services/web" },
  getLogs: { path: "/v1/services/web/logs" },
  exec: { path: '/v1/services/web/exec?argv=["sh"]' },
  putBlob: { path: `/v1/blobs/sha256:${"2".repeat(64)}`, body: "bytes", type: "application/octet-stream" },
  findBlobs: { body: { digests: [] } },
  addImage: { body: { digest: `sha256:${"1".repeat(64)}`, reference: "x", signatures: [] } },
  pullImage: { body: { reference: "localhost:1/x:1" } },
  addTrustedKey: { body: { name: "k", publicKeyPem: "x" } },
  removeTrustedKey: { path: "/v1/trust/some" },
  createToken: { body: { name: "evil", role: "owner" } },
  revokeToken: { path: "/v1/tokens/bootstrap" },
};

const table = Object.entries(routes) as [RouteName, Route][];
const guarded = table.filter(([, route]) => route.allow !== "public");

/** Everything a request could change, apart from the log and when a token was last used. */
async function snapshot(): Promise<string> {
  const { db } = plane.control;
  const rows = await Promise.all([
    db.selectFrom("services").selectAll().orderBy("id").execute(),
    db.selectFrom("cells").selectAll().orderBy("id").execute(),
    db.selectFrom("tokens").select(["id", "name", "role"]).orderBy("id").execute(),
    db.selectFrom("trusted_keys").selectAll().orderBy("name").execute(),
    db.selectFrom("images").selectAll().orderBy("digest").execute(),
  ]);
  return JSON.stringify(rows);
}

function send(name: RouteName, route: Route, token?: string): Promise<{ status: number; body: unknown }> {
  const sample = samples[name] ?? {};
  return plane.fetch(route.method, sample.path ?? route.path, { ...sample, ...(token === undefined ? {} : { token }) });
}

async function denials(kind: string): Promise<number> {
  const rows = await plane.control.db.selectFrom("log_entries").select("event").execute();
  return rows
    .map(({ event }) => JSON.parse(event) as { kind: string; outcome: string })
    .filter((event) => event.kind === kind && event.outcome === "denied").length;
}

test("every route is in this test, save those of the golden list, which is empty", () => {
  const untested = table
    .filter(([name, route]) => route.allow !== "public" && route.path.includes(":") && samples[name] === undefined)
    .map(([name]) => name);
  expect(untested).toEqual(uncovered);
  expect(uncovered).toEqual([]);
  expect(table.filter(([, route]) => route.allow === "public").map(([name]) => name)).toEqual(["getHealth"]);
});

describe.each(guarded)("%s", (name, route) => {
  test("without a token: 401", async () => {
    const { status, body } = await send(name, route);
    expect([401, 429]).toContain(status);
    expect((body as { code: string }).code).toMatch(/^(UNAUTHENTICATED|TOO_MANY_ATTEMPTS)$/);
  });

  const refused = roleSchema.options.filter((role) => !(route.allow as readonly Role[]).includes(role));
  test.runIf(refused.length > 0).each(refused)("as %s: 403, audited, and no change", async (role) => {
    const [before, told] = [await snapshot(), await denials("authz.denied")];
    const { status, body } = await send(name, route, tokens.get(role));
    expect({ status, code: (body as { code: string }).code }).toEqual({ status: 403, code: "FORBIDDEN" });
    expect(await snapshot()).toBe(before);
    expect(await denials("authz.denied")).toBe(told + 1);
  });
});

describe("tokens", () => {
  test("an expired, a revoked, an altered one is refused", async () => {
    const client = await plane.client();
    const { secret, token } = await client.call("createToken", { body: { name: "short", role: "developer", ttlSeconds: 60 } });
    expect(await failureOf((await plane.client(secret)).call("getStatus", {}))).toBe("no failure");
    await plane.control.db
      .updateTable("tokens")
      .set({ expires_at: new Date(Date.now() - 1000) })
      .where("id", "=", token.id)
      .execute();
    expect(await failureOf((await plane.client(secret)).call("getStatus", {}))).toMatch(/UNAUTHENTICATED|TOO_MANY/);
    await client.call("revokeToken", { params: { name: "short" } });
    const owner = await plane.ownerToken();
    const altered = owner.slice(0, -1) + (owner.endsWith("0") ? "1" : "0");
    expect(await failureOf((await plane.client(altered)).call("getStatus", {}))).toMatch(/UNAUTHENTICATED|TOO_MANY/);
    expect(JSON.stringify(await client.call("listTokens", {}))).not.toContain(secret);
  });

  test("an owner cannot make an operator", async () => {
    expect(await failureOf((await plane.client()).call("createToken", { body: { name: "op", role: "operator" } }))).toBe("FORBIDDEN");
  });

  test("many wrong ones are throttled and counted, and a right one is still heard", async () => {
    const statuses = new Set<number>();
    for (let attempt = 0; attempt < 40; attempt++) statuses.add((await plane.fetch("GET", "/v1/status", { token: "nonsense" })).status);
    expect(statuses).toContain(429);
    expect(await denials("auth.denied")).toBeLessThan(30);
    expect((await plane.fetch("GET", "/v1/status", { token: await plane.ownerToken() })).status).toBe(200);
  });
});

describe("two tenants", () => {
  let other: string;
  beforeAll(async () => {
    other = (await plane.addTenant("clinic")).token;
    await node.link.hello(nodeFacts()); // a node unheard of for a minute gets no cells
  });

  test("see nothing of each other", async () => {
    const client = await plane.client(other);
    expect((await client.call("listServices", {})).items).toEqual([]);
    expect((await client.call("listCells", {})).items).toEqual([]);
    expect((await client.call("listImages", {})).items).toEqual([]);
    expect((await client.call("listTrustedKeys", {})).items).toEqual([]);
    expect((await client.call("listTokens", {})).items.map(({ name }) => name)).toEqual(["owner"]);
    const events = [];
    for await (const event of client.lines("listEvents", { query: { limit: 1000 } })) events.push(event);
    const ours = (await client.call("getStatus", {})).tenant;
    expect(ours).toBe("clinic");
    expect(new Set(events.map((event) => event.tenant)).size).toBeLessThanOrEqual(1);
    expect(JSON.stringify(events)).not.toContain("service/web");
  });

  test("touch nothing of each other", async () => {
    const client = await plane.client(other);
    const before = await snapshot();
    const params = { name: "web" };
    for (const name of ["getService", "stopService", "startService", "removeService"] as const)
      expect(await failureOf(client.call(name, { params }))).toBe("NOT_FOUND");
    expect((await plane.fetch("GET", "/v1/services/web/logs", { token: other })).status).toBe(404);
    expect(await failureOf(client.call("revokeToken", { params: { name: "bootstrap" } }))).toBe("NOT_FOUND");
    expect(await failureOf(client.call("applyService", { body: plane.apply("mine", image) }))).toBe("IMAGE_NOT_FOUND");
    expect(await snapshot()).toBe(before);
  });

  test("the operator sees that both exist, and neither's bytes", async () => {
    const tenantImage = await plane.admitImage(other);
    await (
      await plane.client(other)
    ).call("applyService", { body: plane.apply("web", tenantImage, { env: { SECRET: "hush" }, command: ["hushed"] }) });
    const { items } = await (await plane.client(await plane.operatorToken())).call("listServices", {});
    expect(items.map(({ tenant, name }) => `${tenant}/${name}`).toSorted()).toEqual(["clinic/web", "default/web"]);
    expect(JSON.stringify(items)).not.toContain("hush");
  });
});

test("every table has a tenant, or is the platform's", async () => {
  const platform = ["installation", "join_tokens", "log_head", "migrations", "nodes", "tenants"];
  const { rows } = await import("kysely").then(({ sql }) =>
    sql<{ name: string }>`
      select table_name as name from information_schema.tables where table_schema = 'public'
      except select table_name from information_schema.columns where table_schema = 'public' and column_name = 'tenant_id'
      order by name`.execute(plane.control.db),
  );
  expect(rows.map(({ name }) => name)).toEqual(platform);
});
