import { closeSync, constants, openSync, statfsSync, unlinkSync } from "node:fs";
import { isIPv4, isIPv6 } from "node:net";
import { getSystemErrorName } from "node:util";
import koffi from "koffi";
import { type ErrorCode, ForgeError } from "./errors.ts";

/**
 * The kernel's own interfaces that Node does not have; the one file with foreign calls. Structures and numbers are the
 * kernel's, alike on x86-64 and arm64 (little-endian, generic ioctl encoding). Libraries load on first use, so importing
 * this file asks nothing of the machine. Every failed call throws a ForgeError whose details name call and errno.
 */

const CLONE_NEWNET = 0x40000000;
const MS_BIND = 4096;
const MNT_DETACH = 2;
const NSFS_MAGIC = 0x6e736673;

// Network namespaces --------------------------------------------------------------------------------------------

/**
 * Runs `body` inside the network namespace that `path` names, and comes back. `body` must be synchronous: nothing
 * else may run on this thread meanwhile. If the way back fails the process aborts, for all else would run elsewhere.
 */
export function inNetns<T>(path: string, body: () => T): T {
  const target = openSync(path, constants.O_RDONLY);
  try {
    return andBack(() => check("setns", libc().setns(target, CLONE_NEWNET)), body);
  } finally {
    closeSync(target);
  }
}

/** Makes a new network namespace, held by a file at `path`, and runs `body` inside it. If that throws, nothing is left. */
export function createNetns<T>(path: string, body: () => T): T {
  closeSync(openSync(path, constants.O_RDONLY | constants.O_CREAT | constants.O_EXCL, 0o600));
  try {
    return andBack(
      () => check("unshare", libc().unshare(CLONE_NEWNET)),
      () => {
        check("mount", libc().mount("/proc/thread-self/ns/net", path, null, MS_BIND, null));
        return body();
      },
    );
  } catch (error) {
    removeNetns(path);
    throw error;
  }
}

/** Lets go of the namespace: it ends when no process is in it any more. Absent is fine. */
export function removeNetns(path: string): void {
  if (isNetns(path)) check("umount", libc().umount2(path, MNT_DETACH));
  try {
    unlinkSync(path);
  } catch (error) {
    if (!isErrno(error, "ENOENT")) throw error;
  }
}

/** Whether `path` holds a namespace, and not only the empty file that a crash or a reboot left. */
export function isNetns(path: string): boolean {
  try {
    return statfsSync(path).type === NSFS_MAGIC;
  } catch (error) {
    if (isErrno(error, "ENOENT")) return false;
    throw error;
  }
}

function andBack<T>(leave: () => void, body: () => T): T {
  const home = openSync("/proc/thread-self/ns/net", constants.O_RDONLY);
  try {
    leave();
    try {
      return body();
    } finally {
      if (libc().setns(home, CLONE_NEWNET) !== 0) process.abort();
    }
  } finally {
    closeSync(home);
  }
}

// Network devices -----------------------------------------------------------------------------------------------

const TUNSETIFF = 0x400454ca;
const TUNSETPERSIST = 0x400454cb;
const IFF_TAP_NO_PI_VNET_HDR = 0x0002 | 0x1000 | 0x4000;

/**
 * A descriptor of the tap `name` in the current network namespace; makes the tap where there is none. Frames carry a
 * virtio-net header. A persistent tap outlives its descriptors.
 */
export function openTap(name: string, options: { persist: boolean }): number {
  const fd = openSync("/dev/net/tun", constants.O_RDWR);
  try {
    const request = Buffer.alloc(40);
    request.write(name, 0, 15, "latin1");
    request.writeUInt16LE(IFF_TAP_NO_PI_VNET_HDR, 16);
    check("ioctl TUNSETIFF", libc().ioctl(fd, TUNSETIFF, request));
    if (options.persist) check("ioctl TUNSETPERSIST", libc().ioctlValue(fd, TUNSETPERSIST, 1));
    return fd;
  } catch (error) {
    closeSync(fd);
    throw error;
  }
}

/** The index of a device of the current network namespace, or undefined where there is none of this name. */
export function interfaceIndex(name: string): number | undefined {
  const index = libc().if_nametoindex(name);
  return index === 0 ? undefined : index;
}

/** Sends rtnetlink requests (each with NLM_F_ACK) and fails with the first that the kernel refuses. */
export function netlinkRequest(messages: readonly Buffer[]): void {
  const AF_NETLINK = 16;
  const MSG_DONTWAIT = 0x40; // the kernel has answered when send returns
  const fd = check("socket", libc().socket(AF_NETLINK, SOCK_RAW | SOCK_CLOEXEC, 0));
  try {
    const batch = Buffer.concat(messages);
    check("send", libc().send(fd, batch, batch.length, 0));
    const answer = Buffer.alloc(16_384);
    for (let acknowledged = 0; acknowledged < messages.length;) {
      const length = check("recv", libc().recv(fd, answer, answer.length, MSG_DONTWAIT));
      for (let offset = 0; offset + 20 <= length; offset += (answer.readUInt32LE(offset) + 3) & ~3) {
        const result = answer.readInt32LE(offset + 16); // struct nlmsgerr behind its nlmsghdr
        if (result !== 0) throw systemError(`rtnetlink request ${acknowledged}`, -result);
        acknowledged++;
      }
    }
  } finally {
    closeSync(fd);
  }
}

// Sockets -------------------------------------------------------------------------------------------------------

const SOCK_STREAM = 1;
const SOCK_RAW = 3;
const SOCK_CLOEXEC = 0o2000000;

/** A listening TCP socket (close-on-exec) on a literal address. PORT_TAKEN where another listens. */
export function listenTcp(address: string, port: number, options: { reusePort: boolean }): number {
  const SOL_SOCKET = 1;
  const SO_REUSEADDR = 2;
  const SO_REUSEPORT = 15;
  const name = socketAddress(address, port);
  const fd = check("socket", libc().socket(name.readUInt16LE(0), SOCK_STREAM | SOCK_CLOEXEC, 0));
  try {
    const on = Buffer.from([1, 0, 0, 0]);
    check("setsockopt", libc().setsockopt(fd, SOL_SOCKET, SO_REUSEADDR, on, on.length));
    if (options.reusePort) check("setsockopt", libc().setsockopt(fd, SOL_SOCKET, SO_REUSEPORT, on, on.length));
    check("bind", libc().bind(fd, name, name.length));
    check("listen", libc().listen(fd, 1024));
    return fd;
  } catch (error) {
    closeSync(fd);
    if (isErrno(error, "EADDRINUSE")) throw new ForgeError("PORT_TAKEN", `port ${port} of ${address} is in use`, { cause: error });
    throw error;
  }
}

/** struct sockaddr_in or sockaddr_in6. */
function socketAddress(address: string, port: number): Buffer {
  const AF_INET = 2;
  const AF_INET6 = 10;
  const name = Buffer.alloc(isIPv6(address) ? 28 : 16);
  name.writeUInt16LE(isIPv6(address) ? AF_INET6 : AF_INET, 0);
  name.writeUInt16BE(port, 2);
  if (isIPv4(address)) Buffer.from(address.split(".").map(Number)).copy(name, 4);
  else if (isIPv6(address)) ipv6Bytes(address).copy(name, 8);
  else throw new ForgeError("INVALID_INPUT", `not an IP address: ${address}`);
  return name;
}

function ipv6Bytes(address: string): Buffer {
  const AF_INET6 = 10;
  const bytes = Buffer.alloc(16);
  if (libc().inet_pton(AF_INET6, address, bytes) !== 1) throw new ForgeError("INVALID_INPUT", `not an IP address: ${address}`);
  return bytes;
}

// Processes -----------------------------------------------------------------------------------------------------

/** A descriptor that means this very process even after its number is used again; undefined where there is no such process. */
export function pidfdOpen(pid: number): number | undefined {
  const fd = libc().pidfd_open(pid, 0);
  if (fd >= 0) return fd;
  const error = systemError("pidfd_open", koffi.errno());
  if (isErrno(error, "ESRCH")) return undefined;
  throw error;
}

/** Sends a signal; false where the process has ended. */
export function pidfdSendSignal(pidfd: number, signal: number): boolean {
  if (libc().pidfd_send_signal(pidfd, signal, null, 0) === 0) return true;
  const error = systemError("pidfd_send_signal", koffi.errno());
  if (isErrno(error, "ESRCH")) return false;
  throw error;
}

/** Whether the process ends within the time. Waits without polling; the caller keeps and closes the descriptor. */
export function waitForExit(pidfd: number, timeoutMs: number): Promise<boolean> {
  return new Promise((resolve) => {
    const finish = (ended: boolean): void => {
      clearTimeout(timer);
      handle.stop();
      handle.close();
      resolve(ended);
    };
    const timer = setTimeout(() => finish(false), timeoutMs);
    const handle = koffi.node.poll(pidfd, { readable: true }, () => finish(true));
  });
}

// Errors --------------------------------------------------------------------------------------------------------

/** Whether a failure of Node or of this file carries this errno name. */
export function isErrno(thrown: unknown, name: string): boolean {
  if (thrown instanceof ForgeError) return thrown.details?.["errno"] === name;
  return thrown instanceof Error && "code" in thrown && thrown.code === name;
}

const codeOfErrno: Readonly<Record<string, ErrorCode>> = {
  EADDRINUSE: "PORT_TAKEN",
  EADDRNOTAVAIL: "INVALID_INPUT",
  EMFILE: "NO_ROOM",
  ENFILE: "NO_ROOM",
  ENODEV: "UNSUPPORTED",
  ENOMEM: "NO_ROOM",
  ENOSPC: "NO_ROOM",
  ENOSYS: "UNSUPPORTED",
  EPERM: "UNSUPPORTED",
};

/** The failure of a system call as an error of ours. */
export function systemError(call: string, errno: number): ForgeError {
  const name = getSystemErrorName(-errno);
  return new ForgeError(codeOfErrno[name] ?? "INTERNAL", `${call} failed: ${name}`, { details: { call, errno: name } });
}

function check(call: string, result: number): number {
  if (result < 0) throw systemError(call, koffi.errno());
  return result;
}

// libc ----------------------------------------------------------------------------------------------------------

type Pointer = Buffer | null;

interface Libc {
  setns(fd: number, kind: number): number;
  unshare(flags: number): number;
  mount(source: string, target: string, type: string | null, flags: number, data: string | null): number;
  umount2(target: string, flags: number): number;
  ioctl(fd: number, request: number, argument: Pointer): number;
  ioctlValue(fd: number, request: number, argument: number): number;
  if_nametoindex(name: string): number;
  socket(family: number, kind: number, protocol: number): number;
  setsockopt(fd: number, level: number, option: number, value: Buffer, length: number): number;
  bind(fd: number, address: Buffer, length: number): number;
  listen(fd: number, backlog: number): number;
  send(fd: number, data: Buffer, length: number, flags: number): number;
  recv(fd: number, data: Buffer, length: number, flags: number): number;
  inet_pton(family: number, text: string, bytes: Buffer): number;
  pidfd_open(pid: number, flags: number): number;
  pidfd_send_signal(pidfd: number, signal: number, info: Pointer, flags: number): number;
}

let loadedLibc: Libc | undefined;

function libc(): Libc {
  return (loadedLibc ??= loadLibc());
}

function loadLibc(): Libc {
  const library = koffi.load("libc.so.6");
  return {
    setns: library.func("int setns(int, int)"),
    unshare: library.func("int unshare(int)"),
    mount: library.func("int mount(const char *, const char *, const char *, unsigned long, const char *)"),
    umount2: library.func("int umount2(const char *, int)"),
    ioctl: library.func("int ioctl(int, unsigned long, void *)"),
    ioctlValue: library.func("ioctl", "int", ["int", "unsigned long", "unsigned long"]),
    if_nametoindex: library.func("unsigned int if_nametoindex(const char *)"),
    socket: library.func("int socket(int, int, int)"),
    setsockopt: library.func("int setsockopt(int, int, int, const void *, unsigned int)"),
    bind: library.func("int bind(int, const void *, unsigned int)"),
    listen: library.func("int listen(int, int)"),
    send: library.func("long send(int, const void *, size_t, int)"),
    recv: library.func("long recv(int, void *, size_t, int)"),
    inet_pton: library.func("int inet_pton(int, const char *, void *)"),
    pidfd_open: library.func("int pidfd_open(int, unsigned int)"),
    pidfd_send_signal: library.func("int pidfd_send_signal(int, int, void *, unsigned int)"),
  };
}

// libbpf --------------------------------------------------------------------------------------------------------

/** libbpf 1.x as it is: integers are negative errnos on failure, pointers are null and set errno. bpf.ts gives it sense. */
export interface Libbpf {
  bpf_object__open_file(path: string, options: null): bigint | null;
  bpf_object__load(object: bigint): number;
  bpf_object__close(object: bigint): void;
  bpf_object__find_map_by_name(object: bigint, name: string): bigint | null;
  bpf_map__set_initial_value(map: bigint, value: Buffer, size: number): number;
  bpf_object__find_program_by_name(object: bigint, name: string): bigint | null;
  bpf_program__fd(program: bigint): number;
  bpf_tc_hook_create(hook: Buffer): number;
  bpf_tc_attach(hook: Buffer, options: Buffer): number;
  bpf_tc_query(hook: Buffer, options: Buffer): number;
  bpf_prog_get_fd_by_id(id: number): number;
  bpf_map_get_fd_by_id(id: number): number;
  bpf_obj_get_info_by_fd(fd: number, info: Buffer, length: Buffer): number;
  bpf_map_update_elem(fd: number, key: Buffer, value: Buffer, flags: number): number;
  bpf_map_lookup_elem(fd: number, key: Buffer, value: Buffer): number;
  bpf_map_delete_elem(fd: number, key: Buffer): number;
  bpf_map_get_next_key(fd: number, key: Buffer | null, next: Buffer): number;
  bpf_prog_test_run_opts(fd: number, options: Buffer): number;
  libbpf_num_possible_cpus(): number;
}

let loadedLibbpf: Libbpf | undefined;

export function libbpf(): Libbpf {
  return (loadedLibbpf ??= loadLibbpf());
}

/** The errno of the foreign call made last. */
export function lastErrno(): number {
  return koffi.errno();
}

/** Where a buffer's bytes are, for structures that point at others. The caller keeps the buffer alive. */
export function addressOf(buffer: Buffer): bigint {
  return koffi.address(buffer);
}

function loadLibbpf(): Libbpf {
  let library;
  try {
    library = koffi.load("libbpf.so.1");
  } catch (error) {
    throw new ForgeError("UNSUPPORTED", "libbpf 1 is not installed", { cause: error });
  }
  // Failures come back as numbers; what libbpf prints about them would go past our log.
  library.func("void *libbpf_set_print(void *)")(null);
  return {
    bpf_object__open_file: library.func("void *bpf_object__open_file(const char *, void *)"),
    bpf_object__load: library.func("int bpf_object__load(void *)"),
    bpf_object__close: library.func("void bpf_object__close(void *)"),
    bpf_object__find_map_by_name: library.func("void *bpf_object__find_map_by_name(void *, const char *)"),
    bpf_map__set_initial_value: library.func("int bpf_map__set_initial_value(void *, const void *, size_t)"),
    bpf_object__find_program_by_name: library.func("void *bpf_object__find_program_by_name(void *, const char *)"),
    bpf_program__fd: library.func("int bpf_program__fd(void *)"),
    bpf_tc_hook_create: library.func("int bpf_tc_hook_create(void *)"),
    bpf_tc_attach: library.func("int bpf_tc_attach(void *, void *)"),
    bpf_tc_query: library.func("int bpf_tc_query(void *, void *)"),
    bpf_prog_get_fd_by_id: library.func("int bpf_prog_get_fd_by_id(uint32_t)"),
    bpf_map_get_fd_by_id: library.func("int bpf_map_get_fd_by_id(uint32_t)"),
    bpf_obj_get_info_by_fd: library.func("int bpf_obj_get_info_by_fd(int, void *, void *)"),
    bpf_map_update_elem: library.func("int bpf_map_update_elem(int, const void *, const void *, uint64_t)"),
    bpf_map_lookup_elem: library.func("int bpf_map_lookup_elem(int, const void *, void *)"),
    bpf_map_delete_elem: library.func("int bpf_map_delete_elem(int, const void *)"),
    bpf_map_get_next_key: library.func("int bpf_map_get_next_key(int, const void *, void *)"),
    bpf_prog_test_run_opts: library.func("int bpf_prog_test_run_opts(int, void *)"),
    libbpf_num_possible_cpus: library.func("int libbpf_num_possible_cpus()"),
  };
}
