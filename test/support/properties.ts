import fc from "fast-check";

/**
 * Properties are tried with the same values each time, so that a change is judged and not its luck; FORGE_SEED=N tries
 * others. A failure names its seed and path.
 */
const { FORGE_SEED: seed } = process.env;
fc.configureGlobal({ seed: seed === undefined ? 20_261_121 : Number(seed) });
