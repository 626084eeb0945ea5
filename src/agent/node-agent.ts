import { readdir, rm } from "node:fs/promises";
import { hostname } from "node:os";
import type { DesiredState, NodeFacts } from "../api/node.ts";
import { fileSigner, newEvent, Spool } from "../audit/index.ts";
import { systemClock } from "../base/clock.ts";
import { makeDirectory, readIfExists, writeDurable } from "../base/durable.ts";
import { ForgeError, toForgeError } from "../base/errors.ts";
import { createLogger, type Logger } from "../base/log.ts";
import { chooseVmm, IsoCells, type Vmm } from "../isocell/index.ts";
import { detach, gatewayAddress, listAttachments, listPublished, recover, unpublish } from "../mesh/index.ts";
import { Backoff } from "./backoff.ts";
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
const retryMsMost = 5000;

/**
 * The node's hands: desired state -> diff -> primitives -> report. Every cell has a runner of its own. An agent that
 * ends leaves the cells running; the next one finds them by what is on disk and takes them over.
 */
export class NodeAgent {
  readonly #link: ControlLink;
  readonly #tools: RunnerTools;
  readonly #facts: NodeFacts;
  readonly #reporter: Reporter;
  readonly #sessions: Sessions;
  readonly #shipper: Shipper;
  readonly #spool: Spool;
  readonly #log: Logger;
  readonly #runners = new Map<string, CellRunner>();
  readonly #leaving = new Set<string>();
  readonly #gateway: Gateway;
  /** Ends the listening to what is desired, and later everything else. */
  readonly #listening = new AbortController();
  readonly #over = new AbortController();
  #following: Promise<void> = Promise.resolve();

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
    const gateway = await Gateway.open(`${dir}/gateway`);
    const tools = { isocells, images, cpus, records, dir, publishAddress: options.publishAddress };
    return new NodeAgent({ link, facts, gateway, spool, log, tools });
  }

  private constructor(parts: {
    link: ControlLink;
    facts: NodeFacts;
    gateway: Gateway;
    spool: Spool;
    log: Logger;
    tools: Pick<RunnerTools, "isocells" | "images" | "cpus" | "records" | "dir" | "publishAddress">;
  }) {
    const { link, facts, gateway, spool, log } = parts;
    this.#link = link;
    this.#facts = facts;
    this.#gateway = gateway;
    this.#spool = spool;
    this.#log = log;
    this.#shipper = new Shipper(spool, link, systemClock, log);
    this.#reporter = new Reporter(link, systemClock, log, () => [...this.#runners.values()].map((runner) => runner.report));
    this.#sessions = new Sessions({ dial: (id) => link.session(id), runner: (id) => this.#runners.get(id), log });
    this.#tools = {
      ...parts.tools,
      clock: systemClock,
      log,
      gateway: gateway.address,
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
    this.#following = this.#follow(AbortSignal.any([this.#listening.signal, signal]));
    await Promise.all([ship, report, this.#following]);
    await this.#spool.close();
    this.#link.close();
  }

  /** Ends the agent; cells stay as they are. */
  async stop(): Promise<void> {
    this.#listening.abort();
    await this.#following;
    for (const runner of this.#runners.values()) runner.abandon();
    await this.#tools.isocells.close();
    this.#over.abort();
  }

  /** Stops every cell, says so to the region while it can, and ends. What is desired stays desired. */
  async stopCells(): Promise<void> {
    this.#listening.abort(); // nobody may join those that are counted now
    await this.#following;
    await Promise.all([...this.#runners.values()].map((runner) => runner.halt()));
    await this.#reporter.flush().catch(() => undefined); // the region may be gone already; the spool keeps the events
    this.#over.abort();
  }

  /** Cells that outlived the last agent get their runners again; whatever has no record is removed. */
  async #takeOver(): Promise<void> {
    const found = await this.#tools.records.list();
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
    for (const { assignment, cpus } of found) this.#tools.cpus.adopt(assignment.id, cpus); // all, before anyone asks for one
    for (const record of found) {
      const { id } = record.assignment;
      this.#runners.set(id, await CellRunner.resume(record, this.#tools, attached.get(id)));
    }
    this.#log.info({ cells: found.length }, "took over what is on this node");
  }

  async #removeStrays(known: ReadonlySet<string>): Promise<void> {
    const { isocells, dir } = this.#tools;
    const meshDir = `${dir}/mesh`;
    for (const { cellId } of listPublished(meshDir)) if (!known.has(cellId)) await unpublish(cellId, meshDir);
    for (const cellId of await isocells.list()) if (!known.has(cellId)) await isocells.remove(cellId);
    for (const cellId of listAttachments(meshDir)) if (!known.has(cellId)) detach(cellId, meshDir);
    for (const cellId of await readdir(`${dir}/logs`)) {
      if (!known.has(cellId)) await rm(`${dir}/logs/${cellId}`, { recursive: true, force: true });
    }
  }

  /** Greets, then asks again and again for what is desired; the answer waits until there is something new. */
  async #follow(signal: AbortSignal): Promise<void> {
    const backoff = new Backoff(systemClock, retryMsMost);
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
        backoff.reset();
      } catch (error) {
        if (signal.aborted) return;
        greeted = false;
        this.#log.warn(
          { err: toForgeError(error).message, retryMs: backoff.nextMs },
          "the control plane does not answer; cells keep running",
        );
        await backoff.pause(signal);
      }
    }
  }

  async #greet(): Promise<void> {
    const { installationPrefix } = await this.#link.hello(this.#facts);
    await this.#gateway.learn(gatewayAddress(installationPrefix));
    this.#reporter.reportAll();
  }

  /**
   * The diff: those no longer named are stopped and forgotten, new cells get a runner, known ones are told. One that
   * cannot be begun stops none of the others; the whole is tried again.
   */
  async #apply(desired: DesiredState): Promise<void> {
    const named = new Set(desired.cells.map(({ id }) => id));
    for (const [cellId, runner] of this.#runners) if (!named.has(cellId)) void this.#forget(cellId, runner);
    const failures: unknown[] = [];
    for (const assignment of desired.cells) {
      const runner = this.#runners.get(assignment.id);
      try {
        if (runner === undefined) this.#runners.set(assignment.id, await CellRunner.begin(assignment, this.#tools));
        else await runner.update(assignment);
      } catch (error) {
        failures.push(error);
      }
    }
    if (failures.length > 0) throw toForgeError(failures[0]);
  }

  /** Until nothing of the cell is left; then the region hears that. */
  async #forget(cellId: string, runner: CellRunner): Promise<void> {
    if (this.#leaving.has(cellId)) return;
    this.#leaving.add(cellId);
    for (let isGone = false; !isGone && !this.#over.signal.aborted;) {
      try {
        await runner.remove();
        isGone = true;
      } catch (error) {
        this.#log.error({ cell: cellId, err: toForgeError(error).message }, "a cell cannot be removed yet");
        await systemClock.sleep(retryMsMost, this.#over.signal).catch(() => undefined); // aborted: the loop ends
      }
    }
    this.#runners.delete(cellId);
    this.#leaving.delete(cellId);
    this.#reporter.reportAll();
  }
}

/** The address of the host's end of every tap: told by the region once, and known from then on without it. */
class Gateway {
  readonly address: Promise<string>;
  readonly #path: string;
  readonly #resolve: (address: string) => void;

  static async open(path: string): Promise<Gateway> {
    return new Gateway(path, (await readIfExists(path))?.toString());
  }

  private constructor(path: string, known: string | undefined) {
    const { promise, resolve } = Promise.withResolvers<string>();
    this.address = promise;
    this.#path = path;
    this.#resolve = resolve;
    if (known !== undefined) resolve(known);
  }

  async learn(address: string): Promise<void> {
    await writeDurable(this.#path, address);
    this.#resolve(address);
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
