import { ForgeError } from "../../base/errors.ts";

const headerMagic = 0x5372_6448; // "HdrS" at 0x202
const lz4LegacyMagic = 0x184c_2102;
const maxKernelBytes = 512 * 1024 * 1024;
/** Each block of the legacy format unpacks to this, but for the last. */
const maxBlockBytes = 8 * 1024 * 1024;

/**
 * The ELF kernel inside a bzImage (kernel documentation: x86 boot protocol, payload_offset; LZ4 legacy frame). A VMM
 * starts it directly, which spares the guest the unpacking: under emulation that is a third of its boot.
 */
export function unpackKernel(image: Buffer): Buffer {
  if (image.length < 0x260 || image.readUInt32LE(0x202) !== headerMagic) throw unusable("it is no bzImage");
  const start = (image.readUInt8(0x1f1) + 1) * 512 + image.readUInt32LE(0x248);
  const payload = image.subarray(start, start + image.readUInt32LE(0x24c));
  if (payload.readUInt32LE(0) !== lz4LegacyMagic) throw unusable("it is not packed with LZ4");
  const sizeBytes = payload.readUInt32LE(payload.length - 4);
  if (sizeBytes > maxKernelBytes) throw unusable("it is too large");
  const kernel = Buffer.alloc(sizeBytes);
  let written = 0;
  for (let at = 4; at + 4 < payload.length;) {
    const blockBytes = payload.readUInt32LE(at);
    written += unpackBlock(payload.subarray(at + 4, at + 4 + blockBytes), kernel.subarray(written, written + maxBlockBytes));
    at += 4 + blockBytes;
  }
  if (written !== sizeBytes || kernel.toString("latin1", 1, 4) !== "ELF") throw unusable("its payload is not the kernel it should be");
  return kernel;
}

/** LZ4 block format: literals, then a match that may overlap what it makes. Returns how much it wrote. */
function unpackBlock(from: Buffer, to: Buffer): number {
  let read = 0;
  let written = 0;
  const readLength = (nibble: number): number => {
    let length = nibble;
    for (let more = nibble === 15; more;) {
      const byte = from.readUInt8(read++);
      length += byte;
      more = byte === 255;
    }
    return length;
  };
  while (read < from.length) {
    const token = from.readUInt8(read++);
    const literals = readLength(token >> 4);
    if (written + literals > to.length || read + literals > from.length) throw unusable("its payload is damaged");
    from.copy(to, written, read, read + literals);
    read += literals;
    written += literals;
    if (read >= from.length) break; // the last sequence has no match
    const distance = from.readUInt16LE(read);
    read += 2;
    const length = readLength(token & 15) + 4;
    if (distance === 0 || distance > written || written + length > to.length) throw unusable("its payload is damaged");
    for (let left = length; left > 0;) {
      const part = Math.min(left, distance);
      to.copyWithin(written, written - distance, written - distance + part);
      written += part;
      left -= part;
    }
  }
  return written;
}

function unusable(why: string): ForgeError {
  return new ForgeError("UNSUPPORTED", `the distribution's kernel image cannot be used: ${why}`);
}
