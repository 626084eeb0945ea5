import { execFileSync } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, readFile, rm, stat } from "node:fs/promises";
import type { IncomingMessage, ServerResponse } from "node:http";
import { createServer, type Server } from "node:https";
import type { AddressInfo } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { PassThrough } from "node:stream";
import { setTimeout as delay } from "node:timers/promises";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { type WebSocket, WebSocketServer } from "ws";
import { decodeFrame, encodeFrame } from "../api/session.ts";
import { ForgeError } from "../base/errors.ts";
import { Connection, ForgeHome } from "./context.ts";
import { attach, type ExecStreams } from "./exec-session.ts";
import { openWebSocket } from "./transport.ts";

let folder = "";
let certificate = "";
let otherCertificate = "";
let server: Server;
let apiUrl = "";
let answer: (request: IncomingMessage, response: ServerResponse) => void = () => undefined;
let serveSession: (socket: WebSocket, request: IncomingMessage) => void = () => undefined;
let sessions: WebSocketServer;

beforeAll(async () => {
  folder = await mkdtemp(join(tmpdir(), "forge-connection-"));
  const key = makeCertificate("server");
  otherCertificate = makeCertificate("other").certificate;
  certificate = key.certificate;
  server = createServer({ key: await readFile(key.keyPath), cert: certificate }, (request, response) => answer(request, response));
  sessions = new WebSocketServer({ server });
  sessions.on("connection", (socket, request) => serveSession(socket, request));
  server.listen(0, "127.0.0.1");
  await once(server, "listening");
  apiUrl = `https://127.0.0.1:${(server.address() as AddressInfo).port}`;
});

afterAll(async () => {
  for (const socket of sessions.clients) socket.terminate();
  server.closeAllConnections();
  server.close();
  await rm(folder, { recursive: true, force: true });
});

function makeCertificate(name: string): { keyPath: string; certificate: string } {
  const [keyPath, path] = [join(folder, `${name}.key`), join(folder, `${name}.crt`)];
  const subject = ["-subj", `/CN=${name}`, "-addext", "subjectAltName=IP:127.0.0.1"];
  execFileSync(
    "openssl",
    [
      "req",
      "-x509",
      "-newkey",
      "ec",
      "-pkeyopt",
      "ec_paramgen_curve:P-256",
      "-nodes",
      "-keyout",
      keyPath,
      "-out",
      path,
      "-days",
      "2",
      ...subject,
    ],
    { stdio: "ignore" },
  );
  return { keyPath, certificate: execFileSync("cat", [path]).toString() };
}

function connection(caPem = certificate, signal = new AbortController().signal): Connection {
  return new Connection({ apiUrl, caPem, token: "secret" }, signal);
}

function json(status: number, body: unknown): typeof answer {
  return (_, response) => void response.writeHead(status, { "content-type": "application/json" }).end(JSON.stringify(body));
}

async function failureOf(promise: Promise<unknown>): Promise<ForgeError> {
  const error: unknown = await promise.then(
    () => undefined,
    (thrown: unknown) => thrown,
  );
  expect(error).toBeInstanceOf(ForgeError);
  return error as ForgeError;
}

describe("Connection", () => {
  test("sends the token and validates the answer", async () => {
    let authorization: string | undefined;
    answer = (request, response) => {
      authorization = request.headers.authorization;
      json(200, { ok: true, version: "1.2.3" })(request, response);
    };
    expect(await connection().call("getHealth", {})).toEqual({ ok: true, version: "1.2.3" });
    expect(authorization).toBe("Bearer secret");
  });

  test("an API's failure keeps its code, sentence and details", async () => {
    answer = json(409, { code: "CONFLICT", message: "there is one", remedy: "look", details: { name: "ci" } });
    expect((await failureOf(connection().call("getHealth", {}))).toBody()).toMatchObject({
      code: "CONFLICT",
      message: "there is one",
      details: { name: "ci" },
    });
  });

  test("an answer of another shape, or none at all, is UNAVAILABLE", async () => {
    answer = json(200, { surprise: true });
    expect((await failureOf(connection().call("getHealth", {}))).message).toContain("same version");
    answer = (_, response) => response.writeHead(200).end("<html>");
    expect((await failureOf(connection().call("getHealth", {}))).code).toBe("UNAVAILABLE");
    answer = (request) => request.socket.destroy();
    expect((await failureOf(connection().call("getHealth", {}))).message).toContain("closed the connection");
  });

  test("trusts its own CA and no other", async () => {
    const error = await failureOf(connection(otherCertificate).call("getHealth", {}));
    expect(error.code).toBe("UNAVAILABLE");
    expect(error.message).toContain("is not the one this context trusts");
  });

  test("nobody there is one clear sentence", async () => {
    const closed = new Connection({ apiUrl: "https://127.0.0.1:1", caPem: certificate, token: "x" }, new AbortController().signal);
    expect((await failureOf(closed.call("getHealth", {}))).message).toBe(
      "the control plane at https://127.0.0.1:1 does not answer: nothing listens there",
    );
  });

  test("a call has its bound, and Ctrl-C ends it", async () => {
    answer = () => undefined;
    expect((await failureOf(connection().call("getHealth", {}, 200))).code).toBe("TIMEOUT");
    const interrupt = new AbortController();
    const waiting = connection(certificate, interrupt.signal).call("getHealth", {});
    interrupt.abort();
    await expect(waiting).rejects.toMatchObject({ name: "AbortError" });
  });

  test("an upload waits for a slow reader", async () => {
    const chunks = 400;
    let produced = 0;
    let producedWhenRead = 0;
    answer = (request, response) => {
      void (async () => {
        await delay(300);
        producedWhenRead = produced;
        let received = 0;
        for await (const chunk of request) received += (chunk as Buffer).length;
        json(200, { ok: true, received })(request, response);
      })();
    };
    async function* bytes(): AsyncGenerator<Uint8Array> {
      for (; produced < chunks; produced += 1) yield new Uint8Array(64 * 1024);
    }
    await connection().upload("putBlob", { params: { digest: `sha256:${"0".repeat(64)}` } }, bytes());
    expect(produced).toBe(chunks);
    expect(producedWhenRead).toBeLessThan(chunks);
  });

  test("an upload refused midway says why", async () => {
    answer = (request, response) => {
      request.once("data", () => json(422, { code: "IMAGE_CORRUPT", message: "not these bytes", remedy: "" })(request, response));
      request.resume();
    };
    async function* bytes(): AsyncGenerator<Uint8Array> {
      for (let index = 0; index < 64; index += 1) yield new Uint8Array(64 * 1024);
    }
    expect((await failureOf(connection().upload("putBlob", { params: { digest: `sha256:${"0".repeat(64)}` } }, bytes()))).code).toBe(
      "IMAGE_CORRUPT",
    );
  });

  test("lines of a stream arrive as they are written, and its failure at the end", async () => {
    answer = (_, response) => {
      response.writeHead(200);
      const line = { cell: `cell_${"0".repeat(24)}`, time: "2026-01-01T00:00:00.000Z", stream: "stdout", message: "one" };
      response.write(`${JSON.stringify(line)}\n${JSON.stringify({ ...line, message: "two" })}\n`);
      response.end(JSON.stringify({ error: { code: "NODE_UNAVAILABLE", message: "gone", remedy: "" } }));
    };
    const messages: string[] = [];
    const read = async (): Promise<void> => {
      for await (const { message } of connection().lines("getLogs", { params: { name: "web" } })) messages.push(message);
    };
    expect((await failureOf(read())).code).toBe("NODE_UNAVAILABLE");
    expect(messages).toEqual(["one", "two"]);
  });
});

describe("attach", () => {
  async function session(serve: typeof serveSession, options: { tty?: boolean; interrupted?: AbortSignal } = {}) {
    serveSession = serve;
    const socket = openWebSocket({ apiUrl, caPem: certificate }, "/v1/services/web/exec", {});
    await once(socket, "open");
    const [stdin, stdout, stderr] = [new PassThrough(), new PassThrough(), new PassThrough()];
    const streams: ExecStreams = { stdin, stdout, stderr };
    const status = attach(socket, streams, { tty: options.tty ?? false, interrupted: options.interrupted ?? new AbortController().signal });
    status.catch(() => undefined);
    return { status, stdin, stdout, stderr };
  }

  test("carries stdin to its end, both outputs, and the status", async () => {
    const { status, stdin, stdout, stderr } = await session((socket) => {
      socket.on("message", (data: Buffer) => {
        const frame = decodeFrame(data);
        if (frame?.type === "stdin") socket.send(encodeFrame("stdout", frame.payload));
        if (frame?.type === "stdinEnd") {
          socket.send(encodeFrame("stderr", Buffer.from("done")));
          socket.send(encodeFrame("exit", { status: 7 }));
        }
      });
    });
    stdin.write("raw \u001b[31mbytes");
    stdin.end();
    expect(await status).toBe(7);
    expect(String(stdout.read())).toBe("raw \u001b[31mbytes");
    expect(String(stderr.read())).toBe("done");
  });

  test("resize and Ctrl-C travel as frames", async () => {
    const interrupt = new AbortController();
    const frames: string[] = [];
    const { status, stdout } = await session(
      (socket) =>
        socket.on("message", (data: Buffer) => {
          const frame = decodeFrame(data);
          frames.push(`${frame?.type} ${Buffer.from(frame?.payload ?? []).toString()}`);
          if (frame?.type === "signal") socket.send(encodeFrame("exit", { status: 130 }));
        }),
      { tty: true, interrupted: interrupt.signal },
    );
    Object.assign(stdout, { columns: 132, rows: 43 });
    stdout.emit("resize");
    interrupt.abort();
    expect(await status).toBe(130);
    expect(frames).toEqual(['resize {"columns":132,"rows":43}', 'signal {"number":2}']);
  });

  test("an error frame is its ForgeError", async () => {
    const { status } = await session((socket) =>
      socket.send(encodeFrame("error", { code: "NOT_FOUND", message: "no such program", remedy: "" })),
    );
    expect((await failureOf(status)).toBody()).toMatchObject({ code: "NOT_FOUND", message: "no such program" });
  });

  test.each([
    ["nonsense as an exit", (socket: WebSocket) => socket.send(encodeFrame("exit", Buffer.from("{")))],
    ["an end without an exit", (socket: WebSocket) => socket.close(1011)],
    ["a cut line", (socket: WebSocket) => socket.terminate()],
  ])("%s is UNAVAILABLE", async (_, serve) => {
    const { status } = await session(serve);
    expect((await failureOf(status)).code).toBe("UNAVAILABLE");
  });
});

describe("ForgeHome", () => {
  const context = { apiUrl: "https://127.0.0.1:7443", caPem: "pem", token: "forge_tok", dataDir: "/var/lib/forge" };

  test("keeps the context to its owner", async () => {
    const home = new ForgeHome({ FORGE_HOME: join(folder, "home") });
    expect(await home.read()).toBeUndefined();
    await home.write(context);
    expect(await home.read()).toEqual(context);
    expect((await stat(home.path("context.json"))).mode & 0o777).toBe(0o600);
    expect((await stat(home.folder)).mode & 0o777).toBe(0o700);
  });

  test("the environment comes first", async () => {
    const env = { FORGE_HOME: join(folder, "home2"), FORGE_TOKEN: "other", FORGE_API: "https://192.0.2.1:7443" };
    await new ForgeHome(env).write(context);
    expect(await new ForgeHome(env).effective()).toMatchObject({ apiUrl: "https://192.0.2.1:7443", token: "other", caPem: "pem" });
    expect((await failureOf(new ForgeHome({ ...env, FORGE_API: "http://192.0.2.1" }).effective())).code).toBe("USAGE");
  });

  test("without HOME it is root's", () => {
    expect(new ForgeHome({}).folder).toBe("/root/.config/forge");
    expect(new ForgeHome({ HOME: "/home/ada" }).folder).toBe("/home/ada/.config/forge");
  });

  test("nothing known, or a broken file, says what to do", async () => {
    const empty = new ForgeHome({ FORGE_HOME: join(folder, "none") });
    expect((await failureOf(empty.effective())).message).toContain("no runtime is known here");
    await empty.writeFile("context.json", "{");
    expect((await failureOf(empty.read())).message).toContain("is not a context");
  });
});
