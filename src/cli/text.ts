import { stripVTControlCharacters } from "node:util";

/**
 * Foreign text (from a guest, an image, a server) for a terminal: escape sequences go, other control characters and
 * bidirectional overrides become visible, so that no workload can move the cursor, retitle the window or forge a line.
 */
export function printable(text: string): string {
  return stripVTControlCharacters(text)
    .replace(/\t/g, "    ")
    .replace(/\r$/, "")
    .replace(/[\p{Cc}\u200e\u200f\u2028-\u202e\u2066-\u2069]/gu, visible);
}

function visible(character: string): string {
  return `\\u{${character.charCodeAt(0).toString(16)}}`;
}

const wide = /\p{Emoji_Presentation}|\p{Script=Han}|\p{Script=Hiragana}|\p{Script=Katakana}|\p{Script=Hangul}|[\uff01-\uff60]/u;
let segmenter: Intl.Segmenter | undefined;

/** Made when first needed: loading its tables takes milliseconds that `forge --version` has no use for. */
function graphemes(text: string): Intl.Segments {
  segmenter ??= new Intl.Segmenter("en", { granularity: "grapheme" });
  return segmenter.segment(text);
}

/** Columns a text takes on a terminal. */
export function displayWidth(text: string): number {
  if (/^[\u0020-\u007e]*$/.test(text)) return text.length;
  let width = 0;
  for (const { segment } of graphemes(text)) width += wide.test(segment) ? 2 : 1;
  return width;
}

/** The text cut to a width, its last column an ellipsis where something was cut. */
export function truncate(text: string, width: number): string {
  if (displayWidth(text) <= width) return text;
  let kept = "";
  let used = 0;
  for (const { segment } of graphemes(text)) {
    const columns = displayWidth(segment);
    if (used + columns > width - 1) break;
    kept += segment;
    used += columns;
  }
  return `${kept}…`;
}

/** `45s`, `12m`, `3h`, `8d`: how long ago. */
export function age(since: string | null, nowMs: number = Date.now()): string {
  if (since === null) return "-";
  const seconds = Math.max(0, Math.floor((nowMs - Date.parse(since)) / 1000));
  if (seconds < 120) return `${seconds}s`;
  if (seconds < 7200) return `${Math.floor(seconds / 60)}m`;
  return seconds < 172_800 ? `${Math.floor(seconds / 3600)}h` : `${Math.floor(seconds / 86_400)}d`;
}

/** `12.3 MiB`. */
export function formatBytes(bytes: number): string {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let value = bytes;
  let unit = 0;
  while (value >= 1024 && unit < units.length - 1) {
    value /= 1024;
    unit += 1;
  }
  return `${unit === 0 ? value : value.toFixed(1)} ${units[unit]}`;
}

/** The first 12 hexadecimal digits of `sha256:…`: enough to tell images apart. */
export function shortDigest(digest: string): string {
  return digest.replace(/^sha256:/, "").slice(0, 12);
}

/** A cell's name for people: its last 8 characters, the random ones. */
export function shortId(id: string): string {
  return id.slice(-8);
}
