import { constants } from "node:os";
import type { CellAssignment } from "../api/node.ts";
import { ForgeError } from "../base/errors.ts";
import type { RootfsArtifact } from "../isocell/image/index.ts";
import type { GuestConfig } from "../isocell/index.ts";
import type { Attachment } from "../mesh/index.ts";

/** What runs inside: what the image says, over it what the manifest says, and the cell's place in the network. */
export function guestConfigOf(assignment: CellAssignment, { config }: RootfsArtifact, attachment: Attachment): GuestConfig {
  const { spec, service, id } = assignment;
  const argv = spec.command ?? [...config.entrypoint, ...config.cmd];
  if (argv.length === 0) throw new ForgeError("INVALID_INPUT", "neither the image nor the manifest says which program to run");
  return {
    cellId: id,
    hostname: `${service}-${id.slice(-6)}`,
    argv,
    env: { ...Object.fromEntries(config.env.map(splitVariable)), ...spec.env },
    cwd: config.workingDir === "" ? "/" : config.workingDir,
    user: spec.user ?? config.user,
    stopSignal: signalNumber(config.stopSignal),
    address: attachment.address,
    gateway: attachment.gateway,
    gatewayMac: attachment.gatewayMac,
    mtu: attachment.mtu,
  };
}

function splitVariable(text: string): [string, string] {
  const at = text.indexOf("=");
  return at === -1 ? [text, ""] : [text.slice(0, at), text.slice(at + 1)];
}

/** Number of `SIGQUIT`, `QUIT` or `3`; SIGTERM where the image names none that exists. */
function signalNumber(name: string): number {
  if (/^[0-9]{1,2}$/.test(name)) return Number(name);
  const key = name.startsWith("SIG") ? name : `SIG${name}`;
  return (constants.signals as Record<string, number>)[key] ?? constants.signals.SIGTERM;
}
