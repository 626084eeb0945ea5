import type { RouteName } from "../api/routes.ts";
import { ForgeError } from "../base/errors.ts";
import type { Handler } from "./handler.ts";
import { listCells, listNodes } from "./routes/cells.ts";
import { listEvents, verifyAudit } from "./routes/events.ts";
import { addImage, findBlobs, listImages, pullImage, putBlob } from "./routes/images.ts";
import { applyService, getService, listServices, removeService, startService, stopService } from "./routes/services.ts";
import { getLogs } from "./routes/sessions.ts";
import { getHealth, getStatus } from "./routes/status.ts";
import { createToken, listTokens, revokeToken } from "./routes/tokens.ts";
import { addTrustedKey, listTrustedKeys, removeTrustedKey } from "./routes/trust.ts";

/** Exec as a plain request; as a WebSocket it never gets here. */
const exec: Handler<"exec"> = async () => {
  throw new ForgeError("INVALID_INPUT", "exec is a WebSocket: send the upgrade headers");
};

/** Who answers each route of the table; the compiler sees that none is missing. */
export const handlers: { readonly [N in RouteName]: Handler<N> } = {
  getHealth,
  getStatus,
  listServices,
  getService,
  applyService,
  stopService,
  startService,
  removeService,
  getLogs,
  exec,
  listCells,
  listNodes,
  putBlob,
  findBlobs,
  addImage,
  pullImage,
  listImages,
  listTrustedKeys,
  addTrustedKey,
  removeTrustedKey,
  listTokens,
  createToken,
  revokeToken,
  listEvents,
  verifyAudit,
};
