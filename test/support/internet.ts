import { type ChildProcess, spawn } from "node:child_process";
import { once } from "node:events";
import { mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { run } from "../../src/base/exec.ts";

/**
 * A host with an uplink, and an internet at its other end: two network namespaces and a cable. The internet has the
 * documentation addresses 192.0.2.1 and 2001:db8::1, where anything is answered on ports 53 and 80.
 */
export class Internet {
  /** Name of the namespace that is the host. */
  readonly host: string;
  readonly #outside: string;
  readonly #folder: string;
  readonly #children: ChildProcess[] = [];

  static async create(): Promise<Internet> {
    const internet = new Internet(`forge-t${process.pid}`, await mkdtemp(join(tmpdir(), "forge-internet-")));
    try {
      await internet.#build();
      return internet;
    } catch (error) {
      await internet.destroy();
      throw error;
    }
  }

  private constructor(name: string, folder: string) {
    this.#folder = folder;
    this.host = `${name}-host`;
    this.#outside = `${name}-net`;
  }

  /** Begins to capture everything on the host's uplink. */
  async capture(path: string): Promise<() => Promise<void>> {
    const dump = this.#spawn(this.host, ["tcpdump", "-i", "uplink", "--immediate-mode", "-U", "-n", "-w", path]);
    await new Promise<void>((resolve, reject) => {
      let said = "";
      dump.stderr?.on("data", (chunk: Buffer) => {
        said += chunk.toString();
        if (said.includes("listening on")) resolve();
      });
      dump.once("exit", () => reject(new Error(`tcpdump ended: ${said}`)));
    });
    return async () => {
      dump.kill("SIGINT");
      if (dump.exitCode === null) await once(dump, "exit");
    };
  }

  /** What a capture holds, one line a packet. */
  async read(path: string): Promise<string[]> {
    await readFile(path);
    return (await run("tcpdump", ["-n", "-r", path])).split("\n").filter(Boolean);
  }

  /** Asks the internet from the host: proof that the way out exists. */
  async askFromHost(): Promise<string> {
    return run("nsenter", [`--net=/run/netns/${this.host}`, "curl", "--silent", "--max-time", "5", "http://[2001:db8::1]/"]);
  }

  async destroy(): Promise<void> {
    for (const child of this.#children) {
      if (child.exitCode !== null || child.signalCode !== null) continue;
      child.kill("SIGKILL");
      await once(child, "exit");
    }
    for (const name of [this.host, this.#outside]) await run("ip", ["netns", "delete", name]).catch(() => undefined);
    await rm(this.#folder, { recursive: true, force: true });
  }

  async #build(): Promise<void> {
    for (const name of [this.host, this.#outside]) await run("ip", ["netns", "add", name]);
    const commands = [
      ["link", "add", "uplink", "netns", this.host, "type", "veth", "peer", "name", "downlink", "netns", this.#outside],
      ["-n", this.host, "addr", "add", "192.0.2.2/24", "dev", "uplink"],
      ["-n", this.host, "addr", "add", "2001:db8::2/64", "dev", "uplink", "nodad"],
      ["-n", this.#outside, "addr", "add", "192.0.2.1/24", "dev", "downlink"],
      ["-n", this.#outside, "addr", "add", "2001:db8::1/64", "dev", "downlink", "nodad"],
      ["-n", this.host, "link", "set", "lo", "up"],
      ["-n", this.host, "link", "set", "uplink", "up"],
      ["-n", this.#outside, "link", "set", "lo", "up"],
      ["-n", this.#outside, "link", "set", "downlink", "up"],
      ["-n", this.host, "route", "add", "default", "via", "192.0.2.1"],
      ["-n", this.host, "-6", "route", "add", "default", "via", "2001:db8::1"],
    ];
    for (const args of commands) await run("ip", args);
    await writeFile(join(this.#folder, "index.html"), "the internet\n");
    for (const port of ["80", "53"]) this.#spawn(this.#outside, ["busybox", "httpd", "-f", "-p", `[::]:${port}`, "-h", this.#folder]);
  }

  #spawn(netns: string, command: readonly string[]): ChildProcess {
    const child = spawn("nsenter", [`--net=/run/netns/${netns}`, ...command], { stdio: ["ignore", "ignore", "pipe"] });
    this.#children.push(child);
    return child;
  }
}
