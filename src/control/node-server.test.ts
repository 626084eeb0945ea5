import { Agent, request } from "node:https";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { WebSocket } from "ws";
import { setTimeout as delay } from "node:timers/promises";
import { cellReport, FakeNode, nodeFacts } from "../../test/support/fake-node.ts";
import { failureOf, TestControl } from "../../test/support/control.ts";
import { startPostgres, type TestPostgres } from "../../test/support/postgres.ts";
import { decodeFrame, encodeFrame } from "../api/session.ts";
import { nodeRoutes, type SessionRequest } from "../api/node.ts";
import { createAuthority, createCsr, issueNodeCertificate } from "../mesh/index.ts";

let postgres: TestPostgres;
let plane: TestControl;
let node: FakeNode;
let image: string;
let cellId: string;

beforeAll(async () => {
  postgres = await startPostgres();
  plane = await TestControl.start(await postgres.createDatabase());
  node = await FakeNode.join(plane);
  image = await plane.admitImage();
  await (await plane.client()).call("applyService", { body: plane.apply("web", image) });
  cellId = (await node.desiredWhen(({ cells }) => cells.length === 1)).cells[0]?.id ?? "";
  await node.link.report([cellReport(cellId, "running")], true);
}, 120_000);

afterAll(async () => {
  node?.close();
  await plane?.stop();
  await postgres?.stop();
}, 60_000);

describe("joining", () => {
  test("a token works once, for one machine", async () => {
    const { csrPem } = await createCsr();
    const body = { joinToken: await plane.joinToken(), csrPem, spoolPublicKeyPem: "x", facts: nodeFacts({ name: "node-2" }) };
    expect((await plane.fetch("POST", nodeRoutes.join.path, { body })).status).toBe(401);
    expect((await plane.fetch("POST", nodeRoutes.join.path, { body: { ...body, joinToken: "nonsense" } })).status).toBe(401);
  });

  test("nobody gets past the handshake without a certificate of this region", async () => {
    const { csrPem, privateKeyPem } = await createCsr();
    const { certificatePem } = await issueNodeCertificate(await createAuthority({ trustDomain: "test.forge" }), {
      csrPem,
      nodeId: node.id,
    });
    const attempt = (tls: object): Promise<string> =>
      new Promise((resolve) => {
        const agent = new Agent({ ca: plane.caPem, ...tls });
        const outgoing = request(
          { host: "127.0.0.1", port: plane.running.nodePort, path: "/node/v1/desired?after=0&waitMs=0", agent },
          ({ statusCode }) => resolve(`status ${statusCode}`),
        );
        outgoing.on("error", () => resolve("refused")).end();
      });
    expect(await attempt({})).toBe("refused");
    expect(await attempt({ cert: certificatePem, key: privateKeyPem })).toBe("refused");
  });

  test("a certificate for a node that never joined is refused", async () => {
    const { csrPem, privateKeyPem } = await createCsr();
    const { certificatePem } = await issueNodeCertificate(plane.control.authority, { csrPem, nodeId: "node_000000000000000000000000" });
    const agent = new Agent({ ca: plane.caPem, cert: certificatePem, key: privateKeyPem });
    const status = await new Promise((resolve, reject) => {
      request({ host: "127.0.0.1", port: plane.running.nodePort, path: "/node/v1/desired?after=0&waitMs=0", agent }, ({ statusCode }) =>
        resolve(statusCode),
      )
        .on("error", reject)
        .end();
    });
    expect(status).toBe(401);
    agent.destroy();
  });
});

describe("the spool", () => {
  test("is appended exactly once, however often it is sent, and verifies with the rest", async () => {
    const tenant = (await plane.control.db.selectFrom("tenants").select("id").executeTakeFirstOrThrow()).id;
    const fact = { tenant, actor: "node", outcome: "success" as const, subject: `cell/${cellId}`, details: { service: "web" } };
    const entries = [
      node.entry({ ...fact, kind: "cell.started" }),
      node.entry({ ...fact, kind: "cell.ready" }),
      node.entry({ ...fact, kind: "cell.exited" }),
    ];
    expect(await node.link.ship(entries.slice(0, 2))).toBe(2);
    expect(await node.link.ship(entries.slice(0, 2))).toBe(2);
    expect(await node.link.ship(entries)).toBe(3);
    const client = await plane.client();
    const seen: string[] = [];
    for await (const event of client.lines("listEvents", { query: { service: "web", limit: 1000 } }))
      if (event.actor === "node/node-1") seen.push(event.kind);
    expect(seen).toEqual(["cell.started", "cell.ready", "cell.exited"]);
    expect(await client.call("verifyAudit", {})).toMatchObject({ ok: true });
    expect((await node.link.hello(nodeFacts())).spoolSequence).toBe(3);
  });

  test("an altered entry is refused and changes nothing", async () => {
    const entry = node.entry({
      tenant: null,
      kind: "node.started",
      actor: "node",
      outcome: "success",
      subject: "node/node-1",
      details: { cells: 1 },
    });
    await expect(node.link.ship([{ ...entry, event: entry.event.replace('"cells":1', '"cells":2') }])).rejects.toMatchObject({
      code: "AUDIT_BROKEN",
    });
    expect(await node.link.ship([entry])).toBe(4);
  });

  test("a node cannot speak for a tenant that never had a cell there", async () => {
    const { tenantId, token } = await plane.addTenant("stranger");
    await node.link.ship([
      node.entry({ tenant: tenantId, kind: "cell.ready", actor: "node", outcome: "success", subject: "cell/x", details: {} }),
    ]);
    const kinds: string[] = [];
    for await (const event of (await plane.client(token)).lines("listEvents", { query: {} })) kinds.push(event.kind);
    expect(kinds).not.toContain("cell.ready");
  });
});

test("blobs only of images the node is to run", async () => {
  const { blobs } = await plane.control.db.selectFrom("images").select("blobs").executeTakeFirstOrThrow();
  for (const digest of blobs) {
    const chunks: Buffer[] = [];
    for await (const chunk of await node.link.blob(digest, AbortSignal.timeout(10_000))) chunks.push(chunk as Buffer);
    expect(Buffer.concat(chunks).length).toBeGreaterThan(10);
  }
  await expect(node.link.blob(`sha256:${"0".repeat(64)}`, AbortSignal.timeout(10_000))).rejects.toMatchObject({ code: "NOT_FOUND" });
});

test("the answer waits for a change, and comes at once when there is one", async () => {
  await node.desired(0);
  const begun = performance.now();
  await node.desired(300);
  expect(performance.now() - begun).toBeGreaterThanOrEqual(290);
  const waiting = node.link.desired(node.generation, 20_000, AbortSignal.timeout(30_000));
  await (await plane.client()).call("applyService", { body: plane.apply("second", image) });
  expect((await waiting).cells.map((cell) => cell.service).toSorted()).toEqual(["second", "web"]);
  await (await plane.client()).call("removeService", { params: { name: "second" } });
});

describe("sessions", () => {
  /** Does as an agent would with the next session it is told of. */
  async function answer(kind: SessionRequest["kind"], work: (socket: WebSocket, request: SessionRequest) => void): Promise<SessionRequest> {
    const state = await node.desiredWhen(({ sessions }) => sessions.some((session) => session.kind === kind));
    const request = state.sessions.find((session) => session.kind === kind) as SessionRequest;
    const socket = node.link.session(request.id);
    socket.once("open", () => work(socket, request));
    return request;
  }

  async function openExec(argv: string[]): Promise<WebSocket> {
    const path = `/v1/services/web/exec?tty=false&argv=${encodeURIComponent(JSON.stringify(argv))}`;
    const headers = { authorization: `Bearer ${await plane.ownerToken()}` };
    return new WebSocket(`wss://127.0.0.1:${plane.running.apiPort}${path}`, { ca: plane.caPem, headers, perMessageDeflate: false });
  }

  test("exec passes frames both ways and is recorded without its arguments", async () => {
    const client = await openExec(["echo", "hush"]);
    const received: Buffer[] = [];
    client.on("message", (data) => received.push(data as Buffer));
    const ended = new Promise<void>((resolve) => client.once("close", () => resolve()));
    const told = answer("exec", (socket) => {
      socket.on("message", (data) => {
        socket.send(data as Buffer); // an echo, then the end
        socket.send(encodeFrame("exit", { status: 0 }));
        socket.close(1000);
      });
    });
    await new Promise<void>((resolve, reject) => client.once("open", () => resolve()).once("error", reject));
    client.send(encodeFrame("stdin", Buffer.from("hello")));
    await ended;
    expect(received.map((data) => decodeFrame(data)?.type)).toEqual(["stdin", "exit"]);
    expect(await told).toMatchObject({ kind: "exec", cell: cellId, argv: ["echo", "hush"] });
    const rows = await plane.control.db.selectFrom("log_entries").select("event").execute();
    const recorded = rows.map(({ event }) => event).filter((event) => event.includes("session.exec"));
    expect(recorded).toHaveLength(1);
    expect(recorded[0]).not.toContain("hush");
  });

  test("exec without a token, without a body to run, or for no such service is an HTTP error", async () => {
    const status = (path: string, headers: Record<string, string>): Promise<number | undefined> =>
      new Promise((resolve) => {
        const socket = new WebSocket(`wss://127.0.0.1:${plane.running.apiPort}${path}`, { ca: plane.caPem, headers });
        socket.on("unexpected-response", (_, response) => resolve(response.statusCode));
        socket.on("error", () => undefined);
      });
    const owner = { authorization: `Bearer ${await plane.ownerToken()}` };
    expect(await status('/v1/services/web/exec?argv=["sh"]', {})).toBe(401);
    expect(await status('/v1/services/web/exec?argv=["sh"]', { authorization: `Bearer ${await plane.tokenFor("auditor")}` })).toBe(403);
    expect(await status("/v1/services/web/exec?argv=sh", owner)).toBe(400);
    expect(await status('/v1/services/none/exec?argv=["sh"]', owner)).toBe(404);
    expect(await status("/v1/elsewhere", owner)).toBe(404);
  });

  test("logs stream line by line; a session works once and for its node only", async () => {
    const lines = (await plane.client()).lines("getLogs", { params: { name: "web" }, query: {} });
    const told = answer("logs", (socket) => {
      for (let index = 0; index < 3000; index++)
        socket.send(JSON.stringify({ cell: cellId, time: new Date().toISOString(), stream: "stdout", message: `line ${index}` }));
      socket.close(1000);
    });
    const messages: string[] = [];
    for await (const line of lines) messages.push(line.message);
    expect(messages).toHaveLength(3000);
    expect(messages.at(-1)).toBe("line 2999");
    const again = node.link.session((await told).id);
    const refused = await new Promise((resolve) =>
      again.once("unexpected-response", (_, response) => resolve(response.statusCode)).once("error", () => undefined),
    );
    expect(refused).toBe(404);
  });

  test("logs of several nodes lose nothing of the one that was there first, nor that it ended", async () => {
    const other = await FakeNode.join(plane, { name: "node-3", memoryMib: 4096 }, await plane.newJoinToken());
    try {
      const client = await plane.client();
      await client.call("applyService", { body: plane.apply("wide", image, { replicas: 2 }) });
      const own = (await node.desiredWhen(({ cells }) => cells.some((cell) => cell.service === "wide"))).cells.at(-1)?.id ?? "";
      const others = (await other.desiredWhen(({ cells }) => cells.length === 1)).cells[0]?.id ?? "";
      const lines = client.lines("getLogs", { params: { name: "wide" }, query: {} });
      const speak = async (from: FakeNode, cell: string, message: string): Promise<void> => {
        const { sessions } = await from.desiredWhen((state) => state.sessions.length > 0);
        const socket = from.link.session(sessions[0]?.id ?? "");
        await new Promise((resolve) => socket.once("open", resolve));
        for (let index = 0; index < 3; index++)
          socket.send(JSON.stringify({ cell, time: new Date().toISOString(), stream: "stdout", message: `${message} ${index}` }));
        socket.close(1000);
      };
      const first = lines.next();
      await speak(node, own, "early");
      await delay(300);
      await speak(other, others, "late");
      const messages = [(await first).value?.message];
      for await (const line of lines) messages.push(line.message);
      for (const message of ["early 0", "early 1", "early 2", "late 0", "late 1", "late 2"]) expect(messages).toContain(message);
      expect(messages).toHaveLength(6);
      await client.call("removeService", { params: { name: "wide" } });
      for (const each of [node, other]) await each.link.report([cellReport(cellId, "running")], true);
    } finally {
      other.close();
    }
  });

  test("a handshake that is not sound ends the session that was opened for it", async () => {
    const outgoing = request({
      host: "127.0.0.1",
      port: plane.running.apiPort,
      path: `/v1/services/web/exec?argv=${encodeURIComponent('["sh"]')}`,
      ca: plane.caPem,
      headers: {
        authorization: `Bearer ${await plane.ownerToken()}`,
        connection: "Upgrade",
        upgrade: "websocket",
        "sec-websocket-version": "13",
      },
    });
    const status = new Promise((resolve, reject) => outgoing.on("response", ({ statusCode }) => resolve(statusCode)).on("error", reject));
    outgoing.end();
    const { promise: ended, resolve } = Promise.withResolvers<number>();
    void answer("exec", (socket) => socket.once("close", resolve));
    expect(await status).toBe(400);
    expect(await ended).toBe(1006);
  });

  test("a line of another cell ends the stream with an error", async () => {
    const lines = (await plane.client()).lines("getLogs", { params: { name: "web" }, query: {} });
    void answer("logs", (socket) =>
      socket.send(
        JSON.stringify({ cell: "cell_000000000000000000000000", time: new Date().toISOString(), stream: "stdout", message: "other" }),
      ),
    );
    expect(await failureOf(lines.next())).toBe("NODE_UNAVAILABLE");
  });

  test("a node that does not dial is unavailable, within a bound", async () => {
    const begun = performance.now();
    expect(await failureOf((await plane.client()).lines("getLogs", { params: { name: "web" }, query: {} }).next())).toBe(
      "NODE_UNAVAILABLE",
    );
    expect(performance.now() - begun).toBeLessThan(20_000);
    await delay(0);
  });
});
