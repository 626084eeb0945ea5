import { join } from "node:path";
import { z } from "zod";
import { ApiFailure, type CallInput, type CallOutput, ForgeClient, pathOf } from "../api/client.ts";
import type { RouteName } from "../api/routes.ts";
import { makeDirectory, readIfExists, writeDurable } from "../base/durable.ts";
import { ForgeError } from "../base/errors.ts";
import { type Endpoint, httpsTransport, openWebSocket } from "./transport.ts";

const contextSchema = z.object({
  apiUrl: z.url({ protocol: /^https$/ }),
  caPem: z.string(),
  token: z.string(),
  /** The data folder of the installation on this machine; absent where it is elsewhere. */
  dataDir: z.string().optional(),
});
export type Context = z.infer<typeof contextSchema>;

type Environment = Readonly<Record<string, string | undefined>>;

/** The folder of what one person's CLI knows: context.json, the signing key, caches. */
export class ForgeHome {
  readonly folder: string;
  readonly #env: Environment;

  constructor(env: Environment) {
    this.folder = env["FORGE_HOME"] ?? join(env["HOME"] ?? "/root", ".config", "forge");
    this.#env = env;
  }

  path(name: string): string {
    return join(this.folder, name);
  }

  /** What context.json says, or undefined before the first `forge up`. */
  async read(): Promise<Context | undefined> {
    const path = this.path("context.json");
    const bytes = await readIfExists(path);
    if (bytes === undefined) return undefined;
    const parsed = contextSchema.safeParse(parseJson(bytes.toString()));
    if (parsed.success) return parsed.data;
    throw new ForgeError("INVALID_INPUT", `${path} is not a context: move it away, then \`forge up\` writes it again`);
  }

  async write(context: Context): Promise<void> {
    await this.writeFile("context.json", `${JSON.stringify(context, null, 2)}\n`);
  }

  /** Durable, mode 0600 unless said. */
  async writeFile(name: string, text: string, mode = 0o600): Promise<void> {
    await makeDirectory(this.folder, 0o700);
    await writeDurable(this.path(name), text, mode);
  }

  /** The context with FORGE_API, FORGE_CA (a PEM file) and FORGE_TOKEN over it. */
  async effective(): Promise<Context> {
    const stored = await this.read();
    const apiUrl = this.#env["FORGE_API"] ?? stored?.apiUrl;
    const caPem = await this.#caPem(stored);
    const token = this.#env["FORGE_TOKEN"] ?? stored?.token;
    if (apiUrl === undefined || caPem === undefined || token === undefined) {
      const message = `no runtime is known here: there is no ${this.path("context.json")}, and FORGE_API, FORGE_CA and FORGE_TOKEN are not all set`;
      throw new ForgeError("UNAVAILABLE", message);
    }
    if (!URL.canParse(apiUrl) || new URL(apiUrl).protocol !== "https:")
      throw new ForgeError("USAGE", `FORGE_API must be an https:// URL, not ${apiUrl}`);
    return { ...stored, apiUrl, caPem, token };
  }

  async #caPem(stored: Context | undefined): Promise<string | undefined> {
    const path = this.#env["FORGE_CA"];
    if (path === undefined) return stored?.caPem;
    const bytes = await readIfExists(path);
    if (bytes === undefined) throw new ForgeError("NOT_FOUND", `FORGE_CA names ${path}, which does not exist`);
    return bytes.toString();
  }
}

/** The API as commands use it: failures are ForgeErrors, and every call that does not stream has a bound. */
export class Connection {
  readonly endpoint: Endpoint;
  readonly #token: string;
  readonly #transport: ReturnType<typeof httpsTransport>;
  readonly #client: ForgeClient;
  readonly #signal: AbortSignal;

  constructor(context: Context, signal: AbortSignal) {
    this.endpoint = context;
    this.#token = context.token;
    this.#transport = httpsTransport(context);
    this.#client = new ForgeClient(this.#transport, context.token);
    this.#signal = signal;
  }

  call<N extends RouteName>(name: N, input: CallInput<N>, timeoutMs = 60_000): Promise<CallOutput<N>> {
    const late = AbortSignal.timeout(timeoutMs);
    return translate(this.#client.call(name, input, AbortSignal.any([this.#signal, late])), () =>
      late.aborted ? new ForgeError("TIMEOUT", `the control plane did not answer within ${timeoutMs / 1000} s`) : undefined,
    );
  }

  upload<N extends RouteName>(name: N, input: CallInput<N>, bytes: AsyncIterable<Uint8Array>): Promise<void> {
    return translate(this.#client.upload(name, input, bytes));
  }

  async *lines<N extends RouteName>(name: N, input: CallInput<N>): AsyncGenerator<CallOutput<N>> {
    const source = this.#client.lines(name, input, this.#signal);
    try {
      for (;;) {
        const next = await translate(source.next());
        if (next.done === true) return;
        yield next.value;
      }
    } finally {
      await source.return(undefined);
    }
  }

  webSocket(
    name: RouteName,
    input: { params?: Record<string, unknown>; query?: Record<string, unknown> },
  ): ReturnType<typeof openWebSocket> {
    return openWebSocket(this.endpoint, pathOf(name, input), { authorization: `Bearer ${this.#token}` });
  }

  close(): void {
    this.#transport.close();
  }
}

async function translate<T>(promise: Promise<T>, explain?: () => ForgeError | undefined): Promise<T> {
  try {
    return await promise;
  } catch (error) {
    if (error instanceof ApiFailure) throw ForgeError.fromBody(error.body);
    if (error instanceof z.ZodError || error instanceof SyntaxError) {
      throw new ForgeError("UNAVAILABLE", "the server's answer is not what this version of forge expects: are both the same version?", {
        cause: error,
      });
    }
    throw explain?.() ?? error;
  }
}

function parseJson(text: string): unknown {
  try {
    return JSON.parse(text);
  } catch {
    return undefined;
  }
}

/** Runs `work` with the API of the effective context, and closes its connections whatever happens. */
export async function withApi<T>(cli: { env: Environment; signal: AbortSignal }, work: (api: Connection) => Promise<T>): Promise<T> {
  const api = new Connection(await new ForgeHome(cli.env).effective(), cli.signal);
  try {
    return await work(api);
  } finally {
    api.close();
  }
}
