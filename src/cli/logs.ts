import type { LogLine } from "../api/resources.ts";
import { withApi } from "./context.ts";
import type { Cli } from "./index.ts";
import type { Style, Terminal } from "./terminal.ts";
import { printable, shortId } from "./text.ts";

const cellStyles: readonly Style[] = ["cyan", "yellow", "green"];

/** `forge logs`: the service's own lines on stdout, each with its cell where there are several. */
export async function logs(
  cli: Cli,
  service: string,
  flags: { follow?: boolean; tail?: number; cell?: string; timestamps?: boolean },
): Promise<void> {
  await withApi(cli, async (api) => {
    const { cells } = await api.call("getService", { params: { name: service } });
    const cell = flags.cell === undefined ? undefined : (cells.find(({ id }) => id.endsWith(flags.cell ?? ""))?.id ?? flags.cell);
    const query = { follow: String(flags.follow === true), tail: flags.tail ?? 1000, ...(cell === undefined ? {} : { cell }) };
    const prefixes = new Map(cells.map(({ id }, index) => [id, cellStyles[index % cellStyles.length] ?? "cyan"]));
    const show = { timestamps: flags.timestamps === true, cell: cell === undefined && cells.length > 1 };
    for await (const line of api.lines("getLogs", { params: { name: service }, query })) {
      if (cli.terminal.json) cli.terminal.jsonLine(line);
      else cli.terminal.print(formatLine(cli.terminal, line, show, prefixes.get(line.cell) ?? "cyan"));
    }
  });
}

/** Guests are not trusted with a terminal: what they wrote is made printable. */
export function formatLine(
  terminal: Terminal,
  line: LogLine,
  show: { timestamps: boolean; cell: boolean },
  cellStyle: Style = "cyan",
): string {
  const message = printable(line.message);
  const text =
    line.stream === "stdout"
      ? message
      : terminal.paint(line.stream === "stderr" ? "red" : "dim", line.stream === "system" ? `[forge] ${message}` : message);
  const time = show.timestamps ? `${terminal.paint("dim", line.time)} ` : "";
  return `${time}${show.cell ? `${terminal.paint(cellStyle, shortId(line.cell))} ` : ""}${text}`;
}
