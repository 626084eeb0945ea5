import { generateKeyPairSync, sign } from "node:crypto";
import { ControlLink } from "../../src/agent/control-link.ts";
import { type CellReport, type DesiredState, type NodeFacts, nodeRoutes } from "../../src/api/node.ts";
import { type ChainEntry, genesis, type Head, linkEntry, newEvent, type Signer } from "../../src/audit/index.ts";
import { createCsr } from "../../src/mesh/index.ts";
import type { Fact } from "../../src/control/audit-log.ts";
import type { TestControl } from "./control.ts";

/** Drives the node protocol as an agent does, with a real client certificate, and runs nothing. */
export class FakeNode {
  readonly id: string;
  readonly link: ControlLink;
  generation = 0;
  #head: Head = genesis;
  readonly #signer: Signer;

  private constructor(id: string, link: ControlLink, signer: Signer) {
    this.id = id;
    this.link = link;
    this.#signer = signer;
  }

  static async join(plane: TestControl, change: Partial<NodeFacts> = {}, joinToken?: string): Promise<FakeNode> {
    const { csrPem, privateKeyPem } = await createCsr();
    const signer = memorySigner();
    const body = {
      joinToken: joinToken ?? (await plane.joinToken()),
      csrPem,
      spoolPublicKeyPem: signer.publicKeyPem,
      facts: nodeFacts(change),
    };
    const { status, body: answer } = await plane.fetch("POST", nodeRoutes.join.path, { body });
    if (status !== 200) throw new Error(JSON.stringify(answer));
    const joined = nodeRoutes.join.response.parse(answer);
    const link = new ControlLink(`https://127.0.0.1:${plane.running.nodePort}`, {
      caPem: joined.caPem,
      certificatePem: joined.certificatePem,
      privateKeyPem,
    });
    return new FakeNode(joined.nodeId, link, signer);
  }

  /** The next desired state, or the same one after `waitMs`. */
  async desired(waitMs = 5000): Promise<DesiredState> {
    const state = await this.link.desired(this.generation, waitMs, AbortSignal.timeout(waitMs + 5000));
    this.generation = state.generation;
    return state;
  }

  /** Waits for a desired state that satisfies the condition. */
  async desiredWhen(condition: (state: DesiredState) => boolean, boundMs = 10_000): Promise<DesiredState> {
    const end = performance.now() + boundMs;
    for (let state = await this.desired(0); ; state = await this.desired(1000)) {
      if (condition(state)) return state;
      if (performance.now() > end) throw new Error(`the desired state did not come: ${JSON.stringify(state)}`);
    }
  }

  /** Makes every desired cell run, and stop, at once, until the signal aborts. */
  async obey(signal: AbortSignal): Promise<void> {
    let state = await this.desired(0);
    while (!signal.aborted) {
      const cells = state.cells.map((cell) => cellReport(cell.id, cell.desired === "running" ? "running" : "stopped", cell.revision));
      await this.link.report(cells, true).catch(() => undefined);
      state = await this.link.desired(this.generation, 5000, signal).catch(() => state);
      this.generation = state.generation;
    }
  }

  /** The next entry of this node's spool. */
  entry(fact: Fact): ChainEntry {
    const entry = linkEntry(this.#head, newEvent(fact), this.#signer);
    this.#head = entry;
    return entry;
  }

  close(): void {
    this.link.close();
  }
}

export function nodeFacts(change: Partial<NodeFacts> = {}): NodeFacts {
  return {
    name: "node-1",
    jurisdiction: "de",
    site: "local",
    rack: "r1",
    vmm: "qemu",
    emulated: true,
    profile: "development",
    vcpus: 2,
    memoryMib: 1024,
    ...change,
  };
}

export function cellReport(id: string, state: CellReport["state"], revision = 1, change: Partial<CellReport> = {}): CellReport {
  const nothing = {
    reason: null,
    measurement: null,
    vmm: null,
    emulated: null,
    restarts: 0,
    exitStatus: null,
    startedAt: null,
    phases: {},
    published: [],
  };
  return { id, revision, state, ...nothing, ...change };
}

function memorySigner(): Signer {
  const { privateKey, publicKey } = generateKeyPairSync("ed25519");
  return { publicKeyPem: publicKey.export({ type: "spki", format: "pem" }), sign: (bytes) => sign(null, bytes, privateKey) };
}
