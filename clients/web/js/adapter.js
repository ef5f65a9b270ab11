// Adapters: fedlora's packed file in float32, the start of a training, and factors as they are fed.
//
// An adapter is {layers, config, base}; layers: path → {A: {shape, data}, B: {shape, data},
// scaling, kind}, sorted by path. A is (rank, …in), B is (out, rank), both float32.

import { rng } from "./random.js";
import { dumpTensors, numbersOf, parseTensors } from "./safetensors.js";
import { byCodePoint, canonicalJson, Float, PageError, sha256 } from "./strict.js";

const KEYS = ["base", "codec", "config", "layers", "provenance", "sha256", "tokenizer", "version"];

/** The bytes that fedlora's encode_packed gives for the same adapter and provenance. */
export async function encodePacked(adapter, provenance = {}) {
  const tensors = {}, layers = {};
  for (const [path, layer] of Object.entries(adapter.layers)) {
    tensors[`${path}.lora_A.weight`] = layer.A;
    tensors[`${path}.lora_B.weight`] = layer.B;
    layers[path] = {
      kind: layer.kind, A: layer.A.shape, B: layer.B.shape, scaling: new Float(layer.scaling),
    };
  }
  const body = dumpTensors(tensors);
  const start = 8 + Number(new DataView(body.buffer).getBigUint64(0, true));
  const header = {
    version: 1, config: configWithFloats(adapter.config), base: adapter.base, tokenizer: null,
    sha256: await sha256(body.subarray(start)), codec: "fp32", layers, provenance,
  };
  return dumpTensors(tensors, { fedlora: canonicalJson(header) });
}

/** Read a packed file and check it against a bundle's manifest. */
export async function decodePacked(bytes, manifest, where = "the file") {
  const file = parseTensors(bytes, where);
  let header;
  try {
    header = JSON.parse(file.metadata.fedlora);
  } catch {
    throw new PageError(`${where}: expected an adapter that fedlora packed; make one with ` +
      "fedlora convert");
  }
  const same = canonicalJson(Object.keys(header ?? {}).sort()) === canonicalJson(KEYS);
  if (!same || header.version !== 1) {
    throw new PageError(`${where}: expected version 1 of the packed format`);
  }
  if (header.codec !== "fp32") {
    throw new PageError(`${where}: expected float32 factors, found ${header.codec}; unpack them ` +
      "with fedlora convert --codec fp32");
  }
  if (header.sha256 !== await sha256(file.buffer)) {
    throw new PageError(`${where}: its SHA-256 is not the one it states; it is damaged or was ` +
      "changed, get it again");
  }
  if (/dora$/.test(header.config?.variant)) {
    throw new PageError(`${where}: a DoRA adapter needs the norms of the base's weights and ` +
      "cannot be fed to a page; merge it with fedlora export --merge");
  }
  if (manifest.merged !== null) {
    throw new PageError("an adapter is merged into this bundle's weights, so it takes no other");
  }
  if (header.base !== null && header.base !== manifest.base) {
    throw new PageError(`${where}: expected an adapter of the base ${manifest.base.slice(0, 12)} ` +
      `(${manifest.base_id}), found one of ${String(header.base).slice(0, 12)}`);
  }
  const layers = {};
  for (const path of Object.keys(header.layers).sort(byCodePoint)) {
    layers[path] = layerOf(path, header.layers[path], file, manifest, where);
  }
  if (Object.keys(file.tensors).length !== 2 * Object.keys(layers).length) {
    throw new PageError(`${where}: expected two tensors for each layer that it names`);
  }
  return { layers, config: header.config, base: header.base };
}

/** The adapter that training starts from: A₀ uniform in ±1/√fan-in, keyed by seed and path; B 0. */
export async function initialAdapter(manifest, seed) {
  const { lora } = manifest, layers = {};
  for (const path of Object.keys(manifest.layers).sort(byCodePoint)) {
    if (!isTarget(path, manifest)) continue;
    const spec = manifest.layers[path];
    const fan = spec.in_shape.reduce((a, b) => a * b, 1);
    const generator = await rng(seed, "init", path);
    const bound = 1 / Math.sqrt(fan);
    const A = Float32Array.from({ length: lora.rank * fan }, () => generator.uniform(-bound, bound));
    layers[path] = {
      A: { shape: [lora.rank, ...spec.in_shape], data: A },
      B: {
        shape: [spec.out_features, lora.rank],
        data: new Float32Array(spec.out_features * lora.rank),
      },
      scaling: lora.lora_alpha / (lora.variant === "rslora" ? Math.sqrt(lora.rank) : lora.rank),
      kind: spec.kind,
    };
  }
  return { layers, config: lora, base: manifest.base };
}

/** Zeros of rank 1 for every factor: the base, for graphs whose factors are required inputs. */
export function zeroFactors(manifest, word = "lora") {
  const factors = {};
  for (const [path, spec] of Object.entries(manifest.layers)) {
    const fan = spec.in_shape.reduce((a, b) => a * b, 1);
    factors[`${path}.${word}_A.weight`] = {
      shape: [1, ...spec.in_shape], data: new Float32Array(fan),
    };
    factors[`${path}.${word}_B.weight`] = {
      shape: [spec.out_features, 1], data: new Float32Array(spec.out_features),
    };
  }
  return factors;
}

/** What is fed for an adapter, null for the base: scalings folded into B, zeros for the rest. */
export function factorsOf(adapter, manifest) {
  const factors = zeroFactors(manifest);
  for (const [path, layer] of Object.entries(adapter?.layers ?? {})) {
    factors[`${path}.lora_A.weight`] = layer.A;
    factors[`${path}.lora_B.weight`] = {
      shape: layer.B.shape, data: layer.B.data.map((value) => value * Math.fround(layer.scaling)),
    };
  }
  return factors;
}

function layerOf(path, about, file, manifest, where) {
  const spec = Object.hasOwn(manifest.layers, path) && manifest.layers[path];
  if (!spec) throw new PageError(`${where}: the bundle takes no factors for layer ${path}`);
  const rank = about.A?.[0];
  const expected = [[rank, ...spec.in_shape], [spec.out_features, rank]];
  const factors = ["A", "B"].map((part, index) => {
    const tensor = file.tensors[`${path}.lora_${part}.weight`];
    const shapes = [about[part], tensor?.shape].map((shape) => JSON.stringify(shape));
    const fits = shapes.every((shape) => shape === JSON.stringify(expected[index]));
    if (!fits || tensor.dtype !== "F32" || about.kind !== spec.kind || !(rank >= 1)) {
      throw new PageError(`${where}, layer ${path}, ${part}: expected float32 of shape ` +
        `${JSON.stringify(expected[index])}, found ${shapes[1]}`);
    }
    const data = numbersOf(tensor);
    if (!data.every(Number.isFinite)) {
      throw new PageError(`${where}, layer ${path}, ${part}: expected finite numbers`);
    }
    return { shape: tensor.shape, data };
  });
  if (!Number.isFinite(about.scaling)) throw new PageError(`${where}: no scaling for ${path}`);
  return { A: factors[0], B: factors[1], scaling: about.scaling, kind: about.kind };
}

/** Whether a new adapter has this layer; what the page cannot decide as Python does, it refuses. */
function isTarget(path, manifest) {
  const { lora } = manifest, targets = lora.target_modules;
  const plain = !Object.keys(lora.rank_pattern).length && !Object.keys(lora.alpha_pattern).length &&
    lora.layers === null && lora.layers_to_transform === null && !/dora$/.test(lora.variant);
  if (!plain || (typeof targets === "string" && targets !== "all-linear")) {
    throw new PageError("a new adapter: expected one rank for all layers, chosen by name or " +
      "all-linear; import an adapter to start from, or export the bundle with such a choice");
  }
  if (targets === "all-linear") {
    return manifest.layers[path].kind === "linear" && !manifest.layers[path].is_output;
  }
  return targets.some((name) => path === name || path.endsWith(`.${name}`));
}

function configWithFloats(config) {
  const alphas = Object.entries(config.alpha_pattern).map(([key, alpha]) => [key, new Float(alpha)]);
  return {
    ...config, alpha_pattern: Object.fromEntries(alphas),
    lora_alpha: new Float(config.lora_alpha), lora_dropout: new Float(config.lora_dropout),
  };
}
