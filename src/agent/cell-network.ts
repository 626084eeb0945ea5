import type { CellAssignment, CellReport } from "../api/node.ts";
import { ForgeError } from "../base/errors.ts";
import { attach, type Attachment, checkPublishable, detach, publish, unpublish } from "../mesh/index.ts";

/** One cell's interface and published ports, from nothing to nothing again. */
export class CellNetwork {
  readonly #cellId: string;
  readonly #address: string;
  readonly #ports: CellAssignment["spec"]["ports"];
  readonly #stateDir: string;
  readonly #publishAddress: string;
  /** Replicas of one service share a published port; nobody else does. */
  readonly #owner: string;
  #attachment: Attachment | undefined;

  /** `attachment`: what an earlier agent left in force. */
  constructor(
    { id, address, spec, tenantId, service }: CellAssignment,
    node: { stateDir: string; publishAddress: string },
    attachment?: Attachment,
  ) {
    this.#cellId = id;
    this.#address = address;
    this.#ports = spec.ports;
    this.#stateDir = node.stateDir;
    this.#publishAddress = node.publishAddress;
    this.#owner = `${tenantId}/${service}`;
    this.#attachment = attachment;
  }

  /** Ports of the cell that may be connected to: those that are published. */
  get allowedPorts(): number[] {
    return this.#published.map(({ port }) => port);
  }

  /** Throws PORT_TAKEN before anything is made; the listeners themselves come with readiness. */
  checkPorts(): void {
    for (const { publishedPort } of this.#published) checkPublishable(this.#publishAddress, publishedPort, this.#owner, this.#stateDir);
  }

  /** Interface and policy, in force when it returns. */
  attach(gateway: string): Attachment {
    const allow = { ports: this.allowedPorts };
    this.#attachment = attach({ cellId: this.#cellId, address: this.#address, gateway, allow, stateDir: this.#stateDir });
    return this.#attachment;
  }

  /** Opens the published ports; those an earlier agent opened stay as they are. The proxies join the cell's groups. */
  async publish(cgroupProcsFiles: readonly string[]): Promise<CellReport["published"]> {
    const netnsPath = this.#attachment?.netnsPath;
    if (netnsPath === undefined) throw new ForgeError("INTERNAL", "a cell without an interface cannot be published");
    const listenAddress = this.#publishAddress;
    const common = {
      cellId: this.#cellId,
      owner: this.#owner,
      netnsPath,
      cgroupProcsFiles,
      listenAddress,
      cellAddress: this.#address,
      stateDir: this.#stateDir,
    };
    const published: CellReport["published"] = [];
    for (const { name, port, publishedPort } of this.#published) {
      await publish({ ...common, publishedPort, cellPort: port });
      published.push({ name, address: listenAddress, port: publishedPort });
    }
    return published;
  }

  /** Nobody new gets in. */
  async unpublish(): Promise<void> {
    await unpublish(this.#cellId, this.#stateDir);
  }

  /** Takes the interface away; idempotent. */
  detach(): void {
    detach(this.#cellId, this.#stateDir);
    this.#attachment = undefined;
  }

  get #published(): { name: string; port: number; publishedPort: number }[] {
    return this.#ports.flatMap(({ name, port, publish: publishedPort }) =>
      publishedPort === undefined ? [] : [{ name, port, publishedPort }],
    );
  }
}
