import { readFileSync } from "node:fs";
import { type Argument, Command, CommanderError } from "commander";
import { errnoOf, ForgeError, toForgeError } from "../base/errors.ts";
import { type CommandEntry, type CommandGroup, commands, type Flags, groups } from "./commands.ts";
import { exitCodesText } from "./exit-codes.ts";
import { printable } from "./text.ts";
import { type OutputStream, safeJson, Terminal } from "./terminal.ts";

/** What a command is given besides its arguments. */
export interface Cli {
  readonly terminal: Terminal;
  readonly env: Readonly<Record<string, string | undefined>>;
  /** Aborted by the first Ctrl-C; the second one ends the process. */
  readonly signal: AbortSignal;
}

export interface CliStreams {
  readonly stdout: OutputStream;
  readonly stderr: OutputStream;
}

/** What a shell reports for a program that Ctrl-C ended. */
const interruptedExit = 130;

/** Runs one command line (without node and script) and returns its exit code. Never throws. */
export async function runCli(argv: readonly string[], streams: CliStreams = process): Promise<number> {
  const interrupt = new AbortController();
  const onInterrupt = (): void => (interrupt.signal.aborted ? process.exit(interruptedExit) : interrupt.abort());
  const json = wantsJson(argv);
  const terminal = new Terminal({ ...streams, env: process.env, json });
  process.on("SIGINT", onInterrupt);
  process.stdout.on("error", exitOnClosedPipe);
  try {
    return await parse(argv, { terminal, env: process.env, signal: interrupt.signal });
  } catch (error) {
    if (interrupt.signal.aborted) return interruptedExit;
    return report(error, terminal);
  } finally {
    process.off("SIGINT", onInterrupt);
    process.stdout.off("error", exitOnClosedPipe);
  }
}

export function version(): string {
  const text = readFileSync(new URL("../../package.json", import.meta.url), "utf8");
  return (JSON.parse(text) as { version: string }).version;
}

async function parse(argv: readonly string[], cli: Cli): Promise<number> {
  let exit = 0;
  const program = buildProgram(cli, (code) => (exit = code));
  if (argv.every((word) => word === "--json")) {
    program.outputHelp();
    return 0;
  }
  try {
    await program.parseAsync(argv, { from: "user" });
  } catch (error) {
    if (!(error instanceof CommanderError)) throw error;
    if (error.exitCode === 0) return 0; // help and version were printed
    const message = error.message.replace(/^error: /, "").replace(/\n/g, " ");
    throw new ForgeError("USAGE", message === "(outputHelp)" ? `\`forge ${argv[0]}\` needs one of its commands` : message);
  }
  return exit;
}

/** The whole command line as commander knows it; tests walk it for its help. */
export function buildProgram(cli: Cli, setExit: (code: number) => void = () => undefined): Command {
  const { terminal } = cli;
  const program = new Command("forge")
    .description("The sovereign runtime: signed OCI images as policed, audited microVMs inside a named jurisdiction.")
    .version(version(), "-V, --version", "print the version")
    .option("--json", "print results as JSON on stdout, errors as JSON on stderr")
    .helpOption("-h, --help", "show this help")
    .helpCommand(false)
    .enablePositionalOptions()
    .exitOverride()
    .configureOutput({
      writeOut: (text) => terminal.stdout.write(text),
      writeErr: (text) => !terminal.json && terminal.stderr.write(text), // the help of a group whose command is missing
      outputError: () => undefined, // report() prints errors
    })
    .configureHelp({ styleTitle: (title) => terminal.paint("bold", title), subcommandTerm })
    .addHelpText("after", "\nStart with `forge up`. More on one command: `forge help COMMAND`. Exit codes: `forge help exit-codes`.");
  const parents = new Map<CommandGroup, Command>();
  const parentOf = (group: CommandGroup): Command => {
    const parent =
      parents.get(group) ??
      program.command(group).helpCommand(false).summary(groups[group]).description(groups[group]).usage("COMMAND [options]");
    parents.set(group, parent);
    return parent;
  };
  for (const entry of commands) addCommand(entry.group === undefined ? program : parentOf(entry.group), entry, cli, setExit);
  addHelp(program, terminal);
  return program;
}

/** `logs <service>`: that every command has options needs no saying. */
function subcommandTerm(command: Command): string {
  return [command.name(), ...command.registeredArguments.map((argument) => humanReadable(argument))].join(" ");
}

function humanReadable(argument: Argument): string {
  const name = argument.name() + (argument.variadic ? "..." : "");
  return argument.required ? `<${name}>` : `[${name}]`;
}

function addCommand(parent: Command, entry: CommandEntry, cli: Cli, setExit: (code: number) => void): void {
  const command = parent
    .command(entry.words)
    .summary(entry.summary)
    .description(entry.description ?? entry.summary);
  command.allowExcessArguments(false);
  for (const option of entry.options ?? []) command.addOption(option());
  command.option("--json", "print the result as JSON on stdout, an error as JSON on stderr");
  command.addHelpText("after", `\nExamples:\n${entry.examples.map((example) => `  ${example}`).join("\n")}`);
  if (entry.passThrough === true) command.passThroughOptions();
  command.action(async (...values: unknown[]) => {
    const args = values
      .slice(0, -2)
      .flat()
      .filter((value) => value !== undefined) as string[];
    setExit((await entry.run(cli, args, values.at(-2) as Flags)) ?? 0);
  });
}

function addHelp(program: Command, terminal: Terminal): void {
  const help = program
    .command("help [words...]")
    .summary("help on a command, or on exit-codes")
    .description("Help on a command, or on exit-codes.");
  help.option("--json", "accepted everywhere; help is text all the same");
  help.addHelpText("after", "\nExamples:\n  forge help deploy\n  forge help exit-codes");
  help.action((words: string[]) => {
    if (words[0] === "exit-codes") return void terminal.stdout.write(exitCodesText());
    let command = program;
    for (const word of words) {
      const next = command.commands.find((candidate) => candidate.name() === word);
      if (next === undefined) throw new ForgeError("USAGE", `there is no command "${words.join(" ")}"; \`forge help\` lists them`);
      command = next;
    }
    command.outputHelp();
  });
}

/** Errors in the parsing itself must already be JSON, so this looks before commander does; what follows `--` is not ours. */
function wantsJson(argv: readonly string[]): boolean {
  const end = argv.indexOf("--");
  const own = end === -1 ? argv : argv.slice(0, end);
  const program = own.findIndex((word) => word === "exec"); // what follows exec's service is the program's
  return (program === -1 ? own : own.slice(0, program + 2)).includes("--json");
}

function report(thrown: unknown, terminal: Terminal): number {
  const error = toForgeError(thrown);
  if (terminal.json) {
    terminal.stderr.write(`${safeJson(error.toBody())}\n`);
    return error.exitCode;
  }
  const { message, remedy, code } = error.toBody();
  const lines = message.split("\n").map(printable);
  terminal.stderr.write(`${terminal.paint("red", "error:")} ${lines.join("\n  ")}\n`);
  terminal.stderr.write(`${terminal.paint("dim", `${remedy} (${code}, exit ${error.exitCode})`)}\n`);
  if (error.code === "INTERNAL" && process.env["FORGE_LOG"] === "debug")
    terminal.stderr.write(`${String(error.cause instanceof Error ? error.cause.stack : error.stack)}\n`);
  return error.exitCode;
}

/** `forge logs web | head`: the reader has enough, and so have we. */
function exitOnClosedPipe(error: unknown): void {
  if (errnoOf(error) === "EPIPE") process.exit(0);
  throw error;
}
