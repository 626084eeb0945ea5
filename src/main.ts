/** argv -> cli | control | agent. Each entry point is loaded only when it is the one asked for. */

const [word, ...rest] = process.argv.slice(2);

if (word === "control" || word === "agent") {
  const { runDaemon } = await import("./daemons.ts");
  await runDaemon(word, rest);
} else {
  const { runCli } = await import("./cli/index.ts");
  process.exitCode = await runCli(process.argv.slice(2));
}
