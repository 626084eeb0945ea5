import { sql } from "kysely";
import { ForgeError } from "../base/errors.ts";
import { type ImageStore, maximumBlobBytes } from "../isocell/image/index.ts";
import { type Database, query, transact } from "./db/database.ts";

/**
 * How many bytes of images one tenant may keep: enough for hundreds of services with a few releases each, and little
 * enough that no single tenant's mistake fills a region's disk. A blob counts once for each tenant that brought it.
 */
export const tenantQuotaBytes = 256 * 1024 ** 3;

/** What a tenant's uploads under way have added, so that together they do not pass the quota either. */
interface Account {
  readonly storedBytes: Promise<number>;
  addedBytes: number;
  uploads: number;
}

/**
 * The tenants' blobs, on one store. Bytes are stored once, but a tenant has only what it brought itself: a digest alone
 * opens nothing, and nobody learns from an answer whether somebody else has a blob.
 */
export class TenantBlobs {
  readonly #db: Database;
  readonly #store: ImageStore;
  readonly #quotaBytes: number;
  readonly #accounts = new Map<string, Account>();

  constructor(db: Database, store: ImageStore, quotaBytes = tenantQuotaBytes) {
    this.#db = db;
    this.#store = store;
    this.#quotaBytes = quotaBytes;
  }

  /** Stores a blob as the tenant's; resolves when bytes and record are durable. Storing it again is fine. */
  async put(tenantId: string, digest: string, source: AsyncIterable<Uint8Array>): Promise<void> {
    await this.#within(tenantId, async (charge) => {
      const isNew = !(await this.#own(tenantId, [digest])).has(digest);
      await this.#store.putBlob(digest, isNew ? charged(source, charge) : source, { maxBytes: maximumBlobBytes });
      return this.#claim(tenantId, [digest]);
    });
  }

  /** Fetches an image as the tenant's. How large it is shows only afterwards, so there must be room for the largest. */
  async pull<T extends { readonly digest: string }>(tenantId: string, fetch: () => Promise<T>): Promise<T> {
    let image: T | undefined;
    await this.#within(tenantId, async (charge) => {
      charge(maximumBlobBytes);
      image = await fetch();
      return this.#claim(tenantId, await this.#partsOf(image.digest, async () => undefined));
    });
    return image as T;
  }

  /** Those of the digests that the tenant has to upload, each once. */
  async missing(tenantId: string, digests: readonly string[]): Promise<string[]> {
    const own = await this.#own(tenantId, digests);
    const lost = new Set(await this.#store.missing([...own]));
    return [...new Set(digests)].filter((digest) => !own.has(digest) || lost.has(digest));
  }

  /**
   * Every blob a node will ask for to run the image, and their size. IMAGE_NOT_FOUND for what the tenant did not bring,
   * before a byte of it is looked at. A missing or altered blob is found now, not when a cell waits for it.
   */
  async read(tenantId: string, digest: string): Promise<{ blobs: string[]; sizeBytes: number }> {
    const blobs = await this.#partsOf(digest, async (digests) => {
      const own = await this.#own(tenantId, digests);
      const foreign = digests.find((each) => !own.has(each));
      if (foreign !== undefined) throw new ForgeError("IMAGE_NOT_FOUND", `the blob ${foreign} was not pushed by this tenant`);
    });
    const { sizeBytes } = await this.#store.readManifest(digest);
    return { blobs, sizeBytes };
  }

  /** The image's document, manifest, configuration and layers; `check` comes before what it is given is read. */
  async #partsOf(digest: string, check: (digests: readonly string[]) => Promise<void>): Promise<string[]> {
    await check([digest]);
    const manifestDigest = await this.#store.resolvePlatform(digest);
    await check([manifestDigest]);
    const parts = await this.#store.references(manifestDigest);
    await check(parts);
    return [...new Set([digest, manifestDigest, ...parts])];
  }

  /** Runs an upload within the tenant's quota; it returns how many bytes the tenant has more than before. */
  async #within(tenantId: string, upload: (charge: (bytes: number) => void) => Promise<number>): Promise<void> {
    const account = this.#accounts.get(tenantId) ?? { storedBytes: this.#storedBytes(tenantId), addedBytes: 0, uploads: 0 };
    this.#accounts.set(tenantId, account);
    account.uploads++;
    let [charged, kept] = [0, 0];
    try {
      const storedBytes = await account.storedBytes;
      kept = await upload((bytes) => {
        charged += bytes;
        account.addedBytes += bytes;
        if (storedBytes + account.addedBytes > this.#quotaBytes)
          throw new ForgeError("TOO_LARGE", `the tenant's images would hold more than ${this.#quotaBytes} bytes`);
      });
    } finally {
      account.addedBytes += kept - charged;
      if (--account.uploads === 0) this.#accounts.delete(tenantId);
    }
  }

  async #storedBytes(tenantId: string): Promise<number> {
    const { rows } = await query(
      sql<{ bytes: number }>`select coalesce(sum(size_bytes), 0)::bigint as bytes from tenant_blobs where tenant_id = ${tenantId}`.execute(
        this.#db,
      ),
    );
    return rows[0]?.bytes ?? 0;
  }

  /** Records stored blobs as the tenant's; returns the bytes of those that were not yet. */
  async #claim(tenantId: string, digests: readonly string[]): Promise<number> {
    const sizes = await Promise.all(digests.map(async (digest) => ({ digest, bytes: (await this.#store.blobSize(digest)) ?? 0 })));
    const rows = sizes.map(({ digest, bytes }) => ({ tenant_id: tenantId, digest, size_bytes: bytes }));
    const added = await transact(this.#db, (trx) =>
      trx
        .insertInto("tenant_blobs")
        .values(rows)
        .onConflict((on) => on.doNothing())
        .returning("size_bytes")
        .execute(),
    );
    return added.reduce((sum, row) => sum + row.size_bytes, 0);
  }

  async #own(tenantId: string, digests: readonly string[]): Promise<Set<string>> {
    if (digests.length === 0) return new Set();
    const rows = await query(
      this.#db.selectFrom("tenant_blobs").select("digest").where("tenant_id", "=", tenantId).where("digest", "in", digests).execute(),
    );
    return new Set(rows.map((row) => row.digest));
  }
}

async function* charged(source: AsyncIterable<Uint8Array>, charge: (bytes: number) => void): AsyncGenerator<Uint8Array> {
  for await (const chunk of source) {
    charge(chunk.length);
    yield chunk;
  }
}
