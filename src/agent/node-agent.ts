import type { DesiredState, NodeFacts } from "../api/node.ts";
import { fileSigner, newEvent, Spool } from "../audit/index.ts";
import { systemClock } from "../base/clock.ts";
import { makeDirectory } from "../base/durable.ts";
import { ForgeError, toForgeError } from "../base/errors.ts";
import { createLogger, type Logger } from "../base/log.ts";
import { hostname } from "node:os";
import { chooseVmm, IsoCells, type Vmm } from "../isocell/index.ts";
import { detach, gatewayAddress, listAttachments, listPublished, recover, unpublish } from "../mesh/index.ts";
import { CellRunner, type RunnerTools } from "./cell-runner.ts";
import { ControlLink } from "./control-link.ts";
import { CpuPool, offeredMemoryMib, onlineCpus } from "./cpus.ts";
import { loadOrJoin } from "./identity.ts";
import { NodeImages } from "./images.ts";
import { Reporter } from "./reporter.ts";
import { Sessions } from "./sessions.ts";
import { Shipper } from "./shipper.ts";
import { CellRecords } from "./cell-records.ts";

export interface AgentOptions {
  readonly dataDir: string;
  /** Where the control plane's node port is: https://127.0.0.1:7444. */
  readonly controlUrl: string;
  /** Where the API is; asked once, to join. */
  readonly apiUrl: string;
  readonly jurisdiction: string;
  readonly site: string;
  readonly rack: string;
  readonly nodeName?: string;
  readonly profile: "development" | "production";
  /** The node's address that published ports listen on. */
  readonly publishAddress: string;
  /** Guest and eBPF artefacts, as tools/setup made them. */
  readonly buildDir: string;
}

const longPollMs = 25_000;
const retryMsLeast = 200;
const retryMsMost = 5000;

/**
 * The node's hands: desired state -> diff -> primitives -> report. Every cell has a runner of its own. An agent that
 * ends leaves the cells running; the next one finds them by what is on disk and takes them over.
 */
export class NodeAgent {
  readonly #link: ControlLink;
  readonly #tools: RunnerTools;
  readonly #facts: NodeFacts;
  readonly #records: CellRecords;
  readonly #reporter: Reporter;
  readonly #sessions: Sessions;
  readonly #shipper: Shipper;
  readonly #spool: Spool;
  readonly #log: Logger;
  readonly #runners = new Map<string, CellRunner>();
  readonly #over = new AbortController();

  /** Everything the node has, wired in one place. */
  static async open(options: AgentOptions): Promise<NodeAgent> {
    const log = createLogger("agent");
    const dir = `${options.dataDir}/agent`;
    for (const folder of ["", "/keys", "/logs"]) await makeDirectory(`${dir}${folder}`);
    const { vmm, choice } = await chooseVmm({ stateDir: `${dir}/vmm`, buildDir: options.buildDir });
    log.info({ vmm: vmm.name, emulated: vmm.emulated }, choice.reason);
    if (options.profile === "production" && vmm.emulated) {
      throw new ForgeError("UNSUPPORTED", `the production profile refuses emulation; ${choice.reason}`);
    }
    const cpus = new CpuPool(options.profile, await onlineCpus());
    const facts = await describeNode(options, vmm, cpus);
    const signer = await fileSigner(`${dir}/keys/spool.key`);
    const spool = await Spool.open(`${dir}/spool`, signer);
    const credentials = await loadOrJoin(
      `${dir}/keys`,
      {
        apiUrl: options.apiUrl,
        joinTokenPath: `${options.dataDir}/control/bootstrap/join-token`,
        caPath: `${options.dataDir}/control/ca.pem`,
      },
      facts,
      signer.publicKeyPem,
    );
    const link = new ControlLink(options.controlUrl, credentials);
    const images = await NodeImages.open(dir, link);
    const isocells = await IsoCells.open({ dir: `${dir}/cells`, buildDir: options.buildDir, vmm, rootfs: images.rootfs, log });
    const records = await CellRecords.open(`${dir}/records`, log);
    return new NodeAgent({
      link,
      facts,
      records,
      spool,
      log,
      tools: { isocells, images, cpus, dir, publishAddress: options.publishAddress },
    });
  }

  private constructor(parts: {
    link: ControlLink;
    facts: NodeFacts;
    records: CellRecords;
    spool: Spool;
    log: Logger;
    tools: Pick<RunnerTools, "isocells" | "images" | "cpus" | "dir" | "publishAddress">;
  }) {
    const { link, facts, records, spool, log } = parts;
    this.#link = link;
    this.#facts = facts;
    this.#records = records;
    this.#spool = spool;
    this.#log = log;
    this.#shipper = new Shipper(spool, link, systemClock, log);
    this.#reporter = new Reporter(link, systemClock, log, () => [...this.#runners.values()].map((runner) => runner.report()));
    this.#sessions = new Sessions({ dial: (id) => link.session(id), runner: (id) => this.#runners.get(id), log });
    this.#tools = {
      ...parts.tools,
      records,
      clock: systemClock,
      log,
      gateway: "", // known once the control plane said hello
      record: async (...facts) => {
        const events = facts.map((fact) => newEvent({ actor: `node/${this.#facts.name}`, ...fact }));
        await spool.append(events);
        this.#shipper.wake();
      },
      changed: (cellId) => this.#reporter.changed(cellId),
    };
  }

  /** Runs until `stop` or `stopCells`. */
  async run(): Promise<void> {
    const signal = this.#over.signal;
    await this.#takeOver();
    const ship = this.#shipper.run(signal);
    const report = this.#reporter.run(signal);
    await this.#follow(signal);
    await Promise.all([ship, report]);
    await this.#spool.close();
    this.#link.close();
  }

  /** Ends the agent; cells stay as they are. */
  async stop(): Promise<void> {
    for (const runner of this.#runners.values()) runner.abandon();
    await this.#tools.isocells.close();
    this.#over.abort();
  }

  /** Stops every cell, says so to the region while it can, and ends. What is desired stays desired. */
  async stopCells(): Promise<void> {
    await Promise.all([...this.#runners.values()].map((runner) => runner.halt()));
    await this.#reporter.flush().catch(() => undefined); // the region may be gone already; the spool keeps the events
    this.#over.abort();
  }

  /** Cells that outlived the last agent get their runners again; whatever has no record is removed. */
  async #takeOver(): Promise<void> {
    const found = await this.#records.list();
    const known = new Set(found.map(({ assignment }) => assignment.id));
    await this.#removeStrays(known);
    const attached = new Map(recover(`${this.#tools.dir}/mesh`).map((attachment) => [attachment.cellId, attachment]));
    await this.#tools.record({
      tenant: null,
      kind: "node.started",
      outcome: "success",
      subject: `node/${this.#facts.name}`,
      details: { cells: found.length },
    });
    for (const record of found)
      this.#runners.set(record.assignment.id, await CellRunner.resume(record, this.#tools, attached.get(record.assignment.id)));
    this.#log.info({ cells: found.length }, "took over what is on this node");
  }

  async #removeStrays(known: ReadonlySet<string>): Promise<void> {
    const { isocells, dir } = this.#tools;
    const meshDir = `${dir}/mesh`;
    for (const { cellId } of listPublished(meshDir)) if (!known.has(cellId)) await unpublish(cellId, meshDir);
    for (const cellId of await isocells.list()) if (!known.has(cellId)) await isocells.remove(cellId);
    for (const cellId of listAttachments(meshDir)) if (!known.has(cellId)) detach(cellId, meshDir);
  }

  /** Greets, then asks again and again for what is desired; the answer waits until there is something new. */
  async #follow(signal: AbortSignal): Promise<void> {
    let retryMs = retryMsLeast;
    let generation = -1;
    let greeted = false;
    while (!signal.aborted) {
      try {
        if (!greeted) {
          await this.#greet();
          generation = -1;
        }
        greeted = true;
        const desired = await this.#link.desired(generation, longPollMs, signal);
        if (desired.generation !== generation) await this.#apply(desired);
        generation = desired.generation;
        this.#sessions.begin(desired.sessions);
        retryMs = retryMsLeast;
      } catch (error) {
        if (signal.aborted) return;
        greeted = false;
        this.#log.warn({ err: toForgeError(error).message, retryMs }, "the control plane does not answer; cells keep running");
        await systemClock.sleep(retryMs, signal).catch(() => undefined); // aborted: the loop ends
        retryMs = Math.min(retryMs * 2, retryMsMost);
      }
    }
  }

  async #greet(): Promise<void> {
    const { installationPrefix } = await this.#link.hello(this.#facts);
    this.#tools.gateway = gatewayAddress(installationPrefix);
    this.#reporter.reportAll();
  }

  /** The diff: new cells get a runner, known ones are told, those no longer named are stopped and forgotten. */
  async #apply(desired: DesiredState): Promise<void> {
    const named = new Set(desired.cells.map(({ id }) => id));
    for (const assignment of desired.cells) {
      const runner = this.#runners.get(assignment.id);
      if (runner === undefined) this.#runners.set(assignment.id, await CellRunner.begin(assignment, this.#tools));
      else await runner.update(assignment);
    }
    for (const [cellId, runner] of this.#runners) {
      if (named.has(cellId)) continue;
      void runner.remove().then(() => {
        this.#runners.delete(cellId);
        this.#reporter.reportAll();
      });
    }
  }
}

async function describeNode(options: AgentOptions, vmm: Vmm, cpus: CpuPool): Promise<NodeFacts> {
  return {
    name: options.nodeName ?? hostname(),
    jurisdiction: options.jurisdiction,
    site: options.site,
    rack: options.rack,
    vmm: vmm.name,
    emulated: vmm.emulated,
    profile: options.profile,
    vcpus: cpus.vcpus,
    memoryMib: await offeredMemoryMib(),
  };
}
