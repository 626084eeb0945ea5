import type { CellBoot } from "./vmm.ts";

/** For tests of drivers: a boot with nothing left out. */
export const bootExample: CellBoot = {
  cellId: "cell_0123456789abcdefghjkmnpq",
  cellDir: "/var/lib/forge/agent/cells/cell_0123456789abcdefghjkmnpq",
  kernelPath: "/opt/forge/build/guest/vmlinuz",
  initramfsPath: "/opt/forge/build/guest/initramfs",
  commandLine: "console=ttyS0 quiet forge.verity=aa,bb,1,1",
  rootfsPath: "/var/lib/forge/agent/rootfs/a.erofs",
  configDrivePath: "/var/lib/forge/agent/cells/cell_0123456789abcdefghjkmnpq/config",
  vcpus: 2,
  memoryMib: 512,
  cpus: null,
  netnsPath: "/run/netns/cell",
  tapFd: 27,
  guestMac: "02:f0:0a:0b:0c:0d",
  channelPath: "/var/lib/forge/agent/cells/cell_0123456789abcdefghjkmnpq/channel",
  consolePath: "/var/lib/forge/agent/cells/cell_0123456789abcdefghjkmnpq/console",
  uid: 1_879_048_200,
  gid: 1_879_048_200,
};
