import { createHash, randomBytes, timingSafeEqual } from "node:crypto";
import { isIPv6 } from "node:net";
import { sql } from "kysely";
import type { Role } from "../api/resources.ts";
import { ForgeError } from "../base/errors.ts";
import { encodeBase32, newId } from "../base/ids.ts";
import { appendEvents } from "./audit-log.ts";
import type { Control } from "./context.ts";
import { query, transact } from "./db/database.ts";

/** Who asks. Only the platform's operator has no tenant. */
export interface Caller {
  readonly tokenId: string;
  readonly tokenName: string;
  readonly role: Role;
  readonly tenantId: string | null;
  readonly tenantName: string | null;
  /** As the log names them. */
  readonly actor: string;
}

const tokenPattern = /^Bearer forge_(tok_[0-9a-z]{24})_([0-9a-z]{52})$/;

/** The text a person keeps, and what of it the database keeps. The secret has 256 random bits. */
export function newToken(): { id: string; text: string; secretHash: Buffer } {
  const id = newId("tok");
  const secret = encodeBase32(randomBytes(32));
  return { id, text: `forge_${id}_${secret}`, secretHash: hashSecret(secret) };
}

/** A secret without a role: for joining once. */
export function newJoinToken(): { text: string; secretHash: Buffer } {
  const text = `join_${encodeBase32(randomBytes(32))}`;
  return { text, secretHash: hashSecret(text) };
}

export function hashSecret(secret: string): Buffer {
  return createHash("sha256").update(secret).digest();
}

/** Checks tokens, and counts those that are not valid: by where they come from, per minute, in bounded memory. */
export class Authenticator {
  readonly #control: Control;
  readonly #failures = new Map<string, number>();
  #minuteEndsMs = 0;
  #recorded = 0;
  /** Failures that the log has not told of one by one, and not summed yet. */
  #untold = 0;

  constructor(control: Control) {
    this.#control = control;
  }

  /** The caller behind an Authorization header. A valid token is always heard, however many others failed. */
  async authenticate(header: string | undefined, address: string, route: string): Promise<Caller> {
    const match = header === undefined ? null : tokenPattern.exec(header);
    const caller = match === null ? undefined : await this.#findCaller(match[1] ?? "", match[2] ?? "");
    if (typeof caller === "object") return caller;
    const reason = caller ?? (header === undefined ? "no token" : "malformed token");
    await this.refuse(reason, address, route);
    throw new ForgeError("UNAUTHENTICATED", reason === "no token" ? "this needs an API token" : `the API token was refused: ${reason}`);
  }

  async #findCaller(id: string, secret: string): Promise<Caller | "unknown token" | "expired token"> {
    const row = await query(
      this.#control.db
        .selectFrom("tokens as token")
        .leftJoin("tenants as tenant", "tenant.id", "token.tenant_id")
        .select([
          "token.id",
          "token.name",
          "token.role",
          "token.tenant_id",
          "token.secret_hash",
          "token.last_used_at",
          "tenant.name as tenant_name",
        ])
        .select(sql<boolean>`coalesce(token.expires_at <= now(), false)`.as("expired"))
        .where("token.id", "=", id)
        .executeTakeFirst(),
    );
    if (row === undefined || !timingSafeEqual(hashSecret(secret), row.secret_hash)) return "unknown token";
    if (row.expired) return "expired token";
    if (Date.now() - (row.last_used_at?.getTime() ?? 0) > 60_000) await this.#noteUse(id);
    return {
      tokenId: row.id,
      tokenName: row.name,
      role: row.role,
      tenantId: row.tenant_id,
      tenantName: row.tenant_name,
      actor: `token/${row.name}`,
    };
  }

  async #noteUse(id: string): Promise<void> {
    const update = sql`update tokens set last_used_at = now() from set_config('synchronous_commit', 'off', true) where id = ${id}`;
    await query(update.execute(this.#control.db));
  }

  /**
   * Counts and records a refusal of somebody unknown; throws TOO_MANY_ATTEMPTS when there were too many. The first of a
   * minute are in the log one by one, the rest as a sum: who has no token must not fill a log that is kept for ever.
   */
  async refuse(reason: string, address: string, route: string): Promise<void> {
    const records = this.#beginMinute();
    const source = this.#sourceOf(address);
    const count = (this.#failures.get(source) ?? 0) + 1;
    this.#failures.set(source, count);
    if (count <= recordedFailures && this.#recorded < maxRecorded) {
      this.#recorded++;
      records.push({ reason, route, address });
    } else this.#untold++;
    if (records.length > 0) await this.#record(records);
    if (count > allowedFailures)
      throw new ForgeError("TOO_MANY_ATTEMPTS", `${count} requests with invalid tokens came from ${source} within a minute`);
  }

  /** Forgets the counts when a minute is over; returns the sum of the failures that the log has not told of. */
  #beginMinute(): FailureRecord[] {
    const nowMs = this.#control.clock.monotonicMs();
    if (nowMs < this.#minuteEndsMs) return [];
    const untold = this.#untold;
    this.#minuteEndsMs = nowMs + 60_000;
    this.#failures.clear();
    this.#recorded = 0;
    this.#untold = 0;
    return untold === 0 ? [] : [{ reason: `${untold} more refusals in an earlier minute`, route: "any", address: "any" }];
  }

  /** Whom an address counts as. Those that come when the table is full count as one. */
  #sourceOf(address: string): string {
    const source = isIPv6(address) ? networkOf(address) : address;
    return this.#failures.has(source) || this.#failures.size < maxSources ? source : "many addresses";
  }

  async #record(records: readonly FailureRecord[]): Promise<void> {
    const facts = records.map((details) => ({
      tenant: null,
      kind: "auth.denied" as const,
      actor: "anonymous",
      outcome: "denied" as const,
      subject: `address/${details.address}`,
      details,
    }));
    await transact(this.#control.db, (trx) => appendEvents(trx, this.#control.signer, facts));
  }
}

type FailureRecord = Readonly<Record<"reason" | "route" | "address", string>>;

/** The /64 of an IPv6 address, which one machine has whole (RFC 4291, 2.5.4); of a mapped one, the IPv4 address. */
function networkOf(address: string): string {
  const mapped = /^::ffff:([0-9.]+)$/i.exec(address)?.[1];
  if (mapped !== undefined) return mapped;
  const [left = [], right = []] = address.split("::").map((side) => side.split(":").filter((group) => group !== ""));
  const zeros = Array.from({ length: Math.max(8 - left.length - right.length, 0) }, () => "0");
  const groups = [...left, ...zeros, ...right].slice(0, 4).map((group) => Number.parseInt(group, 16).toString(16));
  return `${groups.join(":")}::/64`;
}

const maxSources = 4096;
/** Per source and minute. */
const recordedFailures = 5;
const allowedFailures = 30;
/** Per minute, of all sources. */
const maxRecorded = 200;
