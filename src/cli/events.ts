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
  const fields = [
    String(event.sequence).padStart(6),
    event.time.slice(0, 19).replace("T", " "),
    terminal.paint(style, event.outcome.padEnd(7)),
    pad(event.kind, 20),
    pad(shorten(event.subject), 20),
    terminal.paint("dim", printable(`by ${event.actor} ${describeDetails(event.details)}`.trimEnd())),
  ];
  terminal.print(fields.join("  "));
}

/** A node's own chain entry (`origin`) is for machines: --json has it. */
function describeDetails(details: Event["details"]): string {
  const shown = Object.entries(details).filter(([key]) => key !== "origin");
  return shown.map(([key, value]) => `${key}=${shorten(typeof value === "string" ? value : JSON.stringify(value))}`).join(" ");
}

/** Digests and identifiers as `forge ps` shows them. */
function shorten(text: string): string {
  return text.replace(/(sha256:)?\b([0-9a-f]{12})[0-9a-f]{52}\b/g, "$2").replace(/\bcell_[0-9a-z]{16}([0-9a-z]{8})\b/g, "$1");
}

function pad(text: string, width: number): string {
  const safe = printable(text);
  return safe + " ".repeat(Math.max(0, width - displayWidth(safe)));
}
