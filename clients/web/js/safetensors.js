// safetensors files of float32 and uint8 tensors: a strict reader and fedlora's canonical writer.
//
// Eight bytes with the length of the header, the header (JSON: name → dtype, shape, byte range) and
// one buffer. As in fedlora/formats/tensors.py the ranges must tile the buffer, and the same
// tensors give the same bytes.

import { byCodePoint, PageError } from "./strict.js";

const MAX_HEADER = 1 << 20;
const WIDTHS = { F32: 4, F16: 2, U8: 1, I8: 1 };

/** Read bytes: {tensors: {name: {dtype, shape, bytes}}, metadata, buffer}. */
export function parseTensors(data, where = "file") {
  const wrong = (text) => new PageError(`${where}: expected a safetensors file, found ${text}`);
  if (data.length < 8) throw wrong(`${data.length} bytes`);
  const view = new DataView(data.buffer, data.byteOffset, data.byteLength);
  const size = view.getBigUint64(0, true);
  if (size > BigInt(Math.min(MAX_HEADER, data.length - 8))) throw wrong("a header that is too long");
  const start = 8 + Number(size);
  let header;
  try {
    header = JSON.parse(new TextDecoder("utf-8", { fatal: true }).decode(data.subarray(8, start)));
  } catch {
    throw wrong("a header that is not JSON");
  }
  const { __metadata__: metadata = {}, ...entries } = header;
  const buffer = data.subarray(start);
  const tensors = {};
  let end = 0;
  const inOrder = Object.entries(entries)
    .sort((a, b) => (a[1]?.data_offsets?.[0] ?? 0) - (b[1]?.data_offsets?.[0] ?? 0));
  for (const [name, entry] of inOrder) {
    const { dtype, shape, data_offsets: [from, to] = [] } = entry ?? {};
    const width = WIDTHS[dtype];
    if (!width) throw wrong(`tensor ${name.slice(0, 80)} of type ${dtype}; float32 is read here`);
    const sizes = Array.isArray(shape) && shape.every((n) => Number.isSafeInteger(n) && n >= 0);
    if (!sizes || from !== end || to - from !== shape.reduce((a, b) => a * b, width)) {
      throw wrong(`tensor ${name.slice(0, 80)} with a shape or place that is not its own`);
    }
    end = to;
    if (end > buffer.length) throw wrong("a part of one: it breaks off");
    tensors[name] = { dtype, shape, bytes: buffer.subarray(from, to) };
  }
  if (end !== buffer.length) throw wrong("bytes that belong to no tensor");
  return { tensors, metadata, buffer };
}

/** A tensor's numbers, copied: its bytes may begin anywhere. */
export function numbersOf(tensor) {
  const bytes = tensor.bytes.slice();
  return tensor.dtype === "F32" ? new Float32Array(bytes.buffer) : bytes;
}

/** The bytes of a file with float32 tensors {name: {shape, data}}, in order of their names. */
export function dumpTensors(tensors, metadata = null) {
  const names = Object.keys(tensors).sort(byCodePoint);
  const header = metadata ? { __metadata__: metadata } : {};
  let begin = 0;
  for (const name of names) {
    const end = begin + tensors[name].data.length * 4;
    header[name] = { dtype: "F32", shape: tensors[name].shape, data_offsets: [begin, end] };
    begin = end;
  }
  let text = new TextEncoder().encode(JSON.stringify(header));
  const padded = new Uint8Array(text.length + ((8 - (text.length % 8)) % 8)).fill(0x20);
  padded.set(text);
  const file = new Uint8Array(8 + padded.length + begin);
  const view = new DataView(file.buffer);
  view.setBigUint64(0, BigInt(padded.length), true);
  file.set(padded, 8);
  let at = 8 + padded.length;
  for (const name of names) {
    for (const value of tensors[name].data) {
      view.setFloat32(at, value, true);
      at += 4;
    }
  }
  return file;
}
