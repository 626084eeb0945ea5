import { text } from "node:stream/consumers";
import { pino } from "pino";
import { inNetns, openTap } from "../base/linux.ts";
import { buildDir } from "./cell.fixture.ts";
import { type CellSpec, IsoCells } from "./cells.ts";
import { qemuDriver } from "./vmm/qemu.ts";

/** For tests: a process of its own that starts the cell its stdin describes and then waits to be killed. */
const { dir, spec } = JSON.parse(await text(process.stdin)) as { dir: string; spec: CellSpec };
const tapFd = inNetns(spec.network.netnsPath, () => openTap("tap0", { persist: false }));
const rootfs = { verifySealed: async () => undefined };
const cells = await IsoCells.open({ dir, buildDir, vmm: qemuDriver("tcg", ""), rootfs, log: pino({ level: "silent" }) });
await cells.start({ ...spec, network: { ...spec.network, tapFd } });
process.stdout.write("started\n");
setInterval(() => undefined, 60_000);
