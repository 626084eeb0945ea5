import { readFile } from "node:fs/promises";
import { Agent } from "node:https";
import { join } from "node:path";
import { type NodeFacts, nodeRoutes } from "../api/node.ts";
import { readIfExists, removeDurable, writeDurable } from "../base/durable.ts";
import { ForgeError } from "../base/errors.ts";
import { createCsr } from "../mesh/index.ts";
import type { LinkCredentials } from "./control-link.ts";
import { readJson, send } from "./https-call.ts";

export interface JoinOptions {
  /** The API's address, where a machine without a certificate may ask. */
  readonly apiUrl: string;
  /** One-time token; removed once it was used. */
  readonly joinTokenPath: string;
  /** The region's CA, brought to the node out of band: with it the node knows whom it joins. */
  readonly caPath: string;
}

/** The node's certificate and key: loaded, or obtained with the one-time join token. Keys are made here and never leave. */
export async function loadOrJoin(dir: string, join: JoinOptions, facts: NodeFacts, spoolPublicKeyPem: string): Promise<LinkCredentials> {
  return (await loadCredentials(dir)) ?? joinRegion(dir, join, facts, spoolPublicKeyPem);
}

async function loadCredentials(dir: string): Promise<LinkCredentials | undefined> {
  const paths = pathsIn(dir);
  const [certificate, key, ca] = await Promise.all([readIfExists(paths.certificate), readIfExists(paths.key), readIfExists(paths.ca)]);
  if (certificate === undefined || key === undefined || ca === undefined) return undefined;
  return { certificatePem: certificate.toString(), privateKeyPem: key.toString(), caPem: ca.toString() };
}

async function joinRegion(dir: string, options: JoinOptions, facts: NodeFacts, spoolPublicKeyPem: string): Promise<LinkCredentials> {
  const joinToken = (await readRequired(options.joinTokenPath, "the join token")).trim();
  const caPem = await readRequired(options.caPath, "the region's CA certificate");
  const { csrPem, privateKeyPem } = await createCsr();
  const body = nodeRoutes.join.body.parse({ joinToken, csrPem, spoolPublicKeyPem, facts });
  const answer = nodeRoutes.join.response.parse(await post(new URL(nodeRoutes.join.path, options.apiUrl), caPem, body));
  const paths = pathsIn(dir);
  await writeDurable(paths.ca, answer.caPem);
  await writeDurable(paths.key, privateKeyPem);
  await writeDurable(paths.certificate, answer.certificatePem); // last: its presence says that all three are there
  await removeDurable(options.joinTokenPath);
  return { certificatePem: answer.certificatePem, privateKeyPem, caPem: answer.caPem };
}

function pathsIn(dir: string): { certificate: string; key: string; ca: string } {
  return { certificate: join(dir, "node.crt"), key: join(dir, "node.key"), ca: join(dir, "ca.crt") };
}

async function readRequired(path: string, what: string): Promise<string> {
  try {
    return await readFile(path, "utf8");
  } catch (error) {
    throw new ForgeError("UNAVAILABLE", `${what} is not at ${path}: this node cannot join the region`, { cause: error });
  }
}

/** The one call a node makes without a certificate. */
async function post(url: URL, caPem: string, body: unknown): Promise<unknown> {
  const agent = new Agent({ ca: caPem, minVersion: "TLSv1.3" });
  try {
    return await readJson(await send(url, { method: "POST", agent, body }));
  } finally {
    agent.destroy();
  }
}
