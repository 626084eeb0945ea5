import { sql } from "kysely";
import { ForgeError } from "../base/errors.ts";
import type { Database, Trx } from "./db/database.ts";

/** What one cell asks of a node. */
export interface Need {
  readonly jurisdiction: string;
  readonly memoryMib: number;
  readonly vcpus: number;
  readonly publish: readonly number[];
  /** Cells of one service may share a published port. */
  readonly serviceId: string;
}

/** What a node still has. */
export interface Room {
  readonly nodeId: string;
  readonly nodeName: string;
  readonly jurisdiction: string;
  readonly profile: "development" | "production";
  readonly reachable: boolean;
  memoryFreeMib: number;
  vcpusFree: number;
  /** Published ports in use, and by which service. */
  readonly ports: Map<number, string>;
  /** How many cells of each service are here: replicas spread. */
  readonly services: Map<string, number>;
}

/** A node that said nothing for this long gets no new cells. */
export const unreachableAfterMs = 60_000;

/**
 * The room of every node. `leaving: "count"` is what is free this moment; `"ignore"` also counts as free what stopping
 * cells will soon give back. With `lock`, nobody else places until this transaction ends.
 */
export async function readRooms(db: Database | Trx, options: { leaving: "count" | "ignore"; lock?: boolean }): Promise<Room[]> {
  const select = db
    .selectFrom("nodes")
    .select(["id", "name", "jurisdiction", "profile", "vcpus", "memory_mib", "last_seen_at"])
    .orderBy("id");
  const nodes = await (options.lock === true ? select.forUpdate() : select).execute();
  const cells = await db
    .selectFrom("cells")
    .select(["node_id", "memory_mib", "vcpus", "publish", sql<string>`coalesce(service_id, id)`.as("service")])
    .where("holds_room", "=", true)
    .$if(options.leaving === "ignore", (q) => q.where("desired", "in", ["pending", "running"]))
    .execute();
  const rooms = new Map<string, Room>();
  for (const node of nodes) {
    rooms.set(node.id, {
      nodeId: node.id,
      nodeName: node.name,
      jurisdiction: node.jurisdiction,
      profile: node.profile,
      reachable: Date.now() - node.last_seen_at.getTime() < unreachableAfterMs,
      memoryFreeMib: node.memory_mib,
      vcpusFree: node.vcpus,
      ports: new Map(),
      services: new Map(),
    });
  }
  for (const cell of cells) {
    const room = rooms.get(cell.node_id ?? "");
    if (room !== undefined) occupy(room, { memoryMib: cell.memory_mib, vcpus: cell.vcpus, publish: cell.publish, serviceId: cell.service });
  }
  return [...rooms.values()];
}

/**
 * The best node for a cell: fewest cells of the same service, then most free memory. Memory is never oversubscribed;
 * CPUs are shared in the development profile only. NO_ROOM or PORT_TAKEN name what was asked and what there is.
 */
export function pickRoom(rooms: readonly Room[], need: Need): Room {
  const here = rooms.filter((room) => isWithin(room.jurisdiction, need.jurisdiction));
  if (here.length === 0) throw noRoom(need, `no node is in the jurisdiction ${need.jurisdiction}`);
  const reachable = here.filter((room) => room.reachable);
  if (reachable.length === 0) throw noRoom(need, `no node of the jurisdiction ${need.jurisdiction} answers`);
  const roomy = reachable.filter((room) => fits(room, need));
  if (roomy.length === 0) throw noRoom(need, `free is ${reachable.map(describe).join("; ")}`);
  const open = roomy.filter((room) => takenPort(room, need) === undefined);
  const taken = roomy[0] === undefined ? undefined : takenPort(roomy[0], need);
  if (open.length === 0)
    throw new ForgeError("PORT_TAKEN", `port ${taken} is already published by another service on every node with room`, {
      details: { port: taken },
    });
  return open.reduce((best, room) => (isBetter(room, best, need.serviceId) ? room : best));
}

/** Reserves in the model; the caller writes it down. */
export function occupy(room: Room, need: Omit<Need, "jurisdiction">): void {
  room.memoryFreeMib -= need.memoryMib;
  room.vcpusFree -= need.vcpus;
  for (const port of need.publish) room.ports.set(port, need.serviceId);
  room.services.set(need.serviceId, (room.services.get(need.serviceId) ?? 0) + 1);
}

/** `de-by` lies within `de`. */
function isWithin(actual: string, asked: string): boolean {
  return actual === asked || actual.startsWith(`${asked}-`);
}

function fits(room: Room, need: Need): boolean {
  return room.memoryFreeMib >= need.memoryMib && (room.profile === "development" || room.vcpusFree >= need.vcpus);
}

function takenPort(room: Room, need: Need): number | undefined {
  return need.publish.find((port) => room.ports.has(port) && room.ports.get(port) !== need.serviceId);
}

function isBetter(room: Room, other: Room, serviceId: string): boolean {
  const difference = (room.services.get(serviceId) ?? 0) - (other.services.get(serviceId) ?? 0);
  return difference < 0 || (difference === 0 && room.memoryFreeMib > other.memoryFreeMib);
}

function noRoom(need: Need, words: string): ForgeError {
  return new ForgeError("NO_ROOM", `a cell with ${need.memoryMib} MiB and ${need.vcpus} vCPU was asked for: ${words}`, {
    details: { memoryMib: need.memoryMib, vcpus: need.vcpus, jurisdiction: need.jurisdiction },
  });
}

function describe(room: Room): string {
  const vcpus = room.profile === "production" ? ` and ${room.vcpusFree} vCPU` : "";
  return `${Math.max(room.memoryFreeMib, 0)} MiB${vcpus} on ${room.nodeName}`;
}
