// AdamW over one flat float32 row, in place: fedlora/device/optimizers.py, operation by operation.
//
// Each Math.fround stands where NumPy stores a float32; without them the steps would be those of
// another, double precision optimizer.

const BETAS = [0.9, 0.999], EPS = 1e-8;
const f32 = Math.fround;

export class AdamW {
  #rate; #decay; #steps = 0; #first; #second;

  constructor(size, learningRate, weightDecay = 0) {
    this.#rate = learningRate;
    this.#decay = weightDecay;
    this.#first = new Float32Array(size);
    this.#second = new Float32Array(size);
  }

  /** Change `row` by its gradient, both Float32Array. */
  step(row, gradient) {
    this.#steps += 1;
    const first = this.#first, second = this.#second;
    const shrink = f32(1 - this.#rate * this.#decay);
    const near1 = f32(1 - BETAS[0]), keep2 = f32(BETAS[1]), near2 = f32(1 - BETAS[1]);
    const root = f32(Math.sqrt(1 - BETAS[1] ** this.#steps)), eps = f32(EPS);
    const size = f32(this.#rate / (1 - BETAS[0] ** this.#steps));
    for (let i = 0; i < row.length; i += 1) {
      const slope = gradient[i];
      const value = this.#decay ? f32(row[i] * shrink) : row[i];
      first[i] += f32(f32(slope - first[i]) * near1);
      second[i] = f32(second[i] * keep2) + f32(f32(slope * slope) * near2);
      const scale = f32(f32(f32(Math.sqrt(second[i])) / root) + eps);
      row[i] = value - f32(f32(first[i] / scale) * size);
    }
  }
}
