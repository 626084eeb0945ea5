import fc from "fast-check";
import { describe, expect, test } from "vitest";
import { buildQemuArgs, qemuDriver } from "./qemu.ts";
import { bootExample } from "./vmm.fixture.ts";

const cell = "/var/lib/forge/agent/cells/cell_0123456789abcdefghjkmnpq";

describe("the command line", () => {
  test("of an emulated cell, whole", () => {
    expect(
      buildQemuArgs(bootExample, "tcg")
        .join(" ")
        .split(/ (?=-)/),
    ).toEqual([
      "-name guest=forge-cell_0123456789abcdefghjkmnpq",
      "-nodefaults",
      "-no-user-config",
      "-display none",
      "-monitor none",
      "-no-reboot",
      "-machine q35,usb=off,vmport=off,smm=off,hpet=off,sata=off,smbus=off,i8042=off,dump-guest-core=off,mem-merge=off",
      "-accel tcg,thread=multi,tb-size=64",
      "-cpu max",
      "-smp cpus=2,sockets=1,cores=2,threads=1",
      "-m size=512M",
      "-overcommit mem-lock=off",
      "-rtc base=utc",
      "-kernel /opt/forge/build/guest/vmlinuz",
      "-initrd /opt/forge/build/guest/initramfs",
      "-append console=ttyS0 quiet forge.verity=aa,bb,1,1",
      `-chardev file,id=console,path=${cell}/console,append=on`,
      "-serial chardev:console",
      "-blockdev driver=raw,node-name=root,read-only=on,file.driver=file,file.filename=/var/lib/forge/agent/rootfs/a.erofs,file.aio=threads",
      "-device virtio-blk-pci,drive=root,serial=forge-root,disable-legacy=on,romfile=",
      `-blockdev driver=raw,node-name=config,read-only=on,file.driver=file,file.filename=${cell}/config,file.aio=threads`,
      "-device virtio-blk-pci,drive=config,serial=forge-config,disable-legacy=on,romfile=",
      `-chardev socket,id=channel,path=${cell}/channel,server=on,wait=off`,
      "-device virtio-serial-pci,max_ports=2,disable-legacy=on,romfile=",
      "-device virtserialport,chardev=channel,name=forge.0,nr=1",
      "-object rng-builtin,id=entropy",
      "-device virtio-rng-pci,rng=entropy,max-bytes=1024,period=1000,disable-legacy=on,romfile=",
      "-netdev tap,id=net,fd=3,vhost=off",
      "-device virtio-net-pci,netdev=net,mac=02:f0:0a:0b:0c:0d,disable-legacy=on,romfile=",
      `-chroot ${cell}/jail`,
      "-runas 1879048200:1879048200",
      "-sandbox on,obsolete=deny,elevateprivileges=allow,spawn=deny,resourcecontrol=deny",
    ]);
  });

  test("with hardware virtualisation differs in accelerator and processor alone", () => {
    const tcg = buildQemuArgs(bootExample, "tcg");
    const kvm = buildQemuArgs(bootExample, "kvm");
    expect(kvm.filter((word, index) => word !== tcg[index])).toEqual(["kvm", "host"]);
  });

  test("without a TAP the guest has no interface at all", () => {
    const args = buildQemuArgs({ ...bootExample, tapFd: null }, "tcg");
    expect(args.join(" ")).toContain("-nic none");
    expect(args.join(" ")).not.toContain("virtio-net");
    expect(qemuDriver("tcg", "7.2.22").buildLaunch({ ...bootExample, tapFd: null }).inheritedFds).toEqual([]);
  });

  test("a single vCPU is emulated by a single thread", () => {
    expect(buildQemuArgs({ ...bootExample, vcpus: 1 }, "tcg")).toContain("tcg,thread=single,tb-size=64");
  });

  test("no path can add an option: every comma in one is doubled, and nothing else changes", () => {
    const paths = fc.string({ minLength: 1 }).map((text) => `/${text.replaceAll("\0", "")}`);
    fc.assert(
      fc.property(paths, paths, (rootfsPath, channelPath) => {
        const args = buildQemuArgs({ ...bootExample, rootfsPath, channelPath }, "tcg");
        expect(optionsOf(args, "driver=raw,node-name=root").get("file.filename")).toBe(rootfsPath);
        expect(optionsOf(args, "socket,id=channel").get("path")).toBe(channelPath);
      }),
    );
  });

  test("a number of vCPUs that no cell can have is refused", () => {
    for (const vcpus of [0, -1, 1.5, 65, Number.NaN]) expect(() => buildQemuArgs({ ...bootExample, vcpus }, "tcg")).toThrow("vCPUs");
  });
});

/** Splits one argument as QEMU does (util/keyval.c): a single comma separates, a double one is a comma. */
function optionsOf(args: readonly string[], start: string): Map<string, string> {
  const argument = args.find((word) => word.startsWith(start)) ?? "";
  return new Map(splitKeyval(argument).map((field) => [field.slice(0, field.indexOf("=")), field.slice(field.indexOf("=") + 1)]));
}

function splitKeyval(argument: string): string[] {
  const marked = argument.replaceAll(",,", "\0"); // no argument holds a NUL
  return marked.split(",").map((field) => field.replaceAll("\0", ","));
}
