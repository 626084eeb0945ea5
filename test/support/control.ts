import { mkdtemp, readFile, rm } from "node:fs/promises";
import type { IncomingMessage } from "node:http";
import { Agent, request } from "node:https";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { pino } from "pino";
import { ApiFailure, ForgeClient, type Transport } from "../../src/api/client.ts";
import type { ApplyService, Role } from "../../src/api/resources.ts";
import { newJoinToken, newToken } from "../../src/control/authenticate.ts";
import { createTenant } from "../../src/control/bootstrap.ts";
import { transact } from "../../src/control/db/database.ts";
import { type RunningControl, startControl } from "../../src/control/main.ts";
import { digestOf, generateSigningKey, signDigest } from "../../src/isocell/image/index.ts";

/** A whole control plane in this process, with real TLS and a real database, and short cuts for tests. */
export class TestControl {
  readonly folder: string;
  readonly running: RunningControl;
  readonly caPem: string;
  readonly #agent: Agent;

  private constructor(folder: string, running: RunningControl) {
    this.folder = folder;
    this.running = running;
    this.caPem = running.control.authority.certificatePem;
    this.#agent = new Agent({ ca: this.caPem, keepAlive: true });
  }

  /** With the folder of an earlier one, it is that one's next start. */
  static async start(databaseUrl: string, folder?: string): Promise<TestControl> {
    const own = folder ?? (await mkdtemp(join(tmpdir(), "forge-control-")));
    const options = { dataDir: own, apiAddress: "127.0.0.1", apiPort: 0, nodePort: 0, region: "test", jurisdiction: "de", databaseUrl };
    return new TestControl(
      own,
      await startControl(own, options, pino({ level: process.env["FORGE_LOG"] ?? "silent" }, pino.destination(2))),
    );
  }

  get control(): RunningControl["control"] {
    return this.running.control;
  }

  async stop(keepFolder = false): Promise<void> {
    this.#agent.destroy();
    await this.running.stop();
    if (!keepFolder) await rm(this.folder, { recursive: true, force: true });
  }

  async ownerToken(): Promise<string> {
    return (await readFile(join(this.folder, "bootstrap", "owner-token"), "utf8")).trim();
  }

  async operatorToken(): Promise<string> {
    return (await readFile(join(this.folder, "bootstrap", "operator-token"), "utf8")).trim();
  }

  async joinToken(): Promise<string> {
    return (await readFile(join(this.folder, "bootstrap", "join-token"), "utf8")).trim();
  }

  /** Admits one more node. */
  async newJoinToken(): Promise<string> {
    const { text, secretHash } = newJoinToken();
    const expires = new Date(Date.now() + 3_600_000);
    await this.control.db.insertInto("join_tokens").values({ secret_hash: secretHash, expires_at: expires }).execute();
    return text;
  }

  async client(token?: string): Promise<ForgeClient> {
    return new ForgeClient(this.transport, token ?? (await this.ownerToken()));
  }

  /** One HTTPS exchange as a client makes it. */
  readonly transport: Transport = async ({ method, path, headers, body, signal }) => {
    const response = await new Promise<IncomingMessage>((resolve, reject) => {
      const options = {
        method,
        headers,
        agent: this.#agent,
        port: this.running.apiPort,
        host: "127.0.0.1",
        path,
        ...(signal === undefined ? {} : { signal }),
      };
      const outgoing = request(options, resolve).on("error", reject);
      if (body === undefined || typeof body === "string" || body instanceof Uint8Array) outgoing.end(body);
      else void sendAll(outgoing, body).catch(reject);
    });
    return { status: response.statusCode ?? 0, body: response };
  };

  /** Status and parsed body of a raw request. */
  async fetch(
    method: string,
    path: string,
    options: { token?: string; body?: unknown; type?: string } = {},
  ): Promise<{ status: number; body: unknown }> {
    const headers: Record<string, string> = options.token === undefined ? {} : { authorization: `Bearer ${options.token}` };
    const body = options.body === undefined ? undefined : typeof options.body === "string" ? options.body : JSON.stringify(options.body);
    if (body !== undefined)
      Object.assign(headers, { "content-type": options.type ?? "application/json", "content-length": String(Buffer.byteLength(body)) });
    const response = await this.transport({ method, path, headers, ...(body === undefined ? {} : { body }) });
    let text = "";
    for await (const chunk of response.body) text += Buffer.from(chunk).toString();
    return { status: response.status, body: text.startsWith("{") && !text.includes("\n{") ? JSON.parse(text) : text };
  }

  /** Another tenant, with an owner's token. */
  async addTenant(name: string): Promise<{ tenantId: string; token: string }> {
    const { id, text, secretHash } = newToken();
    const tenantId = await transact(this.control.db, async (trx) => {
      const tenant = await createTenant(trx, this.control.signer, name);
      await trx.insertInto("tokens").values({ id, tenant_id: tenant, name: "owner", role: "owner", secret_hash: secretHash }).execute();
      return tenant;
    });
    return { tenantId, token: text };
  }

  /** A token of a role, made by the owner; the operator's is the platform's own. */
  async tokenFor(role: Role): Promise<string> {
    if (role === "operator") return this.operatorToken();
    const name = `${role}-${++tokens}`;
    return (await (await this.client()).call("createToken", { body: { name, role } })).secret;
  }

  /** A tiny image, signed by a key the tenant trusts, uploaded and admitted; returns its digest. */
  async admitImage(token?: string): Promise<string> {
    const client = await this.client(token);
    const key = generateSigningKey();
    await client.call("addTrustedKey", { body: { name: `key-${++tokens}`, publicKeyPem: key.publicKeyPem } });
    const digest = await uploadImage(client, `image ${tokens}`);
    await client.call("addImage", { body: { digest, reference: "test:1", signatures: [signDigest(digest, "test:1", key.privateKeyPem)] } });
    return digest;
  }

  /** The body of an apply with everything at its default. */
  apply(name: string, imageDigest: string, change: Partial<ApplyService["spec"]> = {}, more: Partial<ApplyService> = {}): ApplyService {
    return { name, jurisdiction: "de", imageDigest, imageReference: "test:1", spec: { memory: "96MiB", ...change }, ...more };
  }
}

let tokens = 0;

/** Uploads an image without layers; the label makes its digest its own. */
export async function uploadImage(client: ForgeClient, label: string): Promise<string> {
  const architecture = process.arch === "arm64" ? "arm64" : "amd64";
  const config = Buffer.from(
    JSON.stringify({ architecture, os: "linux", config: { Env: [`LABEL=${label}`] }, rootfs: { type: "layers", diff_ids: [] } }),
  );
  const descriptor = { mediaType: "application/vnd.oci.image.config.v1+json", digest: digestOf(config), size: config.length };
  const manifest = Buffer.from(
    JSON.stringify({ schemaVersion: 2, mediaType: "application/vnd.oci.image.manifest.v1+json", config: descriptor, layers: [] }),
  );
  for (const blob of [config, manifest]) await client.upload("putBlob", { params: { digest: digestOf(blob) } }, oneChunk(blob));
  return digestOf(manifest);
}

/** The code of the error a call fails with. */
export async function failureOf(call: Promise<unknown>): Promise<string> {
  try {
    await call;
  } catch (error) {
    if (error instanceof ApiFailure) return error.body.code;
    throw error;
  }
  return "no failure";
}

async function* oneChunk(bytes: Uint8Array): AsyncGenerator<Uint8Array> {
  yield bytes;
}

async function sendAll(outgoing: NodeJS.WritableStream, body: AsyncIterable<Uint8Array>): Promise<void> {
  for await (const chunk of body) outgoing.write(chunk);
  outgoing.end();
}
