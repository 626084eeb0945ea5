import { closeSync, existsSync, mkdirSync, readFileSync, writeFileSync } from "node:fs";
import { ForgeError } from "../base/errors.ts";
import { createNetns, inNetns, interfaceIndex, isNetns, netlinkRequest, openTap, removeNetns } from "../base/linux.ts";
import { gatewayMac, guestMac, linkMtu } from "./address.ts";
import { addAddress, addHostRoute, addNeighbour, configureLink, deleteLink, raiseLink } from "./link.ts";
import { type CellCounters, countersOf, isPoliced, police, policedAddresses, setPorts } from "./policy.ts";
import { cellPath, namesIn, removeFolderIfEmpty, stateFolder } from "./state.ts";

/**
 * A cell's place in the network: a namespace with nothing in it but one tap, policed before it goes up. All of it is
 * kernel state that needs no process: it outlives the agent, and ends with `detach` (or the machine).
 */

export interface AttachOptions {
  readonly cellId: string;
  /** The cell's own IPv6 address. */
  readonly address: string;
  /** The address of the host's side of the tap. */
  readonly gateway: string;
  /** The TCP ports of the cell that may be connected to. */
  readonly allow: { readonly ports: readonly number[] };
  readonly stateDir: string;
}

export interface Attachment {
  readonly cellId: string;
  readonly address: string;
  readonly gateway: string;
  readonly netnsPath: string;
  readonly tapName: string;
  readonly guestMac: string;
  readonly gatewayMac: string;
  readonly mtu: number;
  /** A new descriptor of the tap (close-on-exec), to hand to the VMM; the caller closes it. One VMM at a time. */
  openTap(): number;
}

const tapName = "tap0";

/**
 * Makes the namespace, tap and policy of a cell. When it returns, nothing passes but what is allowed; when it throws,
 * nothing is left. CONFLICT where the cell is attached already.
 */
export function attach(options: AttachOptions): Attachment {
  const path = cellPath(options.stateDir, "netns", options.cellId);
  mkdirSync(stateFolder(options.stateDir, "netns"), { recursive: true, mode: 0o700 });
  if (existsSync(path)) throw new ForgeError("CONFLICT", `the cell ${options.cellId} is attached already`);
  createNetns(path, () => setUpNetns(options));
  return attachmentOf(options, path);
}

/** Takes the cell off the network at once, also while its VMM still holds the tap. Idempotent. */
export function detach(cellId: string, stateDir: string): void {
  const path = cellPath(stateDir, "netns", cellId);
  if (isNetns(path)) inNetns(path, deleteTap);
  removeNetns(path);
  removeFolderIfEmpty(stateFolder(stateDir, "netns"));
}

/** The identifiers of all attached cells, whole or half-made. */
export function listAttachments(stateDir: string): string[] {
  return namesIn(stateFolder(stateDir, "netns"));
}

/** After a restart of the agent or the machine: whole attachments come back as they are, others are undone. */
export function recover(stateDir: string): Attachment[] {
  const whole: Attachment[] = [];
  for (const cellId of listAttachments(stateDir)) {
    const path = cellPath(stateDir, "netns", cellId);
    const addresses = isNetns(path) ? inNetns(path, addressesIfWhole) : undefined;
    if (addresses === undefined) detach(cellId, stateDir);
    else whole.push(attachmentOf({ cellId, ...addresses }, path));
  }
  return whole;
}

/** Replaces the ports of an attached cell that may be connected to; open connections to a port that leaves are cut. */
export function updatePolicy(cellId: string, ports: readonly number[], stateDir: string): void {
  inTapNetns(cellId, stateDir, (index) => setPorts(index, ports));
}

/** What passed and what was dropped, and why, since the cell was attached. */
export function readCounters(cellId: string, stateDir: string): CellCounters {
  return inTapNetns(cellId, stateDir, countersOf);
}

function inTapNetns<T>(cellId: string, stateDir: string, body: (tapIndex: number) => T): T {
  const path = cellPath(stateDir, "netns", cellId);
  if (!isNetns(path)) throw new ForgeError("NOT_FOUND", `the cell ${cellId} is not attached`);
  return inNetns(path, () => body(tapIndex()));
}

function setUpNetns(options: AttachOptions): void {
  for (const [name, value] of Object.entries(quietNetwork)) writeFileSync(`/proc/sys/net/${name}`, value);
  closeSync(openTap(tapName, { persist: true }));
  const index = tapIndex();
  const mac = guestMac(options.cellId);
  netlinkRequest([configureLink(index, { mac: gatewayMac, mtu: linkMtu })]);
  police(index, { address: options.address, gateway: options.gateway, mac, gatewayMac });
  setPorts(index, options.allow.ports);
  // One request: a kill of the agent finds either all of it done or none.
  netlinkRequest([
    raiseLink(index),
    addAddress(index, options.gateway),
    addNeighbour(index, options.address, mac),
    addHostRoute(index, options.address, options.gateway),
  ]);
}

/**
 * A new namespace starts with the kernel's defaults or the host's values; these are the ones that could make it speak
 * unasked, learn from the cell, or route.
 */
const quietNetwork: Readonly<Record<string, string>> = {
  "ipv4/ip_forward": "0",
  "ipv6/conf/all/forwarding": "0",
  "ipv6/conf/default/forwarding": "0",
  "ipv6/conf/default/accept_ra": "0",
  "ipv6/conf/default/accept_redirects": "0",
  "ipv6/conf/default/autoconf": "0",
  "ipv6/conf/default/accept_dad": "0",
  "ipv6/conf/default/dad_transmits": "0",
  "ipv6/conf/default/router_solicitations": "0",
};

/** The addresses of an attachment whose every step was done: policed both ways, and the last request answered. */
function addressesIfWhole(): { address: string; gateway: string } | undefined {
  const index = interfaceIndex(tapName);
  if (index === undefined || !isPoliced(index)) return undefined;
  const isConfigured = readFileSync("/proc/thread-self/net/if_inet6", "latin1").includes(tapName);
  return isConfigured ? policedAddresses(index) : undefined;
}

function attachmentOf(cell: { cellId: string; address: string; gateway: string }, path: string): Attachment {
  return {
    cellId: cell.cellId,
    address: cell.address,
    gateway: cell.gateway,
    netnsPath: path,
    tapName,
    guestMac: guestMac(cell.cellId),
    gatewayMac,
    mtu: linkMtu,
    openTap: () => inNetns(path, openPolicedTap),
  };
}

/** Never makes a tap: one that is not there, or not policed, is refused. */
function openPolicedTap(): number {
  if (!isPoliced(tapIndex())) throw new ForgeError("INTERNAL", "the cell's tap has no policy");
  return openTap(tapName, { persist: true });
}

function deleteTap(): void {
  const index = interfaceIndex(tapName);
  if (index !== undefined) netlinkRequest([deleteLink(index)]);
}

function tapIndex(): number {
  const index = interfaceIndex(tapName);
  if (index === undefined) throw new ForgeError("NOT_FOUND", "the cell's tap is gone: it was detached");
  return index;
}
