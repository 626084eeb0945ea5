import type { Event } from "../api/resources.ts";
import { withApi } from "./context.ts";
import type { Cli } from "./index.ts";
import type { Terminal } from "./terminal.ts";
import { displayWidth, printable } from "./text.ts";

/** `forge events`: the newest ones oldest first, or all after a sequence number; with --follow on and on. */
export async function events(cli: Cli, flags: { follow?: boolean; service?: string; limit?: number; after?: number }): Promise<void> {
  const query = {
    newest: String(flags.after === undefined),
    limit: flags.limit ?? 200,
    follow: String(flags.follow === true),
    ...(flags.after === undefined ? {} : { after: flags.after }),
    ...(flags.service === undefined ? {} : { service: flags.service }),
  };
  await withApi(cli, async (api) => {
    for await (const event of api.lines("listEvents", { query })) printEvent(cli.terminal, event);
  });
}

function printEvent(terminal: Terminal, event: Event): void {
  if (terminal.json) return terminal.jsonLine(event);
  const style = event.outcome === "success" ? "green" : "red";
  const details = Object.entries(event.details).map(([key, value]) => `${key}=${typeof value === "string" ? value : JSON.stringify(value)}`);
  const fields = [
    String(event.sequence).padStart(6),
    event.time.slice(0, 19).replace("T", " "),
    terminal.paint(style, event.outcome.padEnd(7)),
    pad(event.kind, 20),
    pad(event.subject, 20),
    terminal.paint("dim", printable(`by ${event.actor} ${details.join(" ")}`.trimEnd())),
  ];
  terminal.print(fields.join("  "));
}

function pad(text: string, width: number): string {
  const safe = printable(text);
  return safe + " ".repeat(Math.max(0, width - displayWidth(safe)));
}
