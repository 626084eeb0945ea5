/**
 * The one registry of error codes. A code is stable: scripts and auditors may match on it.
 * Each maps to one exit code of the CLI, one HTTP status of the API, and one remedy: what the reader can do.
 */

interface CodeEntry {
  /** Exit code of the CLI; 1 is kept for bugs, 2 for wrong usage. */
  readonly exit: number;
  readonly http: number;
  readonly remedy: string;
}

/** Exit codes by family, so that a script can tell whose turn it is. Documented in `forge help exit-codes`. */
export const exitFamilies = {
  0: "success",
  1: "a defect in Forge itself",
  2: "wrong usage or invalid input",
  3: "not found",
  4: "not allowed (authentication or role)",
  5: "refused by admission: image signature or integrity",
  6: "conflict with something that exists",
  7: "no room: memory, CPU, ports or disk",
  8: "a dependency is unavailable: control plane, database, node, audit log",
  9: "the cell or its guest failed",
  10: "this machine lacks something Forge needs",
} as const;

const registry = {
  INTERNAL: { exit: 1, http: 500, remedy: "This is a defect in Forge: please report it with the log of the control plane." },
  INVALID_INPUT: { exit: 2, http: 400, remedy: "Correct the named field and try again." },
  USAGE: { exit: 2, http: 400, remedy: "See `forge help` for the words this command takes." },
  MANIFEST_INVALID: {
    exit: 2,
    http: 400,
    remedy: "Correct the manifest at the named line; `forge deploy --dry-run` checks it without deploying.",
  },
  NOT_FOUND: { exit: 3, http: 404, remedy: "Check the name; the matching list command shows what exists." },
  UNAUTHENTICATED: {
    exit: 4,
    http: 401,
    remedy: "Present a valid API token: `forge up` leaves one for the local user, an owner makes more with `forge token create`.",
  },
  FORBIDDEN: { exit: 4, http: 403, remedy: "Ask an owner of the tenant for a token whose role allows this." },
  TOO_MANY_ATTEMPTS: {
    exit: 4,
    http: 429,
    remedy: "Too many requests with invalid tokens came from this address: wait a minute, and check the token.",
  },
  IMAGE_UNSIGNED: { exit: 5, http: 422, remedy: "Sign the image by its digest: `forge image sign`, or `cosign sign`." },
  IMAGE_SIGNATURE_UNTRUSTED: { exit: 5, http: 422, remedy: "Sign with a key the tenant trusts, or trust this key with `forge trust add`." },
  IMAGE_SIGNATURE_MISMATCH: {
    exit: 5,
    http: 422,
    remedy: "The signature belongs to another digest: the tag moved after signing. Sign what you mean to run.",
  },
  IMAGE_CORRUPT: { exit: 5, http: 422, remedy: "The bytes are not what their digest says: fetch or build the image again." },
  IMAGE_REFUSED: { exit: 5, http: 422, remedy: "The image holds an entry or a size Forge refuses; the message names it." },
  IMAGE_TAMPERED: {
    exit: 5,
    http: 422,
    remedy: "The prepared root file system changed on disk. Remove it from the node's cache and find out who changed it.",
  },
  IMAGE_NOT_FOUND: { exit: 3, http: 404, remedy: "Check the image reference: folder, archive, or registry name." },
  CONFLICT: { exit: 6, http: 409, remedy: "Something with this name exists or changed meanwhile: look at it and try again." },
  PORT_TAKEN: { exit: 7, http: 409, remedy: "Publish another port, or stop what listens on this one." },
  NO_ROOM: { exit: 7, http: 507, remedy: "Ask for less, stop something, or add a node: Forge never oversubscribes memory." },
  DISK_FULL: { exit: 7, http: 507, remedy: "Free disk space in the data folder; nothing acknowledged was lost." },
  TOO_LARGE: { exit: 2, http: 413, remedy: "The input is beyond the documented limit." },
  UNAVAILABLE: { exit: 8, http: 503, remedy: "Is the runtime up? `forge up` starts it; `forge doctor` says what is missing." },
  DATABASE_UNAVAILABLE: {
    exit: 8,
    http: 503,
    remedy: "The database does not answer: nothing was changed. See the log in the data folder.",
  },
  AUDIT_UNAVAILABLE: {
    exit: 8,
    http: 503,
    remedy: "The audit log cannot accept entries, so nothing may change. Free disk space or mend the database.",
  },
  AUDIT_BROKEN: {
    exit: 8,
    http: 500,
    remedy: "The audit chain does not verify: keep the data folder as it is and investigate the named entry.",
  },
  NODE_UNAVAILABLE: { exit: 8, http: 503, remedy: "The node that hosts this cell does not answer; its agent may be down." },
  TIMEOUT: { exit: 8, http: 504, remedy: "It took longer than its bound; try again, or raise the named limit." },
  CELL_FAILED: { exit: 9, http: 500, remedy: "See `forge logs` and `forge events` for this service." },
  GUEST_NOT_READY: {
    exit: 9,
    http: 504,
    remedy: "The guest booted but did not become ready in time: see `forge logs`, and the health check of the manifest.",
  },
  GUEST_PROTOCOL: { exit: 9, http: 502, remedy: "The guest sent what it must not; the cell is stopped. Treat its image as hostile." },
  EXEC_FAILED: { exit: 9, http: 500, remedy: "A program Forge relies on failed; its last words are in the message." },
  UNSUPPORTED: { exit: 10, http: 501, remedy: "`forge doctor` shows what this machine lacks and what that means." },
} as const satisfies Record<string, CodeEntry>;

export type ErrorCode = keyof typeof registry;
export const errorCodes: Readonly<Record<ErrorCode, CodeEntry>> = registry;

/** JSON form of an error: the body of every API error and of `--json` failures. */
export interface ErrorBody {
  readonly code: ErrorCode;
  readonly message: string;
  readonly remedy: string;
  readonly details?: Record<string, unknown>;
}

/** Every failure a person can meet. `message` says what happened; the remedy comes from the code. */
export class ForgeError extends Error {
  readonly code: ErrorCode;
  readonly details: Record<string, unknown> | undefined;

  constructor(code: ErrorCode, message: string, options: { details?: Record<string, unknown>; cause?: unknown } = {}) {
    super(message, options.cause === undefined ? undefined : { cause: options.cause });
    this.name = "ForgeError";
    this.code = code;
    this.details = options.details;
  }

  get exitCode(): number {
    return registry[this.code].exit;
  }

  get httpStatus(): number {
    return registry[this.code].http;
  }

  toBody(): ErrorBody {
    const body = { code: this.code, message: this.message, remedy: registry[this.code].remedy };
    return this.details === undefined ? body : { ...body, details: this.details };
  }

  /** The error an API body describes; an unknown code (a newer server) becomes INTERNAL with its own words. */
  static fromBody(body: { code: string; message: string; details?: Record<string, unknown> | undefined }): ForgeError {
    const code = body.code in registry ? (body.code as ErrorCode) : "INTERNAL";
    return new ForgeError(code, body.message, body.details === undefined ? {} : { details: body.details });
  }
}

/** Wraps anything thrown. A full disk keeps its meaning however deep it was met. */
export function toForgeError(thrown: unknown): ForgeError {
  if (thrown instanceof ForgeError) return thrown;
  const code = errnoOf(thrown);
  if (code === "ENOSPC" || code === "EDQUOT") return new ForgeError("DISK_FULL", "no space left on the device", { cause: thrown });
  const message = thrown instanceof Error ? thrown.message : String(thrown);
  return new ForgeError("INTERNAL", message, { cause: thrown });
}

/** The errno name ("ENOENT") of a Node system error, or undefined. */
export function errnoOf(thrown: unknown): string | undefined {
  if (typeof thrown !== "object" || thrown === null || !("code" in thrown)) return undefined;
  return typeof thrown.code === "string" ? thrown.code : undefined;
}
