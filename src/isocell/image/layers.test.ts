import { mkdtemp, rm, truncate } from "node:fs/promises";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { gzipSync, zstdCompressSync } from "node:zlib";
import fc from "fast-check";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { ForgeError } from "../../base/errors.ts";
import { makeLayout } from "./fixtures/layout.ts";
import { file, folder, hardLink, symlink, tar, type TarEntry } from "./fixtures/tar.ts";
import { checkLayers, readTar } from "./layers.ts";
import { normalise } from "./layout.ts";
import { digestOf, ImageStore } from "./store.ts";
import { ImageTree, imageLimits, type Inode } from "./tree.ts";

/** Reads layers as an image's and lists what they amount to. */
async function treeOf(...layers: (readonly TarEntry[] | Buffer)[]): Promise<string[]> {
  const tree = new ImageTree();
  for (const layer of layers) {
    tree.beginLayer();
    await readTar(chunked(Buffer.isBuffer(layer) ? layer : tar(layer), 700), tree);
  }
  return list(tree.root);
}

async function* chunked(bytes: Buffer, size: number): AsyncGenerator<Buffer> {
  for (let at = 0; at < bytes.length; at += size) yield bytes.subarray(at, at + size);
}

function list(inode: Inode, path = ""): string[] {
  return [...inode.children]
    .flatMap(([name, child]) => (child.type === "directory" ? [`${path}${name}/`, ...list(child, `${path}${name}/`)] : [path + name]))
    .sort();
}

const refusal = (reason: RegExp): object => expect.objectContaining({ code: "IMAGE_REFUSED", message: expect.stringMatching(reason) });

describe("what layers amount to", () => {
  test("a whiteout removes what came before, not what its own layer brings", async () => {
    expect(
      await treeOf([folder("d/"), file("d/a"), file("d/b")], [file("d/c"), file("d/.wh.a"), file("d/.wh.c"), file(".wh.absent")]),
    ).toEqual(["d/", "d/b", "d/c"]);
  });

  test("an opaque folder hides its earlier content, wherever the mark stands", async () => {
    const lower = [folder("d/"), file("d/a"), folder("d/s/"), file("d/s/x")];
    expect(await treeOf(lower, [folder("d/"), file("d/.wh..wh..opq"), file("d/n")])).toEqual(["d/", "d/n"]);
    expect(await treeOf(lower, [folder("d/"), file("d/n"), folder("d/s/"), file("d/s/y"), file("d/.wh..wh..opq")])).toEqual([
      "d/",
      "d/n",
      "d/s/",
      "d/s/y",
    ]);
  });

  test("a hard link outlives the name it was made from", async () => {
    expect(await treeOf([file("a", "1"), hardLink("b", "a")], [file(".wh.a"), hardLink("c", "b")])).toEqual(["b", "c"]);
  });

  test("files and folders replace one another", async () => {
    expect(await treeOf([folder("d/"), file("d/x"), file("f")], [file("d"), folder("f/"), file("f/y")])).toEqual(["d", "f/", "f/y"]);
  });

  test("links to folders inside the image are followed, as /lib is", async () => {
    expect(
      await treeOf(
        [folder("usr/"), folder("usr/lib/"), symlink("lib", "usr/lib"), symlink("l2", "/usr/../lib")],
        [file("lib/a"), file("l2/b")],
      ),
    ).toEqual(["l2", "lib", "usr/", "usr/lib/", "usr/lib/a", "usr/lib/b"]);
  });

  test("devices, fifos, owners and attributes are taken", async () => {
    const capability = { "SCHILY.xattr.security.capability": "\x01\0\0\x02\0\x20\0\0\0\0\0\0\0\0\0\0\0\0\0\0" };
    const entries = [
      file("null", "", { type: "3", device: [1, 3] }),
      file("sda", "", { type: "4", device: [8, 0] }),
      file("p", "", { type: "6" }),
      file("ping", "x", { pax: { ...capability, uid: "3000000" } }),
    ];
    expect(await treeOf(entries)).toEqual(["null", "p", "ping", "sda"]);
  });
});

describe("hostile layers", () => {
  const long = "n".repeat(256);
  test.each<[string, readonly TarEntry[], RegExp]>([
    ["an absolute name", [file("/etc/passwd")], /absolute/],
    ["..", [file("a/../../etc/passwd")], /"a\/\.\.\/\.\.\/etc\/passwd".*\.\./],
    [".. alone", [folder("..")], /\.\./],
    ["a way out through a relative link", [symlink("up", "../.."), file("up/x")], /leads out/],
    ["a way out through two links", [folder("d/"), symlink("d/s", ".."), symlink("t", "d/s/.."), file("t/x")], /leads out/],
    ["a loop of links", [symlink("a", "b"), symlink("b", "a"), file("a/x")], /too many symbolic links/],
    ["an entry below a file", [file("f"), file("f/x")], /no folder/],
    ["an entry below a device", [file("n", "", { type: "3", device: [1, 3] }), file("n/x")], /no folder/],
    ["a hard link to outside", [hardLink("h", "../../etc/passwd")], /\.\./],
    ["a hard link to an absolute name", [hardLink("h", "/etc/passwd")], /absolute/],
    ["a hard link to nothing", [hardLink("h", "absent")], /not in the image/],
    ["a hard link to itself", [file("h"), hardLink("h", "h")], /itself/],
    ["a hard link to a folder", [folder("d/"), hardLink("h", "d")], /folder/],
    ["a hard link out through a symbolic link", [symlink("s", "../.."), hardLink("h", "s/etc/passwd")], /leads out/],
    ["a whiteout of nothing", [file(".wh.")], /malformed whiteout/],
    ["a whiteout of ..", [file(".wh...")], /malformed whiteout/],
    ["a whiteout of aufs", [file(".wh..wh.plnk")], /malformed whiteout/],
    ["a whiteout with content", [file(".wh.a", "x")], /empty file/],
    ["a whiteout that is a folder", [folder(".wh.a/")], /empty file/],
    ["something below a whiteout", [file(".wh.a/x")], /like a whiteout/],
    ["NUL in a pax name", [file("a", "", { pax: { path: "a\0b" } })], /NUL/],
    ["NUL in a link", [{ ...symlink("a", "b"), pax: { linkpath: "x\0y" } }], /proper target/],
    ["a name that is not UTF-8", [file("a", "", { pax: { path: "\xff\xfe" } })], /UTF-8/],
    ["a name too long", [file(long)], /longer than 255/],
    ["a path too long", [file(`${"abcdefgh/".repeat(500)}x`)], /longer than 4095/],
    ["a path too deep", [file(`${"a/".repeat(300)}x`)], /too deep/],
    ["an empty name", [file("")], /empty name/],
    ["a root that is a file", [file("./")], /root must be/],
    ["a link without a target", [symlink("a", "")], /proper target/],
    ["a folder with content", [{ ...folder("d/"), content: "x" }], /content/],
    ["an absurd owner", [file("a", "", { pax: { uid: "4294967295" } })], /absurd owner/],
    ["a negative owner", [file("a", "", { pax: { uid: "-1" } })], /absurd owner/],
    ["an owner that is no number", [file("a", "", { pax: { gid: "staff" } })], /absurd group/],
    ["an absurd device", [file("a", "", { type: "3", device: [4096, 0] })], /absurd device/],
    ["a sparse file", [file("a", "", { pax: { "GNU.sparse.major": "1" } })], /sparse/],
    ["an old sparse file", [file("a", "", { type: "S" })], /type unknown/],
    ["a type nobody knows", [file("a", "", { type: "V" })], /type unknown/],
    ["an overlay's attribute", [file("a", "", { pax: { "SCHILY.xattr.trusted.overlay.opaque": "y" } })], /overlayfs/],
    ["an attribute without a namespace", [file("a", "", { pax: { "SCHILY.xattr.evil": "y" } })], /extended attribute/],
    ["large attributes", [file("a", "", { pax: { "SCHILY.xattr.user.a": "x".repeat(4000) } })], /bytes of extended attributes/],
    [
      "many attributes",
      [file("a", "", { pax: Object.fromEntries(Array.from({ length: 40 }, (_, index) => [`SCHILY.xattr.user.${index}`, ""])) })],
      /more than 32/,
    ],
    ["an absurd pax header", [file("a", "", { pax: { comment: "x".repeat(70_000) } })], /absurd pax/],
  ])("%s is refused, by name", async (_, entries, reason) => {
    await expect(treeOf(entries)).rejects.toEqual(refusal(reason));
  });

  test("more entries than the limit", () => {
    const tree = new ImageTree();
    const entry = {
      type: "file",
      linkName: "",
      mode: 0,
      uid: 0,
      gid: 0,
      sizeBytes: 0,
      mtimeSeconds: 0,
      deviceMajor: 0,
      deviceMinor: 0,
      xattrs: new Map<string, number>(),
    } as const;
    expect(() => {
      for (let index = 0; index <= imageLimits.entries; index += 1) tree.add({ ...entry, name: "same" });
    }).toThrow(refusal(/more than 400000 entries/));
  });
});

describe("layers in a store", () => {
  let base: string;
  let store: ImageStore;
  beforeAll(async () => {
    base = await mkdtemp(join(tmpdir(), "forge-layers-"));
    store = await ImageStore.open(join(base, "store"));
  });
  afterAll(async () => {
    await rm(base, { recursive: true, force: true });
  });
  const imported = async (
    name: string,
    ...more: [layers: Buffer[], options?: Parameters<typeof makeLayout>[2]]
  ): Promise<Awaited<ReturnType<ImageStore["readManifest"]>>> => {
    await makeLayout(join(base, name), ...more);
    const { digest } = await normalise({ kind: "folder", path: join(base, name) }, store);
    return store.readManifest(digest);
  };
  const plain = tar([folder("etc/"), file("etc/motd", "hello")]);

  test.each<[string, (bytes: Buffer) => Buffer, string]>([
    ["gzip", (bytes) => gzipSync(bytes), "application/vnd.oci.image.layer.v1.tar+gzip"],
    ["zstd", (bytes) => zstdCompressSync(bytes), "application/vnd.oci.image.layer.v1.tar+zstd"],
    ["no compression", (bytes) => bytes, "application/vnd.oci.image.layer.v1.tar"],
    ["docker's gzip", (bytes) => gzipSync(bytes), "application/vnd.docker.image.rootfs.diff.tar.gzip"],
  ])("%s is read", async (name, compress, layerMediaType) => {
    const manifest = await imported(name, [plain], { compress, layerMediaType });
    expect(list((await checkLayers(manifest, store)).root)).toEqual(["etc/", "etc/motd"]);
  });

  test("another diff_id than the config says is IMAGE_CORRUPT", async () => {
    const manifest = await imported("diff", [plain], { diffIds: [`sha256:${"0".repeat(64)}`] });
    await expect(checkLayers(manifest, store)).rejects.toMatchObject({ code: "IMAGE_CORRUPT" });
  });

  test("a blob that changed on disk is IMAGE_CORRUPT, whatever the change breaks", async () => {
    const manifest = await imported("flip", [plain, tar([file("more", "x".repeat(5000))])]);
    const [first, second] = manifest.layers.map(({ descriptor }) => store.blobPath(descriptor.digest));
    await truncate(first ?? "", 60);
    await expect(checkLayers(manifest, store)).rejects.toMatchObject({ code: "IMAGE_CORRUPT" });
    await rm(second ?? "");
    await expect(checkLayers({ ...manifest, layers: manifest.layers.slice(1) }, store)).rejects.toMatchObject({ code: "IMAGE_NOT_FOUND" });
  });

  test("an encrypted or unknown layer type is refused", async () => {
    const manifest = await imported("type", [plain], { layerMediaType: "application/vnd.oci.image.layer.v1.tar+gzip+encrypted" });
    await expect(checkLayers(manifest, store)).rejects.toEqual(refusal(/media type/));
  });

  test("a decompression bomb is refused long before it is spread out", async () => {
    const manifest = await imported("bomb", [tar([{ name: "zeros", content: Buffer.alloc(80 * 1024 * 1024) }])], {
      compress: zstdCompressSync,
    });
    await expect(checkLayers(manifest, store)).rejects.toEqual(refusal(/bomb/));
  });

  test("garbage, a tar cut short, and gzip of garbage are refused", async () => {
    const noise = Buffer.from(Array.from({ length: 3000 }, (_, index) => (index * 7919) % 251));
    for (const [index, bytes] of [noise, gzipSync(noise), plain.subarray(0, 700), gzipSync(plain).subarray(0, 50)].entries()) {
      const manifest = await imported(`garbage-${index}`, [bytes], { compress: (same) => same });
      await expect(checkLayers(manifest, store)).rejects.toMatchObject({ code: "IMAGE_REFUSED" });
    }
  });

  test("documents that are not what they should be are refused with a code", async () => {
    for (const text of [
      "",
      "{}",
      "[]",
      "null",
      '{"schemaVersion":2}',
      '{"schemaVersion":2,"manifests":[],"layers":[]}',
      `{"schemaVersion":2,"manifests":[{}]}`,
    ]) {
      const bytes = Buffer.from(text);
      await store.putDocument(digestOf(bytes), bytes);
      await expect(store.readManifest(digestOf(bytes))).rejects.toMatchObject({ code: expect.stringMatching(/^IMAGE_(CORRUPT|REFUSED)$/) });
    }
  });
});

describe("fuzzing", () => {
  const name = fc.oneof(
    fc.constantFrom("a", "b", "a/b", "a/b/c", "./a", "a/", "../a", "/a", ".wh.a", "a/.wh..wh..opq", "s", "s/x", "s/../x", "é"),
    fc.string({ maxLength: 12 }),
  );
  const entry: fc.Arbitrary<TarEntry> = fc.record(
    {
      name,
      type: fc.constantFrom("0", "1", "2", "3", "4", "5", "6", "7", "g", "x", "L", "K", "S", "\0"),
      content: fc.string({ maxLength: 20 }),
      link: name,
      mode: fc.nat(),
      uid: fc.nat(),
      device: fc.tuple(fc.nat(5000), fc.nat()),
      pax: fc.dictionary(
        fc.constantFrom("path", "linkpath", "size", "uid", "mtime", "SCHILY.xattr.user.a", "GNU.sparse.size", "__proto__"),
        fc.string({ maxLength: 12 }).map((text) => Buffer.from(text).toString("latin1")),
      ),
      claimedBytes: fc.oneof(fc.nat(2000), fc.nat()),
    },
    { requiredKeys: ["name"] },
  );

  const survives = async (bytes: Buffer): Promise<void> => {
    const tree = new ImageTree();
    tree.beginLayer();
    await readTar(chunked(bytes, 999), tree).catch((error: unknown) => {
      expect(error).toBeInstanceOf(Error); // explained as IMAGE_REFUSED by checkLayers, which knows the layer
      if (error instanceof ForgeError) expect(error.code).toBe("IMAGE_REFUSED");
    });
    for (const path of list(tree.root)) expect(path.startsWith("/") || path.split("/").includes("..")).toBe(false);
  };

  test("any sequence of entries ends, in a tree inside its root or a refusal", async () => {
    await fc.assert(
      fc.asyncProperty(fc.array(entry, { maxLength: 12 }), async (entries) => survives(tar(entries))),
      { numRuns: 200, interruptAfterTimeLimit: 20_000 },
    );
  }, 30_000);

  test("any mutation of a good archive ends likewise", async () => {
    const good = tar([
      folder("d/"),
      file("d/f", "content", { pax: { "SCHILY.xattr.user.a": "b" } }),
      hardLink("h", "d/f"),
      symlink("s", "d"),
      file(`d/${"x".repeat(120)}`),
      file("d/.wh.q"),
    ]);
    const mutation = fc.array(fc.tuple(fc.nat(good.length - 1), fc.nat(255)), { minLength: 1, maxLength: 6 });
    const property = fc.asyncProperty(mutation, fc.nat(good.length), async (changes, length) => {
      const bytes = Buffer.from(good);
      for (const [at, value] of changes) bytes[at] = value;
      await survives(repairChecksums(bytes).subarray(0, length));
    });
    await fc.assert(property, { numRuns: 300, interruptAfterTimeLimit: 20_000 });
  }, 30_000);

  test("a size that cannot be decoded does not make the reader wait for ever", async () => {
    const bytes = tar([file("a", "x")]);
    bytes[124] = 0x81; // base-256 with an impossible first byte
    await expect(treeOf(repairChecksums(bytes))).rejects.toEqual(refusal(/size/));
  });

  /** Mutations that every reader stops at are dull: gives each block that looks like a header a right checksum. */
  function repairChecksums(bytes: Buffer): Buffer {
    for (let at = 0; at + 512 <= bytes.length; at += 512) {
      if (bytes.toString("latin1", at + 257, at + 262) !== "ustar") continue;
      bytes.fill(" ", at + 148, at + 156);
      const sum = bytes.subarray(at, at + 512).reduce((total, byte) => total + byte, 0);
      bytes.write(`${sum.toString(8).padStart(6, "0")}\0 `, at + 148, "latin1");
    }
    return bytes;
  }
});
