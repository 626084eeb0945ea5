import { isatty } from "node:tty";
import type { IncomingMessage } from "node:http";
import type { WebSocket } from "ws";
import { errorBodySchema } from "../api/resources.ts";
import { ForgeError } from "../base/errors.ts";
import { Connection, ForgeHome } from "./context.ts";
import { attach, type ExecStreams, sizeOf } from "./exec-session.ts";
import type { Cli } from "./index.ts";
import { describe } from "./transport.ts";

export interface ExecFlags {
  readonly tty?: boolean;
  readonly cell?: string;
}

/** Bytes of a refusal's body that are read at most. */
const maximumRefusalBytes = 64 * 1024;

/** `forge exec`: our exit status is the program's. What it writes is passed on raw: the person asked for it. */
export async function exec(cli: Cli, args: readonly string[], flags: ExecFlags): Promise<number> {
  const [service = "", ...argv] = args;
  if (argv[0] === "--") argv.shift();
  if (argv.length === 0) throw new ForgeError("USAGE", `which program? for example: forge exec ${service} -- sh`);
  const streams: ExecStreams = { stdin: process.stdin, stdout: process.stdout, stderr: process.stderr };
  const tty = flags.tty ?? (isatty(0) && isatty(1));
  const api = new Connection(await new ForgeHome(cli.env).effective(), cli.signal);
  try {
    const cell = flags.cell === undefined ? {} : { cell: await wholeCellId(api, service, flags.cell) };
    const size = tty ? sizeOf(process.stdout) : {};
    const query = { argv: JSON.stringify(argv), tty: String(tty), ...size, ...cell };
    const socket = api.webSocket("exec", { params: { name: service }, query });
    await opened(socket, api.endpoint.apiUrl);
    return await attach(socket, streams, { tty, interrupted: cli.signal });
  } finally {
    api.close();
  }
}

/** People write the last characters of a cell's identifier, as `forge ps` shows them. */
async function wholeCellId(api: Connection, service: string, suffix: string): Promise<string> {
  const { cells } = await api.call("getService", { params: { name: service } });
  const found = cells.filter(({ id }) => id.endsWith(suffix));
  if (found.length === 1 && found[0] !== undefined) return found[0].id;
  throw new ForgeError("NOT_FOUND", `${service} has ${found.length === 0 ? "no cell" : "several cells"} ${suffix}`);
}

function opened(socket: WebSocket, apiUrl: string): Promise<void> {
  return new Promise((resolve, reject) => {
    socket.once("open", resolve);
    socket.once("error", (error) => reject(describe(error, apiUrl)));
    socket.once("unexpected-response", (request, response) => {
      void readRefusal(response).then((error) => {
        reject(error);
        request.destroy();
      });
    });
  });
}

/** A refused upgrade carries the same body as any refusal of the API. */
async function readRefusal(response: IncomingMessage): Promise<ForgeError> {
  let text = "";
  try {
    for await (const chunk of response) {
      text += String(chunk);
      if (text.length > maximumRefusalBytes) break;
    }
    return ForgeError.fromBody(errorBodySchema.parse(JSON.parse(text)));
  } catch {
    return new ForgeError("UNAVAILABLE", `the control plane refused the session (HTTP ${response.statusCode ?? "?"})`);
  }
}
