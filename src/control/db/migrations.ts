import { createHash } from "node:crypto";
import { sql } from "kysely";
import { ForgeError } from "../../base/errors.ts";
import { type Database, transact, type Trx } from "./database.ts";

interface Migration {
  readonly name: string;
  readonly statements: string;
}

/** Forward only: a migration that was released is never edited (its checksum is kept), a new one is added instead. */
export const migrations: readonly Migration[] = [
  {
    name: "0001-first-cell",
    statements: `
      create table installation (
        id int primary key check (id = 1),
        region text not null,
        prefix text not null,
        audit_public_key_pem text not null,
        created_at timestamptz not null default now()
      );

      create table tenants (
        id text primary key,
        name text not null unique,
        network int not null unique check (network between 1 and 65535),
        created_at timestamptz not null default now()
      );

      create table tokens (
        id text primary key,
        tenant_id text references tenants,
        name text not null,
        role text not null check (role in ('owner', 'developer', 'auditor', 'operator')),
        secret_hash bytea not null,
        created_at timestamptz not null default now(),
        expires_at timestamptz,
        last_used_at timestamptz,
        unique nulls not distinct (tenant_id, name),
        check ((role = 'operator') = (tenant_id is null))
      );

      create table trusted_keys (
        tenant_id text not null references tenants,
        name text not null,
        public_key_pem text not null,
        fingerprint text not null,
        created_at timestamptz not null default now(),
        primary key (tenant_id, name),
        unique (tenant_id, fingerprint)
      );

      create table images (
        tenant_id text not null references tenants,
        digest text not null,
        reference text not null,
        size_bytes bigint not null,
        signed_by text not null,
        signatures jsonb not null,
        blobs jsonb not null,
        created_at timestamptz not null default now(),
        primary key (tenant_id, digest)
      );

      create table services (
        id text primary key,
        tenant_id text not null references tenants,
        name text not null,
        jurisdiction text not null,
        revision int not null,
        desired text not null check (desired in ('running', 'stopped')),
        created_at timestamptz not null default now(),
        updated_at timestamptz not null default now(),
        unique (tenant_id, name)
      );

      create table revisions (
        tenant_id text not null references tenants,
        service_id text not null references services on delete cascade,
        revision int not null,
        spec jsonb not null,
        image_digest text not null,
        image_reference text not null,
        signed_by text not null,
        primary key (service_id, revision)
      );

      create table nodes (
        id text primary key,
        name text not null unique,
        jurisdiction text not null,
        site text not null,
        rack text not null,
        vmm text not null,
        emulated boolean not null,
        profile text not null check (profile in ('development', 'production')),
        vcpus int not null,
        memory_mib int not null,
        generation int not null default 1,
        certificate_fingerprint text not null,
        spool_public_key_pem text not null,
        spool_sequence int not null default 0,
        spool_hash text not null,
        last_seen_at timestamptz not null default now(),
        created_at timestamptz not null default now()
      );

      create table node_tenants (
        node_id text not null references nodes,
        tenant_id text not null references tenants,
        primary key (node_id, tenant_id)
      );

      create table join_tokens (
        secret_hash bytea primary key,
        csr_digest bytea,
        node_id text references nodes,
        expires_at timestamptz not null
      );

      create table cells (
        id text primary key,
        tenant_id text not null references tenants,
        service_id text references services on delete set null,
        service_name text not null,
        jurisdiction text not null,
        revision int not null,
        image_digest text not null,
        memory_mib int not null check (memory_mib > 0),
        vcpus int not null check (vcpus > 0),
        publish int[] not null,
        node_id text references nodes,
        address text unique,
        desired text not null check (desired in ('pending', 'running', 'stopped', 'removed')),
        holds_room boolean not null default false,
        state text not null,
        reason text,
        measurement text,
        vmm text,
        emulated boolean,
        restarts int not null default 0,
        exit_status int,
        started_at timestamptz,
        phases jsonb not null default '{}',
        published jsonb not null default '[]',
        created_at timestamptz not null default now()
      );
      create index cells_by_service on cells (service_id);
      create index cells_by_node on cells (node_id);
      create index cells_by_tenant on cells (tenant_id);

      create table jobs (
        id text primary key,
        tenant_id text not null references tenants,
        cell_id text not null unique references cells on delete cascade,
        step text,
        failure jsonb,
        attempts int not null default 0,
        run_at timestamptz not null default now(),
        lease_owner text,
        lease_until timestamptz,
        deadline_at timestamptz,
        created_at timestamptz not null default now()
      );
      create index jobs_by_time on jobs (run_at);

      create table log_head (
        id int primary key check (id = 1),
        sequence bigint not null,
        hash text not null,
        time timestamptz not null
      );
      insert into log_head values (1, 0, repeat('0', 64), 'epoch');

      create table log_entries (
        sequence bigint primary key,
        previous text not null,
        event text not null,
        hash text not null,
        signature text not null,
        tenant_id text,
        service text
      );
      create index log_entries_by_tenant on log_entries (tenant_id, sequence);
      create index log_entries_by_service on log_entries (tenant_id, service, sequence);
    `,
  },
  {
    // Images admitted before keep running; the next push of one of them sends its blobs once more.
    name: "0002-blobs-of-tenants",
    statements: `
      create table tenant_blobs (
        tenant_id text not null references tenants,
        digest text not null,
        size_bytes bigint not null,
        primary key (tenant_id, digest)
      );
    `,
  },
];

/** Any number that nothing else in this database uses for an advisory lock. */
const migrationLock = 4_067_283_901;

/** Brings the database to this version; several processes may ask at once. A newer or altered history is refused. */
export async function migrate(db: Database): Promise<void> {
  await transact(db, async (trx) => {
    await sql`select pg_advisory_xact_lock(${sql.lit(migrationLock)})`.execute(trx);
    await sql`create table if not exists migrations (name text primary key, checksum text not null, applied_at timestamptz not null default now())`.execute(
      trx,
    );
    const { rows } = await sql<{ name: string; checksum: string }>`select name, checksum from migrations order by name`.execute(trx);
    const applied = new Map(rows.map((row) => [row.name, row.checksum]));
    for (const migration of migrations) {
      const known = applied.get(migration.name);
      if (known === undefined) await apply(trx, migration);
      else if (known !== checksum(migration))
        throw unsupported(`the migration ${migration.name} is not the one this database was made with`);
      applied.delete(migration.name);
    }
    const [unknown] = applied.keys();
    if (unknown !== undefined) throw unsupported(`the database was made by a newer Forge: it has the migration ${unknown}`);
  });
}

async function apply(trx: Trx, migration: Migration): Promise<void> {
  await sql.raw(migration.statements).execute(trx);
  await sql`insert into migrations (name, checksum) values (${migration.name}, ${checksum(migration)})`.execute(trx);
}

function checksum(migration: Migration): string {
  return createHash("sha256").update(migration.statements).digest("hex");
}

function unsupported(message: string): ForgeError {
  return new ForgeError("UNSUPPORTED", message);
}
