import { withApi } from "./context.ts";
import type { Cli } from "./index.ts";

const verbs = {
  stop: { route: "stopService", said: "stopping; `forge start` runs it again" },
  start: { route: "startService", said: "starting; `forge ps` shows its cells" },
  rm: { route: "removeService", said: "removed; its cells are stopping" },
} as const;

/** `forge stop`, `start`, `rm`: one call each. The region does the work; `forge ps` shows how far it is. */
export async function change({ terminal, ...cli }: Cli, verb: keyof typeof verbs, service: string): Promise<void> {
  const { route, said } = verbs[verb];
  const done = await withApi(cli, (api) => api.call(route, { params: { name: service } }));
  terminal.document(done);
  terminal.print(`${service}: ${said}`);
}
