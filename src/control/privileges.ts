import { chown, mkdir } from "node:fs/promises";
import { join } from "node:path";
import { ForgeError } from "../base/errors.ts";
import { run } from "../base/exec.ts";

const systemUser = "forge";

/**
 * Creates DATA and DATA/control, the latter private to the user we run as, and becomes that user. As root that is
 * `forge`; anyone else stays who they are. PostgreSQL refuses root, and nothing here needs it.
 */
export async function dropPrivileges(dataDir: string): Promise<string> {
  const folder = join(dataDir, "control");
  await mkdir(dataDir, { recursive: true, mode: 0o711 });
  await mkdir(folder, { recursive: true, mode: 0o700 });
  if (process.getuid?.() === 0) await becomeSystemUser(folder);
  process.umask(0o077);
  enter(folder);
  return folder;
}

/** A folder above that only root may pass is a mistake a person can mend. */
function enter(folder: string): void {
  try {
    process.chdir(folder);
  } catch (error) {
    const message = `the user ${systemUser} cannot get to ${folder}: a folder above it lets only its owner pass (chmod o+x, or choose another data folder)`;
    throw new ForgeError("UNSUPPORTED", message, { cause: error });
  }
}

async function becomeSystemUser(folder: string): Promise<void> {
  const { uid, gid } = await findSystemUser();
  await chown(folder, uid, gid);
  process.setgroups?.([]);
  process.setgid?.(gid);
  process.setuid?.(uid); // as root this sets the real, effective and saved ids: there is no way back
}

/** Through getent, so that any name service counts. */
async function findSystemUser(): Promise<{ uid: number; gid: number }> {
  const entry = await run("getent", ["passwd", systemUser]).catch(() => "");
  const [, , uid, gid] = entry.trim().split(":").map(Number);
  if (uid === undefined || gid === undefined || !(uid > 0)) {
    throw new ForgeError(
      "UNSUPPORTED",
      `the system user ${systemUser} does not exist: tools/setup creates it (useradd --system ${systemUser})`,
    );
  }
  return { uid, gid };
}
