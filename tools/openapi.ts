import { readFile, writeFile } from "node:fs/promises";
import { fileURLToPath } from "node:url";
import { parseArgs } from "node:util";
import { z } from "zod";
import packageJson from "../package.json" with { type: "json" };
import { manifestSchema } from "../src/api/manifest.ts";
import { errorBodySchema } from "../src/api/resources.ts";
import { type Route, routes } from "../src/api/routes.ts";

/**
 * Writes docs/openapi.json (OpenAPI 3.1) off the route table and docs/forge.schema.json off the manifest's schema.
 * With --check it writes nothing and exits 1 when a file is not what it should be.
 */

type Json = Record<string, unknown>;

const { values } = parseArgs({ options: { check: { type: "boolean", default: false } } });
const documents: Record<string, Json> = { "openapi.json": openApi(), "forge.schema.json": manifestJsonSchema() };
for (const [name, document] of Object.entries(documents)) {
  const path = fileURLToPath(new URL(`../docs/${name}`, import.meta.url));
  const text = `${JSON.stringify(document, null, 2)}\n`;
  if (!values.check) await writeFile(path, text);
  else if ((await readFile(path, "utf8").catch(() => "")) !== text) {
    console.error(`docs/${name} is not what the source says: run node tools/openapi.ts`);
    process.exitCode = 1;
  }
}

function openApi(): Json {
  const paths: Record<string, Json> = {};
  for (const [name, route] of Object.entries(routes) as [string, Route][]) {
    const path = route.path.replace(/:([a-z]+)/g, "{$1}");
    paths[path] = { ...paths[path], [route.method.toLowerCase()]: operation(name, route) };
  }
  return {
    openapi: "3.1.0",
    info: {
      title: "Forge",
      version: packageJson.version,
      description: packageJson.description,
      license: { name: "Apache-2.0", identifier: "Apache-2.0" },
    },
    servers: [{ url: "https://127.0.0.1:7443" }],
    security: [{ token: [] }],
    paths,
    components: {
      securitySchemes: { token: { type: "http", scheme: "bearer", description: "An API token: forge_tok_…" } },
      schemas: { Error: outputOf(errorBodySchema) },
    },
  };
}

function operation(name: string, route: Route): Json {
  const isPublic = route.allow === "public";
  return {
    operationId: name,
    summary: route.summary,
    description: isPublic ? "Needs no token." : `Roles: ${(route.allow as readonly string[]).join(", ")}.`,
    ...(isPublic ? { security: [] } : {}),
    parameters: [...parameters("path", route.params), ...parameters("query", route.query)],
    ...requestBody(route),
    responses: {
      ...success(route),
      default: {
        description: "What went wrong, and what to do about it.",
        content: { "application/json": { schema: { $ref: "#/components/schemas/Error" } } },
      },
    },
  };
}

function parameters(place: "path" | "query", schema: z.ZodObject | undefined): Json[] {
  if (schema === undefined) return [];
  const { properties = {}, required = [] } = inputOf(schema) as { properties?: Record<string, Json>; required?: string[] };
  return Object.entries(properties).map(([name, property]) => ({ name, in: place, required: required.includes(name), schema: property }));
}

function requestBody(route: Route): Json {
  if (route.stream === "upload")
    return { requestBody: { required: true, content: { "application/octet-stream": { schema: { type: "string", format: "binary" } } } } };
  if (route.body === undefined) return {};
  return { requestBody: { required: true, content: { "application/json": { schema: inputOf(route.body) } } } };
}

function success(route: Route): Json {
  if (route.stream === "websocket") return { "101": { description: "A WebSocket of binary frames: one byte of type, then the payload." } };
  const type = route.stream === "ndjson" ? "application/x-ndjson" : "application/json";
  const description =
    route.stream === "ndjson"
      ? "A stream of lines, each one such object; a failure in the middle is a last line with the member error."
      : "Done.";
  return { "200": { description, content: { [type]: { schema: outputOf(route.response) } } } };
}

function manifestJsonSchema(): Json {
  return {
    ...z.toJSONSchema(manifestSchema, { io: "input" }),
    title: "forge.yaml",
    description: "What Forge is to run: services and how they may talk.",
  };
}

function inputOf(schema: z.ZodType): Json {
  return withoutDialect(z.toJSONSchema(schema, { io: "input" }));
}

function outputOf(schema: z.ZodType): Json {
  return withoutDialect(z.toJSONSchema(schema, { io: "output" }));
}

/** OpenAPI 3.1 says the dialect once, for the whole document. */
function withoutDialect({ $schema: _, ...schema }: Json): Json {
  return schema;
}
