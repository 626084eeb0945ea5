import { execa } from "execa";
import { chmod, mkdtemp, readFile, rm, writeFile } from "node:fs/promises";
import { release, tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { styleText } from "node:util";
import { freePorts } from "./free-ports.ts";
import { newIn, takeInventory } from "./leaks.ts";

/**
 * The main job, on this machine: a runtime of one node, a sample built here, signed, deployed, shown, reached.
 * `--exit` does it in a folder of its own, checks every answer, takes everything down and proves that nothing is left.
 */

const root = dirname(import.meta.dirname);
const exits = process.argv.includes("--exit");

interface Place {
  readonly env: Record<string, string>;
  readonly upArgs: readonly string[];
  readonly publish: number;
}

if (exits) await demonstrateAndLeave();
else await demonstrate({ env: {}, upArgs: [], publish: 8080 });

async function demonstrateAndLeave(): Promise<void> {
  const before = await takeInventory();
  const folder = await mkdtemp(join(tmpdir(), "forge-demo-"));
  await chmod(folder, 0o711); // the control plane's user must get to its own folder below
  const [apiPort, nodePort, publish] = await freePorts(3);
  const upArgs = ["--data", join(folder, "data"), "--api-port", String(apiPort), "--node-port", String(nodePort)];
  const place = { env: { FORGE_HOME: join(folder, "home") }, upArgs, publish: publish ?? 0 };
  try {
    await demonstrate(place);
    await forge(place, "stop", "web");
  } finally {
    await forge(place, "down", ...upArgs.slice(0, 2));
    await rm(folder, { recursive: true, force: true });
  }
  const left = newIn(before, await takeInventory());
  expect(left.length === 0, `nothing is left behind${left.length === 0 ? "" : `, but there is:\n${left.join("\n")}`}`);
}

async function demonstrate(place: Place): Promise<void> {
  const manifest = await manifestFor(place);
  say("A runtime of one node: private database, control plane, agent");
  await forge(place, "up", ...place.upArgs);
  say("An image from the distribution's packages, signed with this user's key");
  await forge(place, "image", "build", "examples/web");
  say("Deployed: signature checked, verified root file system, interface and policy first, then the microVM");
  await forge(place, "deploy", manifest);
  await forge(place, "ps");
  say("It answers on its published port");
  const answer = await command("curl", ["--silent", "--show-error", "--fail", "--max-time", "20", `http://127.0.0.1:${place.publish}/`]);
  expect(answer.includes("Forge"), "the page came from the cell");
  say("It has a kernel of its own");
  const kernel = (await forge(place, "exec", "web", "--", "uname", "-r")).trim();
  expect(kernel !== "" && kernel !== release(), `the cell runs ${kernel}, this machine ${release()}`);
  await forge(place, "logs", "--tail", "5", "web");
  say("And everything that happened is in the log");
  await forge(place, "events", "--limit", "12");
  await forge(place, "audit", "verify");
  if (!exits) sayWhatNext(place);
}

/** The sample's manifest, with the port this run publishes. */
async function manifestFor(place: Place): Promise<string> {
  const path = "examples/web/forge.yaml";
  if (place.publish === 8080) return path;
  const text = await readFile(join(root, path), "utf8");
  const folder = dirname(place.env["FORGE_HOME"] ?? "");
  const copy = join(folder, "forge.yaml");
  const image = join(root, "examples/web/image");
  await writeFile(copy, text.replace(/publish: *8080/, `publish: ${place.publish}`).replace(/image: *\.\/image/, `image: ${image}`));
  return copy;
}

async function forge(place: Place, ...args: string[]): Promise<string> {
  return command("./forge", args, place.env);
}

/** Shows the command and what it prints, as a person would see them; fails when it fails. */
async function command(program: string, args: readonly string[], env: Record<string, string> = {}): Promise<string> {
  console.log(styleText("dim", `$ ${[program, ...args].join(" ")}`));
  const child = execa(program, args, { cwd: root, env, stdin: "ignore", stdout: ["inherit", "pipe"], stderr: "inherit", reject: false });
  const result = await child;
  if (result.exitCode !== 0) throw new Error(`${program} ${args[0] ?? ""} ended with ${result.exitCode ?? result.signal ?? "an error"}`);
  return result.stdout;
}

function say(text: string): void {
  console.log(`\n${styleText("bold", text)}`);
}

function expect(condition: boolean, text: string): void {
  if (!condition) throw new Error(`not so: ${text}`);
  console.log(styleText("green", `ok: ${text}`));
}

function sayWhatNext(place: Place): void {
  say("Try next");
  const lines = [
    `curl http://127.0.0.1:${place.publish}/`,
    "./forge ps",
    "./forge logs -f web",
    "./forge exec web -- sh",
    "./forge events",
    "./forge stop web",
    "./forge down",
  ];
  for (const line of lines) console.log(`  ${line}`);
}
