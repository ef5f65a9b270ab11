// Keyed randomness: the numbers of fedlora/randomness.py, so that the page draws the same batches
// and starts from the same factors as Python does.
//
// A generator is Philox4x64-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", 2011)
// as NumPy has it: the key is the first 16 bytes of SHA-256 of the seed and the words, the counter
// begins at 0 and is raised before each block of four 64-bit numbers.

const M0 = 0xd2e7470ee14c6c93n, M1 = 0xca5a826395121157n; // multipliers
const W0 = 0x9e3779b97f4a7c15n, W1 = 0xbb67ae8584caa73bn; // what is added to the key each round
const LOW = (1n << 64n) - 1n;
const ROUNDS = 10;

/** The generator of a seed and words; numbers and texts are told apart, as in Python. */
export async function rng(seed, ...words) {
  const text = [seed, ...words].map((word) => {
    const kind = typeof word === "number" ? "int" : "str";
    return `${kind}:${[...String(word)].length}:${word};`;
  }).join("");
  const digest = await crypto.subtle.digest("SHA-256", new TextEncoder().encode(text));
  const view = new DataView(digest);
  return new Philox(view.getBigUint64(0, true), view.getBigUint64(8, true));
}

export class Philox {
  #key; #counter = 0n; #block = []; #half = null;

  constructor(key0, key1) {
    this.#key = [key0, key1];
  }

  /** 64 random bits, as a BigInt. */
  next64() {
    if (!this.#block.length) {
      this.#counter += 1n; // never past 2^64 here: that would be 590 billion GB
      let [c0, c1, c2, c3] = [this.#counter, 0n, 0n, 0n];
      let [k0, k1] = this.#key;
      for (let round = 0; round < ROUNDS; round += 1) {
        const p0 = M0 * c0, p1 = M1 * c2;
        [c0, c1, c2, c3] = [(p1 >> 64n) ^ c1 ^ k0, p1 & LOW, (p0 >> 64n) ^ c3 ^ k1, p0 & LOW];
        k0 = (k0 + W0) & LOW;
        k1 = (k1 + W1) & LOW;
      }
      this.#block = [c3, c2, c1, c0]; // taken from the end
    }
    return this.#block.pop();
  }

  /** 32 random bits; two of them are one of 64, the lower half first. */
  next32() {
    if (this.#half !== null) {
      const found = this.#half;
      this.#half = null;
      return found;
    }
    const both = this.next64();
    this.#half = Number(both >> 32n);
    return Number(both & 0xffffffffn);
  }

  /** A number in [low, high): Generator.uniform. */
  uniform(low, high) {
    return low + (high - low) * (Number(this.next64() >> 11n) / 9007199254740992);
  }

  /** A whole number in [0, most], as NumPy's shuffles draw it: bits, until they are small enough. */
  upTo(most) {
    if (most === 0) return 0; // draws nothing, as NumPy
    const mask = 2 ** (32 - Math.clz32(most)) - 1;
    for (;;) {
      const found = (this.next32() & mask) >>> 0;
      if (found <= most) return found;
    }
  }

  /** A new order of 0 … n - 1: Generator.permutation. */
  permutation(n) {
    const order = Array.from({ length: n }, (_, index) => index);
    for (let last = n - 1; last > 0; last -= 1) {
      const other = this.upTo(last);
      [order[last], order[other]] = [order[other], order[last]];
    }
    return order;
  }
}
