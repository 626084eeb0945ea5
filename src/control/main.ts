import { join } from "node:path";
import type { FastifyInstance } from "fastify";
import { systemClock } from "../base/clock.ts";
import { removeDurable, writeDurable } from "../base/durable.ts";
import { errnoOf, ForgeError } from "../base/errors.ts";
import { createLogger, type Logger } from "../base/log.ts";
import { ImageStore } from "../isocell/image/index.ts";
import { issueServerCertificate } from "../mesh/index.ts";
import { appendEvents } from "./audit-log.ts";
import { TenantBlobs } from "./blobs.ts";
import { bootstrap, startedFact, stoppedFact } from "./bootstrap.ts";
import type { Control } from "./context.ts";
import { type Database, openDatabase, transact } from "./db/database.ts";
import { migrate } from "./db/migrations.ts";
import { Wakes } from "./db/wakes.ts";
import { createNodeServer } from "./node-server.ts";
import { type Cluster, openCluster } from "./postgres.ts";
import { dropPrivileges } from "./privileges.ts";
import { Reconciler } from "./reconcile.ts";
import { createApiServer, loadLazyParts } from "./server.ts";
import { SessionBroker } from "./sessions.ts";

export interface ControlOptions {
  readonly dataDir: string;
  readonly apiAddress: string;
  readonly apiPort: number;
  readonly nodePort: number;
  readonly region: string;
  readonly jurisdiction: string;
  /** An HA PostgreSQL instead of our own cluster. */
  readonly databaseUrl?: string;
}

/** How long an orderly stop may take before the process ends all the same: nothing acknowledged depends on it. */
const stopBoundMs = 20_000;

/** The control plane, from start to an orderly end on SIGTERM or SIGINT. */
export async function runControl(options: ControlOptions): Promise<void> {
  const log = createLogger("control");
  await loadLazyParts(); // the program's own files may be root's alone
  const folder = await dropPrivileges(options.dataDir);
  const running = await startControl(folder, options, log);
  const readyPath = join(folder, "run", "ready.json");
  await writeDurable(readyPath, JSON.stringify({ pid: process.pid, apiPort: running.apiPort, nodePort: running.nodePort }));
  log.info({ apiPort: running.apiPort, nodePort: running.nodePort }, "ready");
  const signal = await stopSignal();
  log.info({ signal }, "stopping");
  setTimeout(() => process.exit(1), stopBoundMs).unref();
  await removeDurable(readyPath);
  await running.stop();
}

export interface RunningControl {
  readonly control: Control;
  readonly apiPort: number;
  readonly nodePort: number;
  stop(): Promise<void>;
  /** Leaves the jobs to another runner. */
  stopReconciler(): Promise<void>;
}

/** The wiring: every part the control plane is made of, in the order they need one another. */
export async function startControl(folder: string, options: ControlOptions, log: Logger): Promise<RunningControl> {
  const cluster = options.databaseUrl === undefined ? await openCluster({ folder }) : undefined;
  const address = cluster?.address ?? { url: options.databaseUrl ?? "" };
  const db = openDatabase(address);
  await migrate(db);
  const foundation = await bootstrap(folder, db, { region: options.region });
  const wakes = new Wakes(address, () => cluster?.ensureRunning() ?? Promise.resolve(), systemClock, log);
  await wakes.open();
  const images = await ImageStore.open(join(folder, "blobs"));
  const blobs = new TenantBlobs(db, images);
  const control: Control = { db, wakes, ...foundation, images, blobs, sessions: new SessionBroker(), clock: systemClock, log };
  await transact(db, (trx) => appendEvents(trx, control.signer, [startedFact()]));

  const names = ["localhost", "127.0.0.1", "::1", "forge.local", options.apiAddress];
  const identity = await issueServerCertificate(foundation.authority, { names: [...new Set(names)] });
  const api = await createApiServer(control, identity);
  const nodes = await createNodeServer(control, identity);
  const reconciler = new Reconciler(control);
  await listen(api, options.apiAddress, options.apiPort);
  await listen(nodes, options.apiAddress, options.nodePort);
  reconciler.start();
  const stopReconciler = (): Promise<void> => reconciler.stop();
  return {
    control,
    apiPort: portOf(api),
    nodePort: portOf(nodes),
    stopReconciler,
    stop: () => stopAll({ control, api, nodes, reconciler, db, wakes, cluster }),
  };
}

async function listen(app: FastifyInstance, host: string, port: number): Promise<void> {
  await app.listen({ host, port }).catch((error: unknown) => {
    if (errnoOf(error) !== "EADDRINUSE") throw error;
    throw new ForgeError("PORT_TAKEN", `the control plane cannot listen on ${host} port ${port}: another program does`);
  });
}

interface Parts {
  readonly control: Control;
  readonly api: FastifyInstance;
  readonly nodes: FastifyInstance;
  readonly reconciler: Reconciler;
  readonly db: Database;
  readonly wakes: Wakes;
  readonly cluster: Cluster | undefined;
}

/** In the reverse order of the start. */
async function stopAll({ control, api, nodes, reconciler, db, wakes, cluster }: Parts): Promise<void> {
  await Promise.all([api.close(), nodes.close()]);
  await reconciler.stop();
  await transact(db, (trx) => appendEvents(trx, control.signer, [stoppedFact()])).catch((error: unknown) =>
    control.log.warn({ err: error }, "the end could not be recorded"),
  );
  await wakes.close();
  await db.destroy();
  await cluster?.stop();
}

function portOf(app: FastifyInstance): number {
  const address = app.server.address();
  return typeof address === "object" && address !== null ? address.port : 0;
}

async function stopSignal(): Promise<NodeJS.Signals> {
  return new Promise((resolve) => {
    for (const signal of ["SIGTERM", "SIGINT"] as const) process.once(signal, () => resolve(signal));
  });
}
