import { ForgeError } from "../base/errors.ts";

/** What a cell may be asked for. */
export interface AttachOptions {
  readonly cellId: string;
  /** The cell's own IPv6 address. */
  readonly address: string;
  /** The address of the host's side of the tap. */
  readonly gateway: string;
  readonly allow: { readonly ports: readonly number[] };
  readonly stateDir: string;
}

export interface Attachment {
  readonly cellId: string;
  readonly address: string;
  readonly gateway: string;
  readonly netnsPath: string;
  readonly tapName: string;
  readonly guestMac: string;
  readonly gatewayMac: string;
  readonly mtu: number;
  /** A new descriptor of the tap (close-on-exec), to hand to the VMM; the caller closes it. */
  openTap(): number;
}

export function attach(_options: AttachOptions): Attachment {
  throw new ForgeError("UNSUPPORTED", "not yet");
}
export function detach(_cellId: string, _stateDir: string): void {
  throw new ForgeError("UNSUPPORTED", "not yet");
}
export function listAttachments(_stateDir: string): string[] {
  throw new ForgeError("UNSUPPORTED", "not yet");
}
/** After a restart of the agent: whole attachments come back as they are, half-made ones are undone. */
export function recover(_stateDir: string): Attachment[] {
  throw new ForgeError("UNSUPPORTED", "not yet");
}
