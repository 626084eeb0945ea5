import { once } from "node:events";
import type { RawData, WebSocket } from "ws";
import { z } from "zod";
import { errorBodySchema } from "../api/resources.ts";
import { decodeFrame, encodeFrame } from "../api/session.ts";
import { ForgeError } from "../base/errors.ts";

/** The person's side of a session; the process's own streams, or a test's. */
export interface ExecStreams {
  readonly stdin: NodeJS.ReadableStream & { isTTY?: boolean; setRawMode?(raw: boolean): unknown; unref?(): unknown };
  readonly stdout: NodeJS.WritableStream & { columns?: number; rows?: number };
  readonly stderr: NodeJS.WritableStream;
}

export interface ExecOptions {
  readonly tty: boolean;
  /** Aborted by Ctrl-C where the terminal is not raw: the program gets SIGINT, as it would here. */
  readonly interrupted: AbortSignal;
}

type Frame = NonNullable<ReturnType<typeof decodeFrame>>;

const highWaterBytes = 256 * 1024;
const interruptNumber = 2;
const exitSchema = z.object({ status: z.int() });

/** Carries bytes both ways until the program ends; resolves with its status. Leaves the terminal as it found it. */
export async function attach(socket: WebSocket, streams: ExecStreams, options: ExecOptions): Promise<number> {
  const over = new AbortController();
  const status = receive(socket, streams);
  const isRaw = options.tty && streams.stdin.isTTY === true;
  if (isRaw) streams.stdin.setRawMode?.(true);
  const sendSize = (): void => socket.send(encodeFrame("resize", sizeOf(streams.stdout)));
  const sendInterrupt = (): void => socket.send(encodeFrame("signal", { number: interruptNumber }));
  if (options.tty) streams.stdout.on("resize", sendSize);
  options.interrupted.addEventListener("abort", sendInterrupt);
  void sendStdin(socket, streams.stdin, over.signal);
  try {
    return await status;
  } finally {
    over.abort();
    options.interrupted.removeEventListener("abort", sendInterrupt);
    streams.stdout.off("resize", sendSize);
    if (isRaw) streams.stdin.setRawMode?.(false);
    streams.stdin.pause();
    streams.stdin.unref?.(); // a pipe nobody closes must not keep us
    socket.close(1000);
  }
}

/** A terminal that does not know its size says 0. */
export function sizeOf({ columns, rows }: { columns?: number; rows?: number }): { columns: number; rows: number } {
  return { columns: columns === undefined || columns < 1 ? 80 : columns, rows: rows === undefined || rows < 1 ? 24 : rows };
}

function receive(socket: WebSocket, { stdout, stderr }: ExecStreams): Promise<number> {
  return new Promise((resolve, reject) => {
    const write = (stream: NodeJS.WritableStream, bytes: Uint8Array): void => {
      if (stream.write(bytes)) return;
      socket.pause();
      stream.once("drain", () => socket.resume());
    };
    const end = (frame: Frame): void => {
      const exit = exitSchema.safeParse(parseJson(frame.payload));
      const error = errorBodySchema.safeParse(parseJson(frame.payload));
      if (frame.type === "exit" && exit.success) resolve(exit.data.status);
      else if (frame.type === "error" && error.success) reject(ForgeError.fromBody(error.data));
      else reject(new ForgeError("UNAVAILABLE", "the session ended with something this version of forge does not know"));
    };
    socket.on("message", (data: RawData) => {
      const frame = decodeFrame(data as Buffer); // ws gives a Buffer: binaryType is nodebuffer
      if (frame?.type === "stdout") write(stdout, frame.payload);
      else if (frame?.type === "stderr") write(stderr, frame.payload);
      else if (frame?.type === "exit" || frame?.type === "error") end(frame);
    });
    socket.once("error", (error) => reject(new ForgeError("UNAVAILABLE", `the session broke: ${error.message}`, { cause: error })));
    socket.once("close", (code) => reject(new ForgeError("UNAVAILABLE", `the session ended before the program did (${code})`)));
  });
}

/** Our stdin, as fast as the other side takes it; its end is told too. */
async function sendStdin(socket: WebSocket, stdin: ExecStreams["stdin"], over: AbortSignal): Promise<void> {
  try {
    stdin.on("data", (chunk: Buffer | string) => {
      if (over.aborted || socket.readyState !== socket.OPEN) return;
      socket.send(encodeFrame("stdin", Buffer.from(chunk)), () => {
        if (!over.aborted && socket.bufferedAmount < highWaterBytes / 2) stdin.resume();
      });
      if (socket.bufferedAmount > highWaterBytes) stdin.pause();
    });
    await once(stdin, "end", { signal: over });
    if (socket.readyState === socket.OPEN) socket.send(encodeFrame("stdinEnd"));
  } catch {
    // the session is over, or stdin cannot be read: the program's own end decides
  }
}

function parseJson(payload: Uint8Array): unknown {
  try {
    return JSON.parse(Buffer.from(payload).toString());
  } catch {
    return undefined;
  }
}
