import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { startPostgres, type TestPostgres } from "../../test/support/postgres.ts";
import { TestControl } from "../../test/support/control.ts";

let postgres: TestPostgres;
let plane: TestControl;

beforeAll(async () => {
  postgres = await startPostgres();
  plane = await TestControl.start(await postgres.createDatabase());
}, 60_000);

afterAll(async () => {
  await plane?.stop();
  await postgres?.stop();
}, 60_000);

describe("a first start", () => {
  test("leaves tokens that work, and says where one is", async () => {
    const owner = await (await plane.client()).call("getStatus", {});
    expect(owner).toMatchObject({ region: "test", tenant: "default", role: "owner", tokenName: "bootstrap" });
    expect(owner.installationPrefix).toMatch(/^fd[0-9a-f]{2}:[0-9a-f:]+\/48$/);
    const operator = await (await plane.client(await plane.operatorToken())).call("getStatus", {});
    expect(operator).toMatchObject({ tenant: null, role: "operator" });
  });
});
