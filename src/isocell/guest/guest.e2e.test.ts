import { text } from "node:stream/consumers";
import { afterAll, beforeAll, describe, expect, test } from "vitest";
import type { ExecOptions, ExecSession, GuestChannel } from "../channel.ts";
import { alterByte, type Guest, type GuestBench, openGuestBench } from "./guest.fixture.ts";

let bench: GuestBench;

beforeAll(async () => {
  bench = await openGuestBench();
});

afterAll(async () => {
  await bench[Symbol.asyncDispose]();
});

async function execText(channel: GuestChannel, argv: string[], options: Partial<ExecOptions> = {}) {
  const session = await channel.exec({ argv, tty: false, ...options });
  session.stdin.end();
  const [stdout, stderr] = await Promise.all([text(session.stdout), text(session.stderr)]);
  return { stdout, stderr, status: await session.exited };
}

/** Gathers what a session prints; the function it gives waits for words and returns all so far. */
function follow(session: ExecSession): (words: string) => Promise<string> {
  let all = "";
  let news = Promise.withResolvers<void>();
  session.stdout.on("data", (chunk: Buffer) => {
    all += chunk.toString();
    news.resolve();
    news = Promise.withResolvers<void>();
  });
  return async (words) => {
    while (!all.includes(words)) await news.promise;
    return all;
  };
}

describe("a guest that runs", () => {
  let guest: Guest;
  let channel: GuestChannel;

  beforeAll(async () => {
    guest = await bench.boot({
      argv: [
        "sh",
        "-c",
        "id; env; pwd; tty; echo oops >&2; echo late; trap 'echo stopping; exit 7' TERM; " +
          "httpd -f -p [::]:8080 -h /www & while :; do sleep 600 & wait $!; done",
      ],
      env: { GREETING: "hello world" },
      cwd: "/srv/made/here",
      user: "app",
    });
    channel = await guest.connect();
    await guest.told.until((told) => told.text("stdout").includes("late"));
  });

  test("says when it booted and when it started", () => {
    expect(guest.told.boots).toHaveLength(1);
    expect(guest.told.starts[0]?.initUs).toBeGreaterThan(0);
    expect(Math.abs((guest.told.starts[0]?.at.getTime() ?? 0) - Date.now())).toBeLessThan(60_000);
  });

  test("has user, groups, environment and folder as an OCI runtime gives them", () => {
    const out = guest.told.text("stdout");
    expect(out).toContain("uid=1000(app) gid=1001(app) groups=2000(extra)");
    for (const line of ["GREETING=hello world", "HOME=/home/app", "HOSTNAME=web-1"]) expect(out).toContain(line);
    expect(out).toContain("PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    expect(out).toContain("\n/srv/made/here\nnot a tty\n");
  });

  test("keeps stdout and stderr apart, numbered and timed by the host's clock", () => {
    expect(guest.told.text("stderr")).toBe("oops\n");
    expect(guest.told.logs.map((log) => log.sequence)).toEqual(guest.told.logs.map((_, index) => index + 1));
    for (const log of guest.told.logs) expect(Math.abs(log.time.getTime() - Date.now())).toBeLessThan(60_000);
  });

  test("runs its own kernel on a read-only verified root with a writable layer", async () => {
    const { stdout } = await execText(channel, ["sh", "-c", "uname -r; mount; echo x > /tmp/file && cat /tmp/file"]);
    expect(stdout).toMatch(/^\d+\.\d+\.\d+-\d+-cloud-amd64\n/);
    expect(stdout).toMatch(
      / on \/ type overlay .*[\s\S]*proc on \/proc[\s\S]*devpts on \/dev\/pts[\s\S]*shm on \/dev\/shm[\s\S]*mqueue[\s\S]*\nx\n$/,
    );
  });

  test("has one address, one neighbour, and no way further", async () => {
    const { stdout } = await execText(channel, ["sh", "-c", "ip -6 addr show dev eth0; ip -6 route; ip route; ip neigh; cat /etc/hosts"]);
    expect(stdout).toContain("inet6 2001:db8::2/128");
    expect(stdout).toContain("2001:db8::1 dev eth0");
    expect(stdout).toContain("02:f0:00:00:00:01");
    expect(stdout).toContain("mtu 1400");
    expect(stdout).toContain("2001:db8::2\tweb-1");
    expect(stdout).not.toMatch(/default|fe80/);
  });

  test("runs programs beside the entrypoint: streams, status, environment, folder", async () => {
    const session = await channel.exec({
      argv: ["sh", "-c", "cat; echo $A$TERM >&2; pwd; exit 3"],
      tty: false,
      env: { A: "b" },
      cwd: "/www",
    });
    session.stdin.end("through stdin\n");
    const [stdout, stderr] = await Promise.all([text(session.stdout), text(session.stderr)]);
    expect({ stdout, stderr, status: await session.exited }).toEqual({
      stdout: "through stdin\n/www\n",
      stderr: "b\n",
      status: { code: 3 },
    });
    expect((await execText(channel, ["sh", "-c", "kill -9 $$"])).status).toEqual({ signal: 9 });
    await expect(channel.exec({ argv: ["no-such-program"], tty: false })).rejects.toMatchObject({ code: "EXEC_FAILED" });
  });

  test("gives a terminal that can be resized and interrupted", async () => {
    const session = await channel.exec({ argv: ["sh"], tty: true, columns: 100, rows: 30 });
    const seen = follow(session);
    session.stdin.write("stty size; tty; echo $TERM\n");
    await seen("xterm");
    session.resize(132, 40);
    session.stdin.write("stty size\n");
    expect(await seen("40 132")).toMatch(/30 100[\s\S]*\/dev\/pts\/0/);
    session.stdin.write("sh -c 'echo mark''ed; exec sleep 600'\n"); // once it is seen the interrupt has someone to meet
    await seen("marked");
    session.stdin.write("\u0003");
    session.stdin.write("exit 5\n");
    expect(await session.exited).toEqual({ code: 5 });
  });

  test("one session that floods stalls neither the others nor the memory of either side", async () => {
    const flood = await channel.exec({ argv: ["yes"], tty: false });
    const { stdout } = await execText(channel, ["sh", "-c", "seq 1 20000 | wc -l; ps | grep -c ' yes$'"]);
    expect(stdout).toBe("20000\n1\n");
    expect((await channel.probe({ port: 8080, timeoutMs: 5000 })).ok).toBe(true);
    flood.close();
    await expect(flood.exited).rejects.toMatchObject({ code: "CELL_FAILED" });
  });

  test("carries more than its windows in both directions", async () => {
    const session = await channel.exec({ argv: ["cat"], tty: false });
    const sent = Buffer.alloc(1_500_000, "0123456789abcdef\n");
    session.stdin.end(sent);
    const received = Buffer.concat(await session.stdout.toArray());
    expect(received.equals(sent)).toBe(true);
    expect(await session.exited).toEqual({ code: 0 });
  });

  test("probes ports from inside", async () => {
    expect(await channel.probe({ port: 8080, timeoutMs: 5000 })).toEqual({ ok: true, detail: "connected" });
    expect(await channel.probe({ port: 8080, httpPath: "/index.html", timeoutMs: 5000 })).toEqual({ ok: true, detail: "HTTP 200" });
    expect(await channel.probe({ port: 8080, httpPath: "/absent", timeoutMs: 5000 })).toEqual({ ok: false, detail: "HTTP 404" });
    expect(await channel.probe({ port: 9, timeoutMs: 5000 })).toEqual({ ok: false, detail: "Connection refused" });
  });

  test("reaps what nobody else does, and ends the sessions of a host that left", async () => {
    await execText(channel, ["sh", "-c", "(setsid sleep 0.1 &) ; (setsid sleep 0.2 &)"]);
    await channel.exec({ argv: ["sleep", "4321"], tty: false });
    await channel.close();
    channel = await guest.connect({ lastLogSequence: guest.told.logs.at(-1)?.sequence ?? 0 });
    await new Promise((resolve) => setTimeout(resolve, 500));
    const { stdout } = await execText(channel, ["sh", "-c", "ps; grep -h ^State /proc/[0-9]*/status"]);
    expect(stdout).not.toMatch(/sleep 4321|zombie/);
  });

  test("stops when asked: the entrypoint's own handler runs, its status is told, the machine ends", async () => {
    channel.stop(20_000);
    await guest.told.until((told) => told.exits.length > 0);
    expect(guest.told.exits).toEqual([{ code: 7 }]);
    expect(guest.told.text("stdout")).toMatch(/stopping\n$/);
    await guest.ended;
  });
});

test("logs written while no host is there arrive once, in order; what did not fit is told", async () => {
  const guest = await bench.boot({
    argv: [
      "sh",
      "-c",
      "echo first; while [ ! -e /tmp/go ]; do sleep 0.1; done; seq 1 60000; echo small; sleep 0.5; " +
        "yes | head -c 2000000; echo last; exec sleep 600",
    ],
  });
  const first = await guest.connect();
  await guest.told.until((told) => told.text("stdout") === "first\n");
  await execText(first, ["touch", "/tmp/go"]);
  await first.close();
  await new Promise((resolve) => setTimeout(resolve, 6000));
  const lastLogSequence = guest.told.logs.at(-1)?.sequence ?? 0;
  const second = await guest.connect({ lastLogSequence });
  await guest.told.until((told) => told.text("stdout").endsWith("last\n"));
  const sequences = guest.told.logs.map((log) => log.sequence);
  expect(new Set(sequences).size).toBe(sequences.length);
  const gap = guest.told.dropped[0];
  expect(guest.told.dropped).toHaveLength(1);
  expect(sequences).toContain((gap?.toSequence ?? 0) + 1);
  expect(sequences.some((sequence) => sequence >= (gap?.fromSequence ?? 0) && sequence <= (gap?.toSequence ?? 0))).toBe(false);
  expect(sequences).toEqual([...sequences].sort((a, b) => a - b));
  second.stop(0);
  await guest.ended;
  expect(guest.told.exits).toEqual([{ signal: 15 }]);
});

test("an entrypoint that ignores its stop signal is killed after the grace", async () => {
  const guest = await bench.boot({ argv: ["sh", "-c", "trap '' INT; echo up; while :; do sleep 600; done"], stopSignal: 2 });
  const channel = await guest.connect();
  await guest.told.until((told) => told.text("stdout") === "up\n");
  channel.stop(300);
  await guest.told.until((told) => told.exits.length > 0);
  expect(guest.told.exits).toEqual([{ signal: 9 }]);
  await guest.ended;
});

test("the output of an entrypoint that ends at once is not lost", async () => {
  const guest = await bench.boot({ argv: ["sh", "-c", "seq 1 5000; echo bye >&2; exit 42"] });
  await guest.connect();
  await guest.told.until((told) => told.exits.length > 0);
  expect(guest.told.exits).toEqual([{ code: 42 }]);
  expect(guest.told.text("stdout").split("\n")).toHaveLength(5001);
  expect(guest.told.text("stderr")).toBe("bye\n");
  await guest.ended;
});

describe("a guest that cannot run says why", () => {
  test.each([
    ["a missing program", { argv: ["/no/such/program"] }, "COMMAND_NOT_FOUND", "/no/such/program"],
    ["a file that is not executable", { argv: ["/etc/not-executable"] }, "COMMAND_NOT_EXECUTABLE", "Permission denied"],
    ["an unknown user", { user: "nobody-here" }, "USER_UNKNOWN", "nobody-here"],
  ])("%s", async (_, config, code, words) => {
    const guest = await bench.boot(config);
    await guest.connect();
    await guest.told.until((told) => told.fatals.length > 0);
    expect(guest.told.fatals[0]).toMatchObject({ code, message: expect.stringContaining(words) });
    await guest.ended;
    expect(await guest.console()).toContain(`forge-init: fatal: ${code}: `);
  });

  test("a root altered where the start needs it", async () => {
    const diskPath = `${bench.folder}/altered`;
    await alterByte(bench.diskPath, diskPath, "BusyBox v");
    const guest = await bench.boot({}, { diskPath });
    await guest.connect();
    await guest.told.until((told) => told.fatals.length > 0);
    expect(guest.told.fatals[0]?.code).toBe("ROOT_TAMPERED");
    await guest.ended;
  });

  test("a root altered elsewhere: no altered byte is served, and the cell ends when it is met", async () => {
    const diskPath = `${bench.folder}/altered-elsewhere`;
    await alterByte(bench.diskPath, diskPath, "needle-in-the-file");
    const guest = await bench.boot({ argv: ["sh", "-c", "echo up; cat /www/needle; sleep 600"] }, { diskPath });
    await guest.connect();
    await guest.told.until((told) => told.fatals.length > 0);
    expect(guest.told.fatals[0]?.code).toBe("ROOT_TAMPERED");
    expect(guest.told.text("stdout")).not.toContain("file");
    await guest.ended;
  });
});
