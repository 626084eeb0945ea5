import type { Cell } from "../api/resources.ts";
import { withApi } from "./context.ts";
import type { Cli } from "./index.ts";
import type { Style, Terminal } from "./terminal.ts";
import { age, shortDigest, shortId } from "./text.ts";

/** `forge ps`: one line a cell. */
export async function ps(cli: Cli, flags: { all?: boolean }): Promise<void> {
  const { items } = await withApi(cli, (api) => api.call("listCells", {}));
  const cells = items.filter((cell) => flags.all === true || cell.state !== "stopped").sort(byServiceAndAge);
  cli.terminal.document({ items: cells });
  if (cells.length > 0) return printCells(cli.terminal, cells);
  const hidden = items.length - cells.length;
  cli.terminal.print(
    hidden === 0 ? "no cells; `forge deploy FILE` makes some" : `no running cells; ${hidden} stopped (\`forge ps --all\`)`,
  );
}

function printCells(terminal: Terminal, cells: readonly Cell[]): void {
  terminal.table<Cell>(
    [
      { title: "SERVICE", value: (cell) => cell.service, shrink: true },
      { title: "CELL", value: (cell) => shortId(cell.id) },
      { title: "STATE", value: (cell) => cell.state, paint: (cell) => terminal.painter(stateStyle(cell)) },
      { title: "IMAGE", value: (cell) => shortDigest(cell.imageDigest) },
      { title: "NODE", value: (cell) => cell.nodeName ?? "-", shrink: true },
      { title: "ADDRESS", value: (cell) => cell.address ?? "-" },
      { title: "PUBLISHED", value: (cell) => published(cell) || "-" },
      { title: "AGE", value: (cell) => age(cell.startedAt ?? cell.createdAt), align: "right" },
      { title: "RESTARTS", value: (cell) => String(cell.restarts), align: "right" },
      { title: "REASON", value: (cell) => (cell.state === "running" ? "" : (cell.reason ?? "")), shrink: true },
    ],
    cells,
  );
}

function stateStyle(cell: Cell): Style {
  if (cell.state === "running") return "green";
  return cell.state === "failed" || cell.state === "backoff" ? "red" : "yellow";
}

/** `127.0.0.1:8080`, or with the address in brackets where it is IPv6. */
export function published(cell: Cell): string {
  return cell.published.map(({ address, port }) => `${address.includes(":") ? `[${address}]` : address}:${port}`).join(",");
}

function byServiceAndAge(one: Cell, other: Cell): number {
  return one.service.localeCompare(other.service) || one.id.localeCompare(other.id);
}
