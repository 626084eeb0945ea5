import { displayWidth, printable, truncate } from "./text.ts";

export interface Column<T> {
  readonly title: string;
  readonly value: (row: T) => string;
  readonly align?: "right";
  /** May be cut where the terminal is too narrow. */
  readonly shrink?: boolean;
  /** Styles the text; must not change its width. */
  readonly paint?: (row: T) => (text: string) => string;
}

const gap = "  ";
const leastShrunkWidth = 8;

/**
 * The lines of a table, the first one its titles. Cells are made printable here; without `width` nothing is cut.
 * A column with nothing in it is left out.
 */
export function renderTable<T>(all: readonly Column<T>[], rows: readonly T[], width?: number): string[] {
  const columns = all.filter((column) => rows.length === 0 || rows.some((row) => column.value(row) !== ""));
  const lines = [columns.map((column) => column.title), ...rows.map((row) => columns.map((column) => printable(column.value(row))))];
  const widths = columns.map((_, index) => Math.max(...lines.map((line) => displayWidth(line[index] ?? ""))));
  if (width !== undefined) shrinkToFit(columns, widths, width);
  return lines.map((line, index) => renderLine(columns, widths, line, rows[index - 1]));
}

/** Takes columns from the widest that may shrink until the table fits, or none can give more. */
function shrinkToFit<T>(columns: readonly Column<T>[], widths: number[], width: number): void {
  let excess = widths.reduce((sum, each) => sum + each, gap.length * (columns.length - 1)) - width;
  while (excess > 0) {
    let widest = -1;
    for (const [index, column] of columns.entries()) {
      if (column.shrink !== true || (widths[index] ?? 0) <= leastShrunkWidth) continue;
      if (widest === -1 || (widths[index] ?? 0) > (widths[widest] ?? 0)) widest = index;
    }
    if (widest === -1) return;
    widths[widest] = (widths[widest] ?? 0) - 1;
    excess -= 1;
  }
}

function renderLine<T>(columns: readonly Column<T>[], widths: readonly number[], line: readonly string[], row: T | undefined): string {
  const cells = columns.map((column, index) => {
    const text = truncate(line[index] ?? "", widths[index] ?? 0);
    const padding = " ".repeat(Math.max(0, (widths[index] ?? 0) - displayWidth(text)));
    const painted = row === undefined || column.paint === undefined ? text : column.paint(row)(text);
    return column.align === "right" ? padding + painted : painted + padding;
  });
  return cells.join(gap).trimEnd();
}
