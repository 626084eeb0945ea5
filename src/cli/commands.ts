import { InvalidArgumentError, Option } from "commander";
import type { Cli } from "./index.ts";

/** Commands of two words. */
export const groups = {
  image: "build, sign and look at images",
  token: "API tokens of the tenant",
  trust: "keys whose image signatures the tenant accepts",
  audit: "the audit log",
} as const;
export type CommandGroup = keyof typeof groups;

/** Every flag of every command with the type its parser gives it; a module takes the ones its entry declares. */
export interface Flags {
  readonly data?: string;
  readonly jurisdiction?: string;
  readonly site?: string;
  readonly rack?: string;
  readonly name?: string;
  readonly profile?: "development" | "production";
  readonly publishAddress?: string;
  readonly apiPort?: number;
  readonly nodePort?: number;
  readonly dryRun?: boolean;
  readonly wait?: boolean;
  /** Milliseconds, as --ttl. */
  readonly timeout?: number;
  readonly ttl?: number;
  readonly all?: boolean;
  readonly follow?: boolean;
  readonly tail?: number;
  readonly cell?: string;
  readonly timestamps?: boolean;
  readonly tty?: boolean;
  readonly service?: string;
  readonly limit?: number;
  readonly after?: number;
  readonly output?: string;
  readonly sign?: boolean;
  readonly key?: string;
  readonly type?: "ecdsa-p256" | "ed25519";
  readonly role?: "owner" | "developer" | "auditor";
}

/**
 * One command as a person sees it. Its module is loaded when it runs, so that starting the CLI costs the same however
 * many there are.
 */
export interface CommandEntry {
  readonly group?: CommandGroup;
  /** Name and arguments as commander writes them: `rm <service>`. */
  readonly words: string;
  readonly summary: string;
  readonly description?: string;
  readonly options?: readonly (() => Option)[];
  readonly examples: readonly string[];
  /** Options after the first argument belong to somebody else (exec). */
  readonly passThrough?: boolean;
  run(cli: Cli, args: readonly string[], flags: Flags): Promise<number | void>;
}

const dataOption = flag("--data <dir>", "data folder of the installation (default: the one used last, else /var/lib/forge)");

export const commands: readonly CommandEntry[] = [
  {
    words: "up",
    summary: "start the runtime on this machine, or what of it is not running",
    description:
      "Start the runtime on this machine: control plane with its private PostgreSQL, and agent. What runs already is left alone. " +
      "The first run sets the options of the installation; later ones remember them.",
    options: [
      dataOption,
      flag("--jurisdiction <code>", "where this machine stands: country code, optionally with region (default: de)"),
      flag("--site <name>", "data centre (default: local)"),
      flag("--rack <name>", "rack (default: r1)"),
      flag("--name <node>", "name of this node (default: the host name)"),
      choice("--profile <profile>", "development shares CPUs and allows emulation; production does neither (default: development)", [
        "development",
        "production",
      ]),
      flag("--publish-address <ip>", "address on which published ports listen (default: 127.0.0.1)"),
      number("--api-port <port>", "port of the API on 127.0.0.1 (default: 7443)", 1, 65_535),
      number("--node-port <port>", "port for agents on 127.0.0.1 (default: 7444)", 1, 65_535),
    ],
    examples: ["forge up", "forge up --data /srv/forge --jurisdiction de --site fra1", "forge up --api-port 8443 --node-port 8444"],
    run: async (cli, _args, flags) => (await import("./up.ts")).up(cli, flags),
  },
  {
    words: "down",
    summary: "stop the runtime with all its cells; `forge up` brings them back",
    options: [dataOption],
    examples: ["forge down", "forge down --data /srv/forge"],
    run: async (cli, _args, flags) => (await import("./down.ts")).down(cli, flags),
  },
  {
    words: "status",
    summary: "what runs here, and who am I",
    options: [dataOption],
    examples: ["forge status", "forge status --json"],
    run: async (cli, _args, flags) => (await import("./status.ts")).status(cli, flags),
  },
  {
    words: "doctor",
    summary: "what this machine has and lacks, and what that means",
    examples: ["forge doctor", "forge doctor --json"],
    run: async (cli) => (await import("./doctor.ts")).doctor(cli),
  },
  {
    words: "deploy [file]",
    summary: "run what a manifest says (default: forge.yaml)",
    description: "Check the manifest, bring its images in (each must carry a trusted signature), and run its services.",
    options: [
      flag("--dry-run", "check everything and print the plan; change nothing"),
      flag("--no-wait", "return when the region accepted the services, before cells run"),
      duration("--timeout <duration>", "how long to wait for all cells (default: 5m)"),
    ],
    examples: ["forge deploy", "forge deploy examples/web/forge.yaml --dry-run", "forge deploy examples/web/forge.yaml --timeout 2m"],
    run: async (cli, args, flags) => (await import("./deploy.ts")).deploy(cli, args[0] ?? "forge.yaml", flags),
  },
  {
    words: "ps",
    summary: "the cells",
    options: [flag("-a, --all", "stopped ones too")],
    examples: ["forge ps", "forge ps --all --json"],
    run: async (cli, _args, flags) => (await import("./ps.ts")).ps(cli, flags),
  },
  {
    words: "logs <service>",
    summary: "what a service wrote",
    options: [
      flag("-f, --follow", "keep printing as it writes"),
      number("-n, --tail <lines>", "only the last so many lines (default: 1000)", 0, 100_000),
      flag("--cell <id>", "of one cell only"),
      flag("--timestamps", "with times"),
    ],
    examples: ["forge logs web", "forge logs -f --tail 20 web", "forge logs web --json"],
    run: async (cli, args, flags) => (await import("./logs.ts")).logs(cli, args[0] ?? "", flags),
  },
  {
    words: "exec <service> [argv...]",
    summary: "run a program inside a cell",
    description: "Run a program inside a cell. Its exit status becomes ours. A terminal is set up where both ends are one.",
    options: [
      flag("-t, --tty", "with a terminal, also where ours is none"),
      flag("--no-tty", "without a terminal"),
      flag("--cell <id>", "in this cell"),
    ],
    examples: ["forge exec web -- sh", "forge exec web -- uname -r", "echo hello | forge exec web -- cat"],
    passThrough: true,
    run: async (cli, args, flags) => (await import("./exec.ts")).exec(cli, args, flags),
  },
  ...(["stop", "start", "rm"] as const).map((verb) => lifecycle(verb)),
  {
    words: "events",
    summary: "the audit events",
    options: [
      flag("-f, --follow", "keep printing as they happen"),
      flag("--service <name>", "about this service only"),
      number("--limit <count>", "at most so many, the newest (default: 200)", 1, 1000),
      number("--after <sequence>", "only those after this sequence number, oldest first", 0, Number.MAX_SAFE_INTEGER),
    ],
    examples: ["forge events", "forge events -f --service web", "forge events --limit 20 --json"],
    run: async (cli, _args, flags) => (await import("./events.ts")).events(cli, flags),
  },
  {
    words: "nodes",
    summary: "the region's machines and their room",
    examples: ["forge nodes"],
    run: async (cli) => (await import("./nodes.ts")).nodes(cli),
  },
  {
    group: "audit",
    words: "verify",
    summary: "check the audit log's whole chain and its signatures",
    examples: ["forge audit verify", "forge audit verify --json"],
    run: async (cli) => (await import("./audit.ts")).verify(cli),
  },
  {
    group: "image",
    words: "build <dir>",
    summary: "build the image that DIR/image.yaml describes, and sign it",
    options: [
      flag("-o, --output <dir>", "folder of the OCI layout (default: DIR/image)"),
      flag("--no-sign", "leave it unsigned"),
      flag("--key <file>", "signing key, PKCS#8 PEM (default: the local one)"),
    ],
    examples: ["forge image build examples/web", "forge image build examples/web --output /tmp/web --no-sign"],
    run: async (cli, args, flags) => (await import("./image.ts")).build(cli, args[0] ?? "", flags),
  },
  {
    group: "image",
    words: "sign <image>",
    summary: "sign an image by its digest",
    options: [flag("--key <file>", "signing key, PKCS#8 PEM (default: the local one)")],
    examples: ["forge image sign examples/web/image", "forge image sign oci-archive:web.tar --key ./ci.key"],
    run: async (cli, args, flags) => (await import("./image.ts")).sign(cli, args[0] ?? "", flags),
  },
  {
    group: "image",
    words: "push <image>",
    summary: "bring an image into the region without deploying it",
    examples: ["forge image push examples/web/image", "forge image push registry.example/team/web:1.4"],
    run: async (cli, args) => (await import("./image.ts")).push(cli, args[0] ?? ""),
  },
  {
    group: "image",
    words: "inspect <image>",
    summary: "digest, configuration and signatures of a local image",
    examples: ["forge image inspect examples/web/image", "forge image inspect docker-archive:web.tar --json"],
    run: async (cli, args) => (await import("./image.ts")).inspect(cli, args[0] ?? ""),
  },
  {
    group: "image",
    words: "list",
    summary: "the images the region admitted",
    examples: ["forge image list"],
    run: async (cli) => (await import("./image.ts")).list(cli),
  },
  {
    group: "image",
    words: "keygen <file>",
    summary: "make a signing key: FILE (private) and FILE.pub",
    options: [choice("--type <type>", "kind of key (default: ecdsa-p256, as cosign's)", ["ecdsa-p256", "ed25519"])],
    examples: ["forge image keygen ci.key", "forge image keygen ci.key --type ed25519"],
    run: async (cli, args, flags) => (await import("./image.ts")).keygen(cli, args[0] ?? "", flags),
  },
  {
    group: "token",
    words: "create",
    summary: "make an API token; its secret is shown once",
    options: [
      () => new Option("--name <name>", "its name").makeOptionMandatory(),
      choice("--role <role>", "what it may do (default: developer)", ["owner", "developer", "auditor"]),
      duration("--ttl <duration>", "how long it is valid, such as 90d (default: until revoked)"),
    ],
    examples: ["forge token create --name ci", "forge token create --name review --role auditor --ttl 30d"],
    run: async (cli, _args, flags) => (await import("./token.ts")).create(cli, flags),
  },
  {
    group: "token",
    words: "list",
    summary: "the tokens, without their secrets",
    examples: ["forge token list"],
    run: async (cli) => (await import("./token.ts")).list(cli),
  },
  {
    group: "token",
    words: "revoke <name>",
    summary: "revoke a token at once",
    examples: ["forge token revoke ci"],
    run: async (cli, args) => (await import("./token.ts")).revoke(cli, args[0] ?? ""),
  },
  {
    group: "trust",
    words: "add <name> <file>",
    summary: "accept images signed with this public key (PEM)",
    examples: ["forge trust add release cosign.pub"],
    run: async (cli, args) => (await import("./trust.ts")).add(cli, args[0] ?? "", args[1] ?? ""),
  },
  {
    group: "trust",
    words: "list",
    summary: "the trusted keys",
    examples: ["forge trust list"],
    run: async (cli) => (await import("./trust.ts")).list(cli),
  },
  {
    group: "trust",
    words: "remove <name>",
    summary: "stop trusting a key; running cells stay",
    examples: ["forge trust remove release"],
    run: async (cli, args) => (await import("./trust.ts")).remove(cli, args[0] ?? ""),
  },
  {
    words: "completion <shell>",
    summary: "a completion script for bash or zsh",
    examples: ["forge completion bash > /etc/bash_completion.d/forge", 'eval "$(forge completion zsh)"'],
    run: async (cli, args) => (await import("./completion.ts")).completion(cli, args[0] ?? ""),
  },
];

function lifecycle(verb: "stop" | "start" | "rm"): CommandEntry {
  const summaries = {
    stop: "stop a service's cells; its definition stays",
    start: "run a stopped service again",
    rm: "stop a service and forget its definition",
  };
  return {
    words: `${verb} <service>`,
    summary: summaries[verb],
    examples: [`forge ${verb} web`],
    run: async (cli, args) => (await import("./lifecycle.ts")).change(cli, verb, args[0] ?? ""),
  };
}

function flag(flags: string, description: string): () => Option {
  return () => new Option(flags, description);
}

function choice(flags: string, description: string, values: readonly string[]): () => Option {
  return () => new Option(flags, description).choices(values);
}

function number(flags: string, description: string, least: number, most: number): () => Option {
  return () =>
    new Option(flags, description).argParser((text: string) => {
      const value = /^[0-9]{1,16}$/.test(text) ? Number(text) : Number.NaN;
      if (value >= least && value <= most) return value;
      throw new InvalidArgumentError(`It must be a whole number from ${least} to ${most}.`);
    });
}

/** Milliseconds. */
function duration(flags: string, description: string): () => Option {
  const unitsMs = { s: 1000, m: 60_000, h: 3_600_000, d: 86_400_000 } as const;
  return () =>
    new Option(flags, description).argParser((text: string) => {
      const match = /^([1-9][0-9]{0,5})([smhd])$/.exec(text);
      if (match !== null) return Number(match[1]) * unitsMs[match[2] as keyof typeof unitsMs];
      throw new InvalidArgumentError("It must be a whole number with the unit s, m, h or d, such as 90s.");
    });
}
