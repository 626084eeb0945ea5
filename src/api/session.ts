/**
 * Frames of an exec session (one WebSocket binary message each): one byte of type, then the payload. The same between
 * CLI, control plane and agent; the control plane passes them through unread.
 */
export const frameTypes = { stdin: 0, stdout: 1, stderr: 2, stdinEnd: 3, resize: 4, signal: 5, exit: 6, error: 7 } as const;

/**
 * Payloads: stdin, stdout, stderr raw bytes. stdinEnd empty. resize {columns, rows}, signal {number}, exit {status},
 * error an ErrorBody, these four as JSON. exit and error end the session.
 */
export type FrameType = keyof typeof frameTypes;

const names = Object.fromEntries(Object.entries(frameTypes).map(([name, value]) => [value, name])) as Record<number, FrameType>;

export function encodeFrame(type: FrameType, payload: Uint8Array | object = new Uint8Array()): Uint8Array<ArrayBuffer> {
  const bytes = payload instanceof Uint8Array ? payload : new TextEncoder().encode(JSON.stringify(payload));
  const frame = new Uint8Array(1 + bytes.length);
  frame[0] = frameTypes[type];
  frame.set(bytes, 1);
  return frame;
}

/** Undefined where the message is no frame (empty, or of an unknown type). */
export function decodeFrame(message: Uint8Array): { type: FrameType; payload: Uint8Array } | undefined {
  const type = message[0] === undefined ? undefined : names[message[0]];
  return type === undefined ? undefined : { type, payload: message.subarray(1) };
}
