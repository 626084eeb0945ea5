import { type Logger, pino } from "pino";

export type { Logger } from "pino";

/** Field names whose values never reach a log, at any depth up to three. */
const secretFields = ["token", "secret", "password", "authorization", "privateKey", "key", "env", "joinToken"];

/** A JSON logger for a process; one line an event on stderr, secrets redacted centrally. Level from FORGE_LOG. */
export function createLogger(component: string): Logger {
  const paths = secretFields.flatMap((field) => [field, `*.${field}`, `*.*.${field}`]);
  return pino(
    { name: component, level: process.env["FORGE_LOG"] ?? "info", redact: { paths, censor: "[redacted]" }, base: { component } },
    pino.destination({ dest: 2, sync: true }),
  );
}
