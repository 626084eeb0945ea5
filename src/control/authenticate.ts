import { createHash, randomBytes, timingSafeEqual } from "node:crypto";
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

/** Checks tokens, and counts those that are not valid: by address, per minute, in bounded memory. */
export class Authenticator {
  readonly #control: Control;
  readonly #failures = new Map<string, number>();
  #minuteEndsMs = 0;

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
   * minute are in the log one by one, the rest as the count the next minute begins with.
   */
  async refuse(reason: string, address: string, route: string): Promise<void> {
    const earlier = this.#beginMinute();
    const count = (this.#failures.get(address) ?? 0) + 1;
    if (this.#failures.has(address) || this.#failures.size < maxAddresses) this.#failures.set(address, count);
    const records = count <= recordedFailures ? [{ reason, route, address }] : [];
    if (earlier > 0) records.unshift({ reason: `${earlier} more refusals in an earlier minute`, route: "any", address: "any" });
    if (records.length > 0) await this.#record(records);
    if (count > allowedFailures)
      throw new ForgeError("TOO_MANY_ATTEMPTS", `${count} requests with invalid tokens came from ${address} within a minute`);
  }

  /** Forgets the counts when a minute is over; returns how many failures the log has not told of. */
  #beginMinute(): number {
    if (Date.now() < this.#minuteEndsMs) return 0;
    this.#minuteEndsMs = Date.now() + 60_000;
    const untold = [...this.#failures.values()].reduce((sum, count) => sum + Math.max(count - recordedFailures, 0), 0);
    this.#failures.clear();
    return untold;
  }

  async #record(records: readonly { reason: string; route: string; address: string }[]): Promise<void> {
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

const maxAddresses = 4096;
/** Per address and minute. */
const recordedFailures = 5;
const allowedFailures = 30;
