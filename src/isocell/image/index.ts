/** Images: from a reference to a signed, checked, bootable root file system. */
export {
  formatImageReference,
  type ImageReference,
  isLoopback,
  type LocalReference,
  parseImageReference,
  type RegistryReference,
} from "./reference.ts";
export { digestOf, ImageStore, maximumBlobBytes } from "./store.ts";
export type { ImageManifest, OciImageConfig } from "./manifest.ts";
export { type BlobToPush, normalise, pushPlan, type ResolvedImage, signImage } from "./layout.ts";
export { pull, type PullOptions } from "./registry.ts";
export {
  describePublicKey,
  generateSigningKey,
  publicKeyOf,
  signDigest,
  type SigningKey,
  type SigningKeyType,
  type TrustedKeyPem,
  verifySignatures,
} from "./signature.ts";
export { blockSizeBytes, type RootfsArtifact, RootfsCache } from "./rootfs.ts";
export { buildImage, type BuildOptions, type BuiltImage } from "./build.ts";
