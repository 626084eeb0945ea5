import { STATUS_CODES } from "node:http";
import type { Duplex } from "node:stream";
import { hasZodFastifySchemaValidationErrors } from "fastify-type-provider-zod";
import { errnoOf, ForgeError, toForgeError } from "../base/errors.ts";
import { databaseError } from "./db/database.ts";

/** Whatever went wrong while a request was served, as the error its client sees. */
export function errorFromFastify(thrown: unknown): ForgeError {
  if (thrown instanceof ForgeError) return thrown;
  if (hasZodFastifySchemaValidationErrors(thrown)) {
    const issues = thrown.validation.map(({ instancePath, message }) => ({
      path: instancePath.split("/").filter((part) => part !== ""),
      message: message ?? "is not valid",
    }));
    return requestError(thrown.validationContext ?? "request", issues);
  }
  const code = errnoOf(thrown) ?? "";
  if (code === "FST_ERR_CTP_BODY_TOO_LARGE") return new ForgeError("TOO_LARGE", "the request's body is too large", { cause: thrown });
  const status = typeof thrown === "object" && thrown !== null && "statusCode" in thrown ? thrown.statusCode : undefined;
  if (typeof status === "number" && status >= 400 && status < 500) {
    return new ForgeError("INVALID_INPUT", thrown instanceof Error ? thrown.message : "the request is not valid", { cause: thrown });
  }
  if (code.startsWith("FST_ERR") || thrown instanceof URIError)
    return code.startsWith("FST_ERR") ? hidden(thrown) : new ForgeError("INVALID_INPUT", "the path is not valid");
  const error = databaseError(thrown);
  return error.code === "INTERNAL" ? hidden(thrown) : error;
}

/** What is wrong with which part, in one sentence. */
export function requestError(part: string, issues: readonly { path: readonly PropertyKey[]; message: string }[]): ForgeError {
  const problems = issues.slice(0, 10).map(({ path, message }) => ({ path: path.map(String).join("."), message }));
  const words = problems.map(({ path, message }) => (path === "" ? message : `${path}: ${message}`)).join("; ");
  return new ForgeError("INVALID_INPUT", `${part === "querystring" ? "query" : part}: ${words}`, { details: { problems } });
}

/** Answers on a socket that has no response object: a refused WebSocket, or bytes that are not HTTP. */
export function sendRawError(socket: Duplex, error: ForgeError): void {
  if (!socket.writable) return void socket.destroy();
  const body = JSON.stringify(error.toBody());
  const lines = [
    `HTTP/1.1 ${error.httpStatus} ${STATUS_CODES[error.httpStatus] ?? ""}`,
    "content-type: application/json",
    `content-length: ${Buffer.byteLength(body)}`,
    "connection: close",
  ];
  socket.end(`${lines.join("\r\n")}\r\n\r\n${body}`);
}

/** A defect: its words are for our own log, not for a client. */
function hidden(thrown: unknown): ForgeError {
  const { message } = toForgeError(thrown);
  return new ForgeError("INTERNAL", "something unexpected happened; the control plane's log says more", {
    cause: new Error(message, { cause: thrown }),
  });
}
