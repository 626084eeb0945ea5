import { spawn } from "node:child_process";
import { once } from "node:events";
import { closeSync, existsSync, mkdirSync, readFileSync, readlinkSync, statSync, writeFileSync } from "node:fs";
import { connect, createServer, type Socket } from "node:net";
import { join } from "node:path";
import { afterAll, beforeAll, beforeEach, describe, expect, test } from "vitest";
import { listenTcp, pidfdOpen, waitForExit } from "../base/linux.ts";
import { readCounters, updatePolicy } from "./attach.ts";
import { buildBpf } from "./bpf/build.ts";
import { attachTestCell, startTestGuest, type TestCell, type TestGuest } from "./guest.fixture.ts";
import { checkPublishable, listPublished, publish, type PublishOptions, unpublish } from "./publish.ts";

let cell: TestCell;
let guest: TestGuest;
let port: number;

beforeAll(async () => {
  await buildBpf();
  cell = attachTestCell([80]);
  guest = await startTestGuest(cell);
  await guest.serve(80, (socket) => socket.pipe(socket));
});
beforeEach(async () => {
  updatePolicy(cell.attachment.cellId, [80], cell.stateDir);
  port = await freePort();
});
afterAll(async () => {
  await unpublish(cell.attachment.cellId, cell.stateDir);
  await guest[Symbol.asyncDispose]();
  await cell[Symbol.asyncDispose]();
});

describe("a published port", () => {
  test("reaches the service, both ways and whole, and ends with unpublish", async () => {
    await publish(optionsOf());
    const sent = Buffer.alloc(4 * 1024 * 1024, "forge");
    expect((await echo(port, sent)).equals(sent)).toBe(true);
    await unpublish(cell.attachment.cellId, cell.stateDir);
    await unpublish(cell.attachment.cellId, cell.stateDir);
    await expect(echo(port, sent)).rejects.toMatchObject({ code: "ECONNREFUSED" });
    expect(existsSync(join(cell.stateDir, "published"))).toBe(false);
  });

  test("is served by a process without privileges, in the cell's namespace, that nobody waits for", async () => {
    const { pid } = await publish(optionsOf());
    await echo(port, Buffer.from("x"));
    const status = Object.fromEntries(
      readFileSync(`/proc/${pid}/status`, "utf8")
        .split("\n")
        .map((line) => line.split(/:\s+/)),
    );
    expect(Number(status.Uid.split("\t")[0])).toBeGreaterThanOrEqual(0x71000000);
    expect(status).toMatchObject({ NoNewPrivs: "1", CapEff: "0".repeat(16), CapPrm: "0".repeat(16), CapBnd: "0".repeat(16) });
    expect(readlinkSync(`/proc/${pid}/ns/net`)).toBe(`net:[${statSync(cell.attachment.netnsPath).ino}]`);
    expect(sessionOf(pid)).toBe(pid);
    expect(readlinkSync(`/proc/${pid}/exe`)).toContain("systemd-socket-proxyd");
    expect(readFileSync(`/proc/${pid}/environ`, "utf8")).not.toMatch(/VITEST|HOME/);
    expect(Number(/^RssAnon:\s+(\d+) kB$/m.exec(readFileSync(`/proc/${pid}/status`, "utf8"))?.[1])).toBeLessThan(2048);
  });

  test("resolves no name: its target is an address, and what it sends is TCP to the cell alone", async () => {
    await publish(optionsOf());
    await echo(port, Buffer.from("x"));
    const { toCell } = readCounters(cell.attachment.cellId, cell.stateDir);
    expect(toCell.dropped).toMatchObject({ notTcp: { packets: 0 }, wrongDestination: { packets: 0 }, portNotAllowed: { packets: 0 } });
  });

  test("is the same publication when it is asked for again", async () => {
    const first = await publish(optionsOf());
    expect(await publish(optionsOf())).toEqual(first);
    expect(listPublished(cell.stateDir)).toContainEqual(first);
  });

  test("joins the cgroups it is given, and does not start where it cannot", async () => {
    const procs = join(cell.stateDir, "cgroup.procs");
    writeFileSync(procs, "");
    const { pid } = await publish({ ...optionsOf(), cgroupProcsFiles: [procs] });
    expect(readFileSync(procs, "utf8")).toBe(`${pid}\n`);
    const missing = { ...optionsOf(), publishedPort: await freePort(), cgroupProcsFiles: [join(cell.stateDir, "missing/cgroup.procs")] };
    await expect(publish(missing)).rejects.toMatchObject({ code: "EXEC_FAILED" });
    expect(listPublished(cell.stateDir).some(({ publishedPort }) => publishedPort === missing.publishedPort)).toBe(false);
    await expect(echo(missing.publishedPort, Buffer.from("x"))).rejects.toMatchObject({ code: "ECONNREFUSED" });
  });

  test("is cut, open connections included, when the policy no longer allows the cell's port", async () => {
    await publish(optionsOf());
    const socket = connect(port, "127.0.0.1");
    try {
      socket.write("before");
      expect(String((await once(socket, "data"))[0])).toBe("before");
      updatePolicy(cell.attachment.cellId, [443], cell.stateDir);
      socket.write("after");
      expect(await Promise.race([once(socket, "data"), new Promise((resolve) => setTimeout(resolve, 300, "silence"))])).toBe("silence");
      expect(readCounters(cell.attachment.cellId, cell.stateDir).toCell.dropped.portNotAllowed.packets).toBeGreaterThan(0);
    } finally {
      socket.destroy();
    }
  });
});

describe("a port that is taken", () => {
  test.each([false, true])("by a foreigner is refused (who shares ports: %s)", async (reusePort) => {
    const foreigner = listenTcp("127.0.0.1", port, { reusePort });
    try {
      await expect(publish(optionsOf())).rejects.toMatchObject({ code: "PORT_TAKEN" });
    } finally {
      closeSync(foreigner);
    }
    await publish(optionsOf());
  });

  test("by a replica is shared, and outlives it", async () => {
    await using replica = attachTestCell([80]);
    await using replicaGuest = await startTestGuest(replica);
    await replicaGuest.serve(80, (socket) => socket.end("replica"));
    // Replicas of one node share its state folder.
    const { cellId, netnsPath, address } = replica.attachment;
    await using cleanUp = new AsyncDisposableStack();
    cleanUp.defer(() => unpublish(cellId, cell.stateDir));
    await Promise.all([publish(optionsOf()), publish({ ...optionsOf(), cellId, netnsPath, cellAddress: address })]);
    const answers = new Set<string>();
    for (let attempt = 0; attempt < 64 && answers.size < 2; attempt++) answers.add(String(await echo(port, Buffer.from("first"))));
    expect([...answers].toSorted()).toEqual(["first", "replica"]);
    await unpublish(cell.attachment.cellId, cell.stateDir, port);
    expect(String(await echo(port, Buffer.from("first")))).toBe("replica");
  });
});

describe("a port of another service", () => {
  test("is refused while a publication of it lives, in whatever cell", async () => {
    const stranger = { ...optionsOf(), cellId: "cell_stranger", owner: "ten_b/web" };
    const underWay = publish(optionsOf());
    await expect(publish(stranger)).rejects.toMatchObject({ code: "PORT_TAKEN" });
    await underWay;
    expect(listPublished(cell.stateDir)).toContainEqual(expect.objectContaining({ publishedPort: port, owner: "ten_a/web" }));
    await expect(publish(stranger)).rejects.toMatchObject({ code: "PORT_TAKEN" });
    expect(() => checkPublishable("127.0.0.1", port, "ten_b/web", cell.stateDir)).toThrow(expect.objectContaining({ code: "PORT_TAKEN" }));
    checkPublishable("127.0.0.1", port, "ten_a/web", cell.stateDir);
    await unpublish(cell.attachment.cellId, cell.stateDir, port);
    checkPublishable("127.0.0.1", port, "ten_b/web", cell.stateDir);
  });

  test.each(["", "a b", "a\nb", "A", "é"])("an owner's name is plain: %j is refused", async (owner) => {
    await expect(publish({ ...optionsOf(), owner })).rejects.toMatchObject({ code: "INVALID_INPUT" });
  });
});

describe("after a kill of the agent", () => {
  test("publications serve on, and are found and ended by the next agent", async () => {
    const program = `
      import { publish } from ${JSON.stringify(join(import.meta.dirname, "publish.ts"))};
      await publish(JSON.parse(process.argv[1]));
      process.kill(process.pid, "SIGKILL");`;
    const child = spawn(process.execPath, ["--input-type=module-typescript", "-e", program, JSON.stringify(optionsOf())], {
      stdio: "inherit",
    });
    expect((await once(child, "exit"))[1]).toBe("SIGKILL");
    expect(String(await echo(port, Buffer.from("still here")))).toBe("still here");
    const found = listPublished(cell.stateDir).find(({ publishedPort }) => publishedPort === port);
    const pidfd = pidfdOpen(found!.pid)!;
    await unpublish(cell.attachment.cellId, cell.stateDir, port);
    expect(await waitForExit(pidfd, 1000)).toBe(true); // tells at once of one that is gone
    closeSync(pidfd);
  });

  test("a process that only has the recorded number is left alone", async () => {
    const bystander = spawn("sleep", ["60"], { stdio: "ignore" });
    try {
      const folder = join(cell.stateDir, "published/cell_gone");
      mkdirSync(folder, { recursive: true });
      const boot = readFileSync("/proc/sys/kernel/random/boot_id", "utf8").trim();
      writeFileSync(join(folder, "4000"), `${boot} ${bystander.pid} 1 ten_a/web\n`);
      writeFileSync(join(folder, "4001"), `another-boot ${bystander.pid} ${startTimeOf(bystander.pid!)} ten_a/web\n`);
      expect(listPublished(cell.stateDir).some(({ cellId }) => cellId === "cell_gone")).toBe(false);
      await unpublish("cell_gone", cell.stateDir);
      expect(bystander.exitCode).toBeNull();
      expect(bystander.signalCode).toBeNull();
      expect(existsSync(folder)).toBe(false);
    } finally {
      bystander.kill("SIGKILL");
    }
  });
});

function optionsOf(): PublishOptions {
  const { cellId, netnsPath, address } = cell.attachment;
  return {
    cellId,
    owner: "ten_a/web",
    netnsPath,
    cgroupProcsFiles: [],
    listenAddress: "127.0.0.1",
    publishedPort: port,
    cellAddress: address,
    cellPort: 80,
    stateDir: cell.stateDir,
  };
}

/** What comes back for `sent`: as many bytes, or to the end of the connection. The proxy knows no half-closed connections. */
async function echo(toPort: number, sent: Buffer): Promise<Buffer> {
  const socket: Socket = connect(toPort, "127.0.0.1");
  socket.setTimeout(10_000, () => socket.destroy(new Error("no answer within 10 s")));
  socket.write(sent);
  const chunks: Buffer[] = [];
  let received = 0;
  for await (const chunk of socket as AsyncIterable<Buffer>) {
    chunks.push(chunk);
    received += chunk.length;
    if (received >= sent.length) break;
  }
  return Buffer.concat(chunks);
}

async function freePort(): Promise<number> {
  const server = createServer().listen(0, "127.0.0.1");
  await once(server, "listening");
  const address = server.address();
  server.close();
  await once(server, "close");
  if (address === null || typeof address === "string") throw new Error("no port");
  return address.port;
}

function sessionOf(pid: number): number {
  return Number(statOf(pid)[3]);
}

function startTimeOf(pid: number): string {
  return statOf(pid)[19]!;
}

/** The fields of proc(5)'s stat from the third. */
function statOf(pid: number): string[] {
  const stat = readFileSync(`/proc/${pid}/stat`, "latin1");
  return stat.slice(stat.lastIndexOf(")") + 2).split(" ");
}
