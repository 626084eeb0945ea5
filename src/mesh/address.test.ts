import { isIPv6 } from "node:net";
import fc from "fast-check";
import { describe, expect, test } from "vitest";
import {
  cellAddress,
  formatAddress,
  gatewayAddress,
  gatewayMac,
  guestMac,
  newCellIdentifier,
  newInstallationPrefix,
  parseAddress,
} from "./address.ts";

const prefix = "fd12:3456:789a::/48";

describe("addresses of the installation", () => {
  test("are composed of prefix, tenant network and cell identifier", () => {
    expect(cellAddress(prefix, 0xab, "0123456789abcdef")).toBe("fd12:3456:789a:ab:123:4567:89ab:cdef");
    expect(gatewayAddress(prefix)).toBe("fd12:3456:789a::1");
  });

  test("begin with a random locally assigned RFC 4193 prefix", () => {
    const drawn = Array.from({ length: 100 }, () => newInstallationPrefix());
    expect(new Set(drawn).size).toBe(100);
    for (const each of drawn) expect(parseAddress(gatewayAddress(each))[0]).toBe(0xfd);
  });

  test("of two cells differ, and stay apart from the gateway's", () => {
    fc.assert(
      fc.property(fc.integer({ min: 1, max: 0xffff }), (network) => {
        const one = cellAddress(prefix, network, newCellIdentifier());
        expect(one).not.toBe(cellAddress(prefix, network, newCellIdentifier()));
        expect(one).not.toBe(gatewayAddress(prefix));
        expect(parseAddress(one).readUInt16BE(6)).toBe(network);
      }),
    );
  });

  test.each([
    [prefix, 0, "0123456789abcdef"],
    [prefix, 65_536, "0123456789abcdef"],
    [prefix, 1.5, "0123456789abcdef"],
    [prefix, 1, "0000000000000000"],
    [prefix, 1, "0000000000000001"],
    [prefix, 1, "fdffffffffffff80"],
    [prefix, 1, "fdffffffffffffff"],
    [prefix, 1, "0123456789ABCDEF"],
    [prefix, 1, "0123"],
    ["fd12:3456:789a::", 1, "0123456789abcdef"],
    ["fd12:3456:789a:1::/48", 1, "0123456789abcdef"],
    ["2001:db8::/48", 1, "0123456789abcdef"],
  ])("are refused for prefix %s, network %s, identifier %s", (wrongPrefix, network, identifier) => {
    expect(() => cellAddress(wrongPrefix, network, identifier)).toThrow(expect.objectContaining({ code: "INVALID_INPUT" }));
  });
});

describe("a MAC of a guest", () => {
  test("is stable, locally administered, unicast, and never the gateway's", () => {
    fc.assert(
      fc.property(fc.string(), (cellId) => {
        const mac = guestMac(cellId);
        expect(mac).toMatch(/^02:f0(:[0-9a-f]{2}){4}$/);
        expect(mac).toBe(guestMac(cellId));
        expect(mac).not.toBe(gatewayMac);
      }),
    );
  });
});

describe("text of an IPv6 address", () => {
  /** RFC 5952 section 4, and the examples of its errata. */
  test.each([
    ["2001:0db8::0001", "2001:db8::1"],
    ["2001:db8:0:0:0:0:2:1", "2001:db8::2:1"],
    ["2001:db8:0:1:1:1:1:1", "2001:db8:0:1:1:1:1:1"],
    ["2001:0:0:1:0:0:0:1", "2001:0:0:1::1"],
    ["2001:db8:0:0:1:0:0:1", "2001:db8::1:0:0:1"],
    ["2001:DB8::AAAA", "2001:db8::aaaa"],
    ["0:0:0:0:0:0:0:0", "::"],
    ["1:0:0:0:0:0:0:0", "1::"],
  ])("%s becomes %s", (text, canonical) => {
    expect(formatAddress(parseAddress(text))).toBe(canonical);
  });

  test.each([
    "",
    ":",
    ":::",
    "1::2::3",
    "1:2:3:4:5:6:7",
    "1:2:3:4:5:6:7:8:9",
    "1:2:3:4:5:6:7::8",
    "12345::",
    "::g",
    "fe80::1%eth0",
    "::ffff:192.0.2.1",
    "1:",
  ])("%j is refused", (text) => {
    expect(() => parseAddress(text)).toThrow(expect.objectContaining({ code: "INVALID_INPUT" }));
  });

  test("comes back from 16 bytes whatever they are, and is what Node takes for an address", () => {
    fc.assert(
      fc.property(fc.array(fc.constantFrom(0, 0, 0, 1, 0xabcd, 0xffff), { minLength: 8, maxLength: 8 }), (groups) => {
        const bytes = Buffer.alloc(16);
        groups.forEach((group, index) => bytes.writeUInt16BE(group, index * 2));
        const text = formatAddress(bytes);
        expect(parseAddress(text)).toEqual(bytes);
        expect(isIPv6(text)).toBe(true);
        expect(new URL(`http://[${text}]`).hostname).toBe(`[${text}]`);
      }),
      { numRuns: 1000 },
    );
  });

  test("is only accepted where Node accepts it too", () => {
    const pieces = fc.array(fc.constantFrom(":", "::", "0", "1", "abcd", "FFFF", "12345", "g", ".", "%", " "), { maxLength: 18 });
    fc.assert(
      fc.property(
        fc.oneof(
          fc.string({ maxLength: 60 }),
          pieces.map((parts) => parts.join("")),
        ),
        (text) => {
          const accepted = isAccepted(text);
          if (accepted) expect(isIPv6(text)).toBe(true);
          else expect(isIPv6(text) && !/[.%]/.test(text)).toBe(false);
        },
      ),
      { numRuns: 5000 },
    );
  });
});

function isAccepted(text: string): boolean {
  try {
    parseAddress(text);
    return true;
  } catch {
    return false;
  }
}
