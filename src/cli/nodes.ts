import type { Node } from "../api/resources.ts";
import { withApi } from "./context.ts";
import type { Cli } from "./index.ts";
import { age } from "./text.ts";

/** `forge nodes`: the machines and their room. */
export async function nodes({ terminal, ...cli }: Cli): Promise<void> {
  const { items } = await withApi(cli, (api) => api.call("listNodes", {}));
  terminal.document({ items });
  if (items.length === 0) return terminal.print("no nodes; `forge up` starts one on this machine");
  terminal.table<Node>(
    [
      { title: "NODE", value: (node) => node.name, shrink: true },
      { title: "STATE", value: (node) => node.state, paint: (node) => terminal.painter(node.state === "ready" ? "green" : "red") },
      { title: "PLACE", value: (node) => `${node.jurisdiction}/${node.site}/${node.rack}`, shrink: true },
      { title: "VMM", value: (node) => (node.emulated ? `${node.vmm} (emulated)` : node.vmm) },
      { title: "PROFILE", value: (node) => node.profile },
      { title: "CELLS", value: (node) => String(node.cells), align: "right" },
      { title: "VCPUS FREE", value: (node) => `${node.vcpusFree} of ${node.vcpus}`, align: "right" },
      { title: "MEMORY FREE", value: (node) => `${node.memoryFreeMib} of ${node.memoryMib} MiB`, align: "right" },
      { title: "SEEN", value: (node) => age(node.lastSeenAt), align: "right" },
    ],
    items,
  );
}
