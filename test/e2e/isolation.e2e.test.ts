import { join } from "node:path";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import { run } from "../../src/base/exec.ts";
import type { Cell } from "../../src/api/resources.ts";
import { writeBusyboxImage } from "../support/busybox-image.ts";
import { Internet } from "../support/internet.ts";
import { eventually, Runtime } from "../support/runtime.ts";
import { freePorts } from "../../tools/free-ports.ts";

/**
 * From inside a cell: its own interface and nothing else. The host here is a network namespace with an uplink to an
 * internet that does answer; a capture on that uplink sees what gets out.
 */

let internet: Internet;
let runtime: Runtime;
let port = 0;
const inside = (script: string) => runtime.forge("exec", "web", "--", "sh", "-c", script);

beforeAll(async () => {
  internet = await Internet.create();
  runtime = await Runtime.start({ netns: internet.host });
  [port = 0] = await freePorts(1);
  await writeBusyboxImage(join(runtime.folder, "web"));
  await runtime.ok("image", "sign", join(runtime.folder, "web"));
  const ports = [
    { name: "http", port: 80, publish: port },
    { name: "hidden", port: 8081 },
  ];
  await runtime.ok("deploy", await runtime.manifest({ web: { image: "./web", memory: "128MiB", ports, health: { http: "/", port: 80 } } }));
}, 180_000);
afterAll(async () => {
  await runtime?.destroy();
  await internet?.destroy();
}, 120_000);

describe("a cell", () => {
  test("has its own address and no other, and no route out", async () => {
    const [cell] = (await runtime.json<{ items: Cell[] }>("ps")).items;
    const addresses = (await inside("ip addr | grep inet")).stdout.split("\n").map((line) => line.trim().split(" ")[1] ?? "");
    expect(addresses.toSorted()).toEqual(["127.0.0.1/8", "::1/128", `${cell?.address}/128`].toSorted());
    const links = (await inside("ip -o link | grep -c .")).stdout.trim();
    expect(links).toBe("2");
    expect((await inside("ip route")).stdout).toBe("");
    const routes = (await inside("ip -6 route")).stdout;
    expect(routes).not.toMatch(/default|::\/0/);
  }, 60_000);

  test("reaches nothing: no address outside, no name, no other port of the node; the uplink carries not one packet", async () => {
    const path = join(runtime.folder, "uplink.pcap");
    let stop = await internet.capture(path);
    expect(await internet.askFromHost()).toBe("the internet\n");
    await stop();
    const seen = await eventually("the sniffer sees what the host sends", 5000, async () => {
      const packets = await internet.read(path);
      return packets.length > 0 ? packets : undefined;
    });
    expect(seen.some((packet) => packet.includes("2001:db8::1.80"))).toBe(true);

    stop = await internet.capture(path);
    const attempts = [
      "wget -T 2 -O - http://192.0.2.1/",
      "wget -T 2 -O - 'http://[2001:db8::1]/'",
      "wget -T 2 -O - http://example.org/",
      "nslookup example.org 192.0.2.1",
      "nslookup example.org 2001:db8::1",
      "nslookup example.org",
      "ping -c 1 -W 2 192.0.2.1",
      "ping -c 1 -W 2 2001:db8::1",

      "ip -6 route add default dev eth0 && wget -T 2 -O - 'http://[2001:db8::1]/'",
      "ip addr add 192.0.2.77/24 dev eth0 && ping -c 1 -W 2 192.0.2.1",
      "ip -6 addr add 2001:db8::77/64 dev eth0 nodad && ping -c 1 -W 2 -I 2001:db8::77 2001:db8::1",
      "GATEWAY=$(ip -6 route | head -n 1 | cut -d' ' -f1); nc -w 2 $GATEWAY 22",
      "GATEWAY=$(ip -6 route | head -n 1 | cut -d' ' -f1); ping -c 1 -W 2 $GATEWAY",
    ];
    for (const attempt of attempts) {
      const result = await inside(attempt);
      expect(`${attempt}: ${result.code === 0 ? "reached" : "refused"}`).toBe(`${attempt}: refused`);
    }
    await stop();
    const addressOfCell = (await runtime.json<{ items: Cell[] }>("ps")).items[0]?.address ?? "none";
    const packets = (await internet.read(path)).filter((packet) => !/ICMP6, (neighbor|router|multicast)|ARP/.test(packet));
    expect(packets).toEqual([]);
    expect((await internet.read(path)).join("\n")).not.toContain(addressOfCell);
  }, 120_000);

  test("is reached on its published port and on no other", async () => {
    const ask = (url: string): Promise<string> =>
      run("nsenter", [`--net=/run/netns/${internet.host}`, "curl", "--silent", "--fail", "--max-time", "5", url]);
    expect(await ask(`http://127.0.0.1:${port}/`)).toBe("hello from a cell\n");
    const [cell] = (await runtime.json<{ items: Cell[] }>("ps")).items;
    await expect(ask(`http://[${cell?.address}]/`)).rejects.toThrow();
    await expect(ask("http://127.0.0.1:8081/")).rejects.toThrow();
  }, 60_000);

  test("has devices, kernel and processes of its own", async () => {
    expect((await inside("ls /sys/class/net")).stdout.split("\n").toSorted()).toEqual(["eth0", "lo"]);
    expect((await inside("ps | grep -c qemu")).stdout).not.toBe("2");
    expect((await inside("cat /proc/1/comm")).stdout.trim()).not.toBe("systemd");
  }, 60_000);
});
