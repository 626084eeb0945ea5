import type { Signer } from "../audit/index.ts";
import type { Clock } from "../base/clock.ts";
import type { Logger } from "../base/log.ts";
import type { ImageStore } from "../isocell/image/index.ts";
import type { Authority } from "../mesh/index.ts";
import type { TenantBlobs } from "./blobs.ts";
import type { Database } from "./db/database.ts";
import type { Wakes } from "./db/wakes.ts";
import type { SessionBroker } from "./sessions.ts";

/** Everything a handler or a step works with; wired once, in main.ts. */
export interface Control {
  readonly db: Database;
  readonly wakes: Wakes;
  readonly signer: Signer;
  /** Every tenant's blobs, for what was admitted; `blobs` decides what a tenant may admit. */
  readonly images: ImageStore;
  readonly blobs: TenantBlobs;
  readonly authority: Authority;
  readonly installation: Installation;
  readonly sessions: SessionBroker;
  readonly clock: Clock;
  readonly log: Logger;
}

export interface Installation {
  readonly region: string;
  /** The RFC 4193 /48 all addresses come from. */
  readonly prefix: string;
}
