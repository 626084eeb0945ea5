import type { Handler } from "../handler.ts";
import { listCells as cells, listNodes as nodes } from "../views.ts";

export const listCells: Handler<"listCells"> = async ({ control, caller }) => ({ items: await cells(control.db, caller.tenantId) });

export const listNodes: Handler<"listNodes"> = async ({ control }) => ({ items: await nodes(control.db) });
