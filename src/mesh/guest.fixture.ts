import { type ChildProcess, spawn } from "node:child_process";
import { randomBytes } from "node:crypto";
import { closeSync, mkdtempSync, rmSync } from "node:fs";
import { createServer, type Server, type Socket } from "node:net";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { createNetns, inNetns, interfaceIndex, listenTcp, netlinkRequest, openTap, removeNetns } from "../base/linux.ts";
import { cellAddress, gatewayAddress, newCellIdentifier, newInstallationPrefix } from "./address.ts";
import { attach, type Attachment, detach } from "./attach.ts";
import { addAddress, addHostRoute, addNeighbour, configureLink, raiseLink } from "./link.ts";

/** For the tests: an attached cell in a folder of its own, and a guest whose network stack is a real kernel's. */

export interface TestCell extends AsyncDisposable {
  readonly attachment: Attachment;
  readonly stateDir: string;
}

export function attachTestCell(ports: readonly number[]): TestCell {
  const stateDir = mkdtempSync(join(tmpdir(), "forge-mesh-"));
  const cellId = `cell_${randomBytes(8).toString("hex")}`;
  const prefix = newInstallationPrefix();
  const address = cellAddress(prefix, 7, newCellIdentifier());
  const attachment = attach({ cellId, address, gateway: gatewayAddress(prefix), allow: { ports }, stateDir });
  return {
    attachment,
    stateDir,
    async [Symbol.asyncDispose]() {
      detach(cellId, stateDir);
      rmSync(stateDir, { recursive: true });
    },
  };
}

export interface TestGuest extends AsyncDisposable {
  readonly netnsPath: string;
  /** Serves TCP on the guest's address. */
  serve(port: number, onConnection: (socket: Socket) => void): Promise<Server>;
}

/** Plays the VMM and the guest: a second namespace with a tap of its own, and a process that carries frames between both. */
export async function startTestGuest({ attachment, stateDir }: TestCell): Promise<TestGuest> {
  const netnsPath = join(stateDir, "guest-netns");
  const guestTap = createNetns(netnsPath, () => {
    const fd = openTap("eth0", { persist: false });
    const index = interfaceIndex("eth0")!;
    netlinkRequest([
      configureLink(index, { mac: attachment.guestMac, mtu: attachment.mtu }),
      raiseLink(index),
      addAddress(index, attachment.address),
      addNeighbour(index, attachment.gateway, attachment.gatewayMac),
      addHostRoute(index, attachment.gateway, attachment.address),
    ]);
    return fd;
  });
  const cellTap = attachment.openTap();
  const carrier = startCarrier(cellTap, guestTap);
  closeSync(cellTap);
  closeSync(guestTap);
  const servers: Server[] = [];
  return {
    netnsPath,
    serve(port, onConnection) {
      const fd = inNetns(netnsPath, () => listenTcp(attachment.address, port, { reusePort: false }));
      const server = createServer((socket) => onConnection(socket.on("error", () => undefined)));
      servers.push(server);
      return new Promise((resolve) => server.listen({ fd }, () => resolve(server)));
    },
    async [Symbol.asyncDispose]() {
      for (const server of servers) server.close();
      await new Promise((resolve) => {
        carrier.once("exit", resolve);
        carrier.kill("SIGKILL");
      });
      removeNetns(netnsPath);
    },
  };
}

/** Frames go as they come: both taps carry the same virtio-net header. */
function startCarrier(left: number, right: number): ChildProcess {
  const program = `
    const { Worker, isMainThread } = require("node:worker_threads");
    const { readSync, writeSync } = require("node:fs");
    if (isMainThread) new Worker(__filename.startsWith("[") ? process.env.CARRIER : __filename, { eval: true });
    const [from, to] = isMainThread ? [3, 4] : [4, 3];
    const frame = Buffer.alloc(70000);
    for (;;) {
      const length = readSync(from, frame);
      try { writeSync(to, frame, 0, length); } catch (error) { if (error.code !== "EIO" && error.code !== "EINVAL") throw error; }
    }`;
  return spawn(process.execPath, ["-e", program], { env: { CARRIER: program }, stdio: ["ignore", "ignore", "inherit", left, right] });
}
