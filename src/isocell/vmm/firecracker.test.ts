import { describe, expect, test } from "vitest";
import { buildFirecrackerConfig, buildJailerArgs, firecrackerDriver } from "./firecracker.ts";
import { bootExample } from "./vmm.fixture.ts";

/** Required and allowed fields of the objects we send, from Firecracker's swagger/firecracker.yaml at 1.17.0-dev. */
const definitions: Record<string, { readonly required: readonly string[]; readonly allowed: readonly string[] }> = {
  "machine-config": {
    required: ["mem_size_mib", "vcpu_count"],
    allowed: ["cpu_template", "smt", "mem_size_mib", "track_dirty_pages", "vcpu_count", "huge_pages"],
  },
  "boot-source": { required: ["kernel_image_path"], allowed: ["boot_args", "initrd_path", "kernel_image_path"] },
  drives: {
    required: ["drive_id", "is_root_device"],
    allowed: [
      "drive_id",
      "partuuid",
      "is_root_device",
      "cache_type",
      "is_read_only",
      "path_on_host",
      "rate_limiter",
      "io_engine",
      "socket",
    ],
  },
  "network-interfaces": {
    required: ["host_dev_name", "iface_id"],
    allowed: ["guest_mac", "host_dev_name", "iface_id", "mtu", "rx_rate_limiter", "tx_rate_limiter"],
  },
  vsock: { required: ["guest_cid", "uds_path"], allowed: ["guest_cid", "uds_path", "vsock_id"] },
  entropy: { required: [], allowed: ["rate_limiter"] },
};

describe("the configuration of a microVM", () => {
  const config = buildFirecrackerConfig(bootExample);

  test("has no object and no field that Firecracker does not know, and all it requires", () => {
    expect(Object.keys(config).sort()).toEqual(Object.keys(definitions).sort());
    for (const [name, value] of Object.entries(config)) {
      for (const part of [value].flat() as object[]) {
        expect(definitions[name]?.allowed).toEqual(expect.arrayContaining(Object.keys(part)));
        expect(Object.keys(part)).toEqual(expect.arrayContaining([...(definitions[name]?.required ?? [])]));
      }
    }
  });

  test("says what the cell is to be", () => {
    expect(config).toMatchObject({
      "machine-config": { vcpu_count: 2, mem_size_mib: 512, smt: false },
      "boot-source": { kernel_image_path: "/vmlinux", initrd_path: "/initramfs", boot_args: bootExample.commandLine },
      drives: [
        { drive_id: "root", path_on_host: "/root", is_read_only: true },
        { drive_id: "config", path_on_host: "/config", is_read_only: true },
      ],
      "network-interfaces": [{ host_dev_name: "tap0", guest_mac: "02:f0:0a:0b:0c:0d" }],
    });
    expect(buildFirecrackerConfig({ ...bootExample, tapFd: null })).toMatchObject({ "network-interfaces": [] });
  });

  test("more vCPUs than it can run are refused", () => {
    expect(() => buildFirecrackerConfig({ ...bootExample, vcpus: 33 })).toThrow("32 vCPUs");
  });
});

test("the jailer is asked for an identifier it accepts, the cell's user, namespace and existing control group", () => {
  const args = buildJailerArgs(bootExample);
  const after = (flag: string): string | undefined => args[args.indexOf(flag) + 1];
  expect(after("--id")).toMatch(/^[A-Za-z0-9-]{1,64}$/);
  expect(after("--uid")).toBe("1879048200");
  expect(after("--netns")).toBe("/run/netns/cell");
  expect(after("--parent-cgroup")).toBe(`forge/${bootExample.cellId}`);
  expect(args).not.toContain("--cgroup");
  expect(args.slice(args.indexOf("--"))).toEqual(["--", "--no-api", "--config-file", "/vm.json"]);
});

test("starting with it is refused, in words", () => {
  expect(() => firecrackerDriver.buildLaunch(bootExample)).toThrow(expect.objectContaining({ code: "UNSUPPORTED" }));
});
