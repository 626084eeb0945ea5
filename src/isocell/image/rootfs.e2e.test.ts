import { spawn } from "node:child_process";
import { once } from "node:events";
import { chmod, link, lstat, mkdir, mkdtemp, open, readdir, readFile, readlink, rm, unlink, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { setTimeout as delay } from "node:timers/promises";
import { afterEach, beforeEach, describe, expect, test } from "vitest";
import { run } from "../../base/exec.ts";
import { makeLayout } from "./fixtures/layout.ts";
import { file, folder, hardLink, symlink, tar, type TarEntry } from "./fixtures/tar.ts";
import { normalise } from "./layout.ts";
import { blockSizeBytes, type RootfsArtifact, RootfsCache } from "./rootfs.ts";
import { ImageStore } from "./store.ts";

let base: string;
let store: ImageStore;
beforeEach(async () => {
  base = await mkdtemp(join(tmpdir(), "forge-rootfs-"));
  store = await ImageStore.open(join(base, "store"));
});
afterEach(async () => {
  await rm(base, { recursive: true, force: true });
});

async function addImage(name: string, ...layers: (readonly TarEntry[])[]): Promise<string> {
  await makeLayout(join(base, name), layers.map(tar), { run: { Cmd: [name] } });
  return (await normalise({ kind: "folder", path: join(base, name) }, store)).digest;
}

/** Shows what the kernel makes of the file system. */
async function mounted<T>(artifact: RootfsArtifact, look: (path: string) => Promise<T>): Promise<T> {
  const path = await mkdtemp(join(base, "mount-"));
  await run("mount", ["-t", "erofs", "-o", "loop,ro", artifact.path, path]);
  try {
    return await look(path);
  } finally {
    await run("umount", ["--lazy", path]);
  }
}

const capability = "\x01\0\0\x02\x80\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0"; // 0x80 is no UTF-8: attributes are bytes
const lower: TarEntry[] = [
  folder("d/"),
  file("d/a", "a"),
  file("d/b", "b", { mtimeSeconds: 1_234_567_890 }),
  folder("op/", { mode: 0o2755, uid: 5, gid: 6 }),
  file("op/x", "x"),
  folder("op/sub/"),
  file("op/sub/y", "y"),
  file("h1", "hard"),
  hardLink("h2", "h1"),
  hardLink("h3", "h1"),
  folder("dev/"),
  file("dev/null", "", { type: "3", device: [1, 3], mode: 0o666 }),
  file("dev/blk", "", { type: "4", device: [7, 300], mode: 0o660, uid: 1, gid: 2 }),
  file("fifo", "", { type: "6", mode: 0o600 }),
  file("suid", "s", { mode: 0o6755, uid: 1000, gid: 1001 }),
  file("ping", "c", { mode: 0o755, uid: 33, pax: { "SCHILY.xattr.security.capability": capability, "SCHILY.xattr.user.note": "text" } }),
  file("big", "u", { pax: { uid: "3000000", gid: "3000001" } }),
  folder("usr/"),
  folder("usr/lib/"),
  symlink("lib", "/usr/lib"),
  symlink("out", "../../../etc/passwd"),
  file("becomes-folder", "f"),
  folder("becomes-file/"),
  file("becomes-file/z", "z"),
  file(`${"long-".repeat(30)}name`, "l"),
  file("ünï", "utf-8"),
];
const upper: TarEntry[] = [
  file("d/.wh.a"),
  folder("op/", { mode: 0o700, uid: 7, gid: 8 }),
  file("op/new", "new"),
  file("op/.wh..wh..opq"),
  folder("op/sub/"),
  file("op/sub/z", "z"),
  file(".wh.h1"),
  hardLink("h4", "h2"),
  file("h3", "replaced"),
  file("lib/through-link", "t"),
  folder("becomes-folder/"),
  file("becomes-folder/q", "q"),
  file("becomes-file", "now a file"),
  file("not/described/f", "1"),
];

describe("a root file system", () => {
  test("holds what the layers say: whiteouts, links, devices, attributes, owners, modes, times", async () => {
    const artifact = await (await RootfsCache.open(join(base, "rootfs"), store)).prepare(await addImage("all", lower, upper));
    expect(artifact).toMatchObject({ hashStartBlock: artifact.dataBlocks, config: { cmd: ["all"] } });
    await mounted(artifact, async (path) => {
      // Not readdir's own recursion: that follows links, here out of the image.
      const names = (await run("find", [path, "-mindepth", "1", "-printf", "%P\\n"])).trim().split("\n").sort();
      expect(names).toEqual(
        [
          "becomes-file",
          "becomes-folder",
          "becomes-folder/q",
          "big",
          "d",
          "d/b",
          "dev",
          "dev/blk",
          "dev/null",
          "fifo",
          "h2",
          "h3",
          "h4",
          "lib",
          `${"long-".repeat(30)}name`,
          "not",
          "not/described",
          "not/described/f",
          "op",
          "op/new",
          "op/sub",
          "op/sub/z",
          "out",
          "ping",
          "suid",
          "usr",
          "usr/lib",
          "usr/lib/through-link",
          "ünï",
        ].sort(),
      );
      const stat = async (name: string): Promise<Awaited<ReturnType<typeof lstat>>> => lstat(join(path, name));
      const owned = async (name: string): Promise<[number, number, string]> => [
        Number((await stat(name)).uid),
        Number((await stat(name)).gid),
        (Number((await stat(name)).mode) & 0o7777).toString(8),
      ];
      expect(await owned("op")).toEqual([7, 8, "700"]);
      expect(await owned("suid")).toEqual([1000, 1001, "6755"]);
      expect(await owned("big")).toEqual([3_000_000, 3_000_001, "644"]);
      expect(await owned("dev/blk")).toEqual([1, 2, "660"]);
      expect(await owned("not/described")).toEqual([0, 0, "755"]);
      expect([(await stat("h2")).ino, (await stat("h2")).nlink]).toEqual([(await stat("h4")).ino, 2]);
      expect(await readFile(join(path, "h4"), "utf8")).toBe("hard");
      expect(await readFile(join(path, "h3"), "utf8")).toBe("replaced");
      expect((await stat("dev/null")).isCharacterDevice()).toBe(true);
      expect([Number((await stat("dev/null")).rdev), Number((await stat("dev/blk")).rdev)]).toEqual([
        0x103,
        (7 << 8) | (300 & 0xff) | (1 << 20),
      ]);
      expect((await stat("fifo")).isFIFO()).toBe(true);
      expect([await readlink(join(path, "out")), await readlink(join(path, "lib"))]).toEqual(["../../../etc/passwd", "/usr/lib"]);
      expect([(await stat("d/b")).mtimeMs, (await stat("d")).mtimeMs, (await stat("not")).mtimeMs]).toEqual([
        1_234_567_890_000, 1_000_000_000_000, 0,
      ]);
      const attributes = await run("python3", [
        "-c",
        "import os,sys\nfor n in sorted(os.listxattr(sys.argv[1])): print(n, os.getxattr(sys.argv[1], n).hex())",
        join(path, "ping"),
      ]);
      expect(attributes).toBe(
        `security.capability ${Buffer.from(capability, "latin1").toString("hex")}\nuser.note ${Buffer.from("text").toString("hex")}\n`,
      );
    });
  });

  test("built twice, in two places, has the same bytes; another image has others", async () => {
    const digest = await addImage("twice", lower, upper);
    const first = await (await RootfsCache.open(join(base, "one"), store)).prepare(digest);
    await delay(1100); // another second on the clock
    const second = await (await RootfsCache.open(join(base, "two"), store)).prepare(digest);
    expect(second.rootHash).toBe(first.rootHash);
    expect((await readFile(second.path)).equals(await readFile(first.path))).toBe(true);
    const other = await (await RootfsCache.open(join(base, "one"), store)).prepare(await addImage("other", lower));
    expect(other.rootHash).not.toBe(first.rootHash);
  });

  test("asked for twenty times at once, from two caches over one folder, is built once", async () => {
    const digest = await addImage("once", lower);
    const built: string[] = [];
    const open = async (): Promise<RootfsCache> => RootfsCache.open(join(base, "rootfs"), store, (each) => built.push(each));
    const caches = [await open(), await open()];
    const artifacts = await Promise.all(Array.from({ length: 20 }, async (_, index) => caches[index % 2]?.prepare(digest)));
    expect(new Set(artifacts.map((artifact) => artifact?.rootHash)).size).toBe(1);
    expect(built).toEqual([digest]);
    expect((await readdir(join(base, "rootfs"))).sort()).toEqual([".lock", digest.slice(7)]);
    expect((await lstat(artifacts[0]?.path ?? "")).mode & 0o777).toBe(0o444);
  });
});

describe("tampering", () => {
  test("a changed byte, a changed length, a missing file and a changed record are IMAGE_TAMPERED", async () => {
    const digest = await addImage("tamper", lower, [file("content", "x".repeat(200_000))]);
    const cache = await RootfsCache.open(join(base, "rootfs"), store);
    const alter = async (artifact: RootfsArtifact, at: number): Promise<void> => {
      await chmod(artifact.path, 0o644);
      const handle = await open(artifact.path, "r+");
      await handle.write(Buffer.from([0xee]), 0, 1, at);
      await handle.close();
    };
    const cases: ((artifact: RootfsArtifact) => Promise<unknown>)[] = [
      async (artifact) => alter(artifact, 30_000),
      async (artifact) => alter(artifact, artifact.hashStartBlock * blockSizeBytes + 50),
      async (artifact) => writeFile(artifact.path, (await readFile(artifact.path)).subarray(0, blockSizeBytes)),
      async (artifact) => unlink(artifact.path),
      async (artifact) => {
        const record = join(artifact.path, "..", "record.json");
        await chmod(record, 0o644);
        await writeFile(record, "{}");
      },
    ];
    for (const change of cases) {
      const artifact = await cache.prepare(digest);
      await change(artifact);
      await expect(cache.prepare(digest)).rejects.toMatchObject({ code: "IMAGE_TAMPERED" });
      await cache.remove(digest);
    }
    expect((await cache.prepare(digest)).digest).toBe(digest);
  });

  test("a hard link or a new time is no change: verified once in full, then cheap again", async () => {
    const cache = await RootfsCache.open(join(base, "rootfs"), store);
    const digest = await addImage("touched", lower);
    const artifact = await cache.prepare(digest);
    await link(artifact.path, join(base, "second-name"));
    const resealed = await cache.prepare(digest);
    expect(resealed.rootHash).toBe(artifact.rootHash);
    await cache.verifySealed(artifact);
  });
});

describe("failures", () => {
  test("a hostile layer is refused before anything is unpacked, and leaves nothing", async () => {
    const cache = await RootfsCache.open(join(base, "rootfs"), store);
    const digest = await addImage("hostile", [file("fine", "f")], [symlink("up", "../.."), file("up/escaped", "x")]);
    await expect(cache.prepare(digest)).rejects.toMatchObject({ code: "IMAGE_REFUSED", message: expect.stringContaining("up/escaped") });
    expect(await readdir(join(base, "rootfs"))).toEqual([".lock"]);
    await expect(cache.prepare(`sha256:${"0".repeat(64)}`)).rejects.toMatchObject({ code: "IMAGE_NOT_FOUND" });
  });

  test("a full disk is DISK_FULL, and the space comes back", async () => {
    const small = join(base, "small");
    await mkdir(small);
    await run("mount", ["-t", "tmpfs", "-o", "size=4m", "tmpfs", small]);
    try {
      const cache = await RootfsCache.open(small, store);
      for (const [name, sizeBytes] of [
        ["layer", 5_000_000],
        ["unpack", 2_500_000],
      ] as const) {
        const digest = await addImage(name, [file("content", "x".repeat(sizeBytes))]);
        await expect(cache.prepare(digest), name).rejects.toMatchObject({ code: "DISK_FULL" });
        expect(await readdir(small)).toEqual([".lock"]);
      }
      expect((await cache.prepare(await addImage("fits", lower))).dataBlocks).toBeGreaterThan(0);
    } finally {
      await run("umount", ["--lazy", small]);
    }
  });

  test("what a killed process left is removed by the next open, and its lock is free", async () => {
    const digest = await addImage("killed", [file("content", "x".repeat(60_000_000))]);
    const modules = { rootfs: join(import.meta.dirname, "rootfs.ts"), store: join(import.meta.dirname, "store.ts") };
    const script = `
      const { RootfsCache } = await import(${JSON.stringify(modules.rootfs)});
      const { ImageStore } = await import(${JSON.stringify(modules.store)});
      const store = await ImageStore.open(${JSON.stringify(join(base, "store"))});
      const cache = await RootfsCache.open(${JSON.stringify(join(base, "rootfs"))}, store);
      await cache.prepare(${JSON.stringify(digest)});`;
    const child = spawn(process.execPath, ["--input-type=module", "--eval", script], { stdio: "ignore" });
    const building = async (): Promise<string[]> =>
      (await readdir(join(base, "rootfs")).catch(() => [])).filter((name) => name.startsWith(".building-"));
    for (let attempt = 0; attempt < 600 && (await building()).length === 0; attempt += 1) await delay(20);
    expect(await building()).toHaveLength(1);
    child.kill("SIGKILL");
    await once(child, "exit");
    await delay(500); // a program that the killed process ran may still be at its last write
    const cache = await RootfsCache.open(join(base, "rootfs"), store);
    expect(await building()).toEqual([]);
    expect((await cache.prepare(digest)).digest).toBe(digest);
  });
});
