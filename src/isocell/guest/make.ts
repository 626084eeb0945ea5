import { mkdtemp, readdir, readFile, rm, symlink } from "node:fs/promises";
import { join } from "node:path";
import { run } from "../../base/exec.ts";
import { unpackKernel } from "./bzimage.ts";
import { type CpioEntry, writeCpio } from "./cpio.ts";
import { fetchKernel, type Kernel, type KernelModule } from "./kernel.ts";

/** The guest's kernel and initramfs, as bytes. The same sources and kernel give the same bytes. */
export async function makeGuest(folder: string): Promise<{ kernel: Kernel; image: Buffer; initramfs: Buffer }> {
  const kernel = await fetchKernel(join(folder, "kernel"));
  const image = unpackKernel(await readFile(kernel.imagePath));
  return { kernel, image, initramfs: await makeInitramfs(await compileInit(folder), kernel.modules) };
}

const compilerFlags = [
  "-static",
  "-s",
  "-std=gnu17",
  "-O2",
  "-D_GNU_SOURCE",
  "-fstack-protector-strong",
  "-Wl,-z,relro,-z,now",
  "-Wall",
  "-Wextra",
  "-Werror",
];

async function compileInit(folder: string): Promise<Buffer> {
  const work = await mkdtemp(join(folder, "init-"));
  try {
    // The kernel's headers beside musl's own, without the rest of the host's C library.
    for (const name of ["linux", "asm-generic"]) await symlink(join("/usr/include", name), join(work, name));
    await symlink("/usr/include/x86_64-linux-gnu/asm", join(work, "asm"));
    const sources = (await readdir(import.meta.dirname)).filter((name) => name.endsWith(".c")).sort();
    await run("musl-gcc", [...compilerFlags, "-isystem", work, "-o", join(work, "init"), ...sources], { cwd: import.meta.dirname });
    return await readFile(join(work, "init"));
  } finally {
    await rm(work, { recursive: true, force: true });
  }
}

/** Not compressed: an emulated CPU reads faster than it unpacks, and the file is small. */
async function makeInitramfs(init: Buffer, modules: readonly KernelModule[]): Promise<Buffer> {
  const list = modules.map((module) => `/modules/${module.name}.ko\n`).join("");
  const entries: CpioEntry[] = [
    { path: "dev", mode: 0o040755 },
    { path: "dev/console", mode: 0o020600, device: { major: 5, minor: 1 } },
    { path: "init", mode: 0o100755, data: init },
    { path: "modules", mode: 0o040755 },
    { path: "modules/list", mode: 0o100644, data: Buffer.from(list) },
  ];
  for (const module of modules) entries.push({ path: `modules/${module.name}.ko`, mode: 0o100644, data: await readFile(module.path) });
  return writeCpio(entries);
}
