import { readdir } from "node:fs/promises";
import { join } from "node:path";
import { readIfExists } from "../../base/durable.ts";

/**
 * This machine's apt sources for a suite, its updates and its security archive, as one-line entries. Other
 * repositories of the machine stay out of the image. Empty where there are none.
 */
export async function hostSources(suite: string, folder = "/etc/apt"): Promise<string[]> {
  const parts = join(folder, "sources.list.d");
  const names = await readdir(parts).catch(() => []);
  const lines: string[] = [];
  for (const path of [join(folder, "sources.list"), ...names.sort((a, b) => (a < b ? -1 : 1)).map((name) => join(parts, name))]) {
    const content = (await readIfExists(path))?.toString() ?? "";
    if (path.endsWith(".sources")) lines.push(...fromStanzas(content));
    else if (path.endsWith(".list")) lines.push(...content.split("\n"));
  }
  return [...new Set(lines.map((line) => line.trim().replace(/\s+/g, " ")).filter((line) => isOfSuite(line, suite)))];
}

/** `deb [options] uri suite component…` of the distribution's own archive, which has the component main. */
function isOfSuite(line: string, suite: string): boolean {
  const match = /^deb (?:\[[^\]]*\] )?\S+ (\S+) (.+)$/.exec(line);
  const named = match?.[1] ?? "";
  return (
    [suite, `${suite}-updates`, `${suite}-security`, `${suite}/updates`].includes(named) && (match?.[2] ?? "").split(" ").includes("main")
  );
}

/** deb822 stanzas (sources.list(5)) as one-line entries; embedded keys have no such form and are left out. */
function fromStanzas(content: string): string[] {
  return content.split(/\n\s*\n/).flatMap((stanza) => {
    const unfolded = stanza.replace(/^#.*\n?/gm, "").replace(/\n[ \t]+/g, " ");
    const field = (name: string): string[] =>
      (new RegExp(`^${name}:[ \\t]*(.*)$`, "im").exec(unfolded)?.[1] ?? "").split(/\s+/).filter((word) => word !== "");
    if (!field("Types").includes("deb") || field("Enabled")[0] === "no") return [];
    const key = field("Signed-By");
    const options = key.length === 1 && key[0]?.startsWith("/") === true ? `[signed-by=${key[0]}] ` : "";
    return field("URIs").flatMap((uri) => field("Suites").map((suite) => `deb ${options}${uri} ${suite} ${field("Components").join(" ")}`));
  });
}
