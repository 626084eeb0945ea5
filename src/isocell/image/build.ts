import { ForgeError } from "../../base/errors.ts";

export interface BuiltImage {
  readonly layout: string;
  readonly digest: string;
}

/** Builds the image that `image.yaml` in `folder` describes, from the distribution's packages, into an OCI layout. */
export async function buildImage(folder: string, options: { output?: string; sourceDateEpoch?: number } = {}): Promise<BuiltImage> {
  throw new ForgeError("INTERNAL", `not written yet: ${folder} ${options.output}`);
}
