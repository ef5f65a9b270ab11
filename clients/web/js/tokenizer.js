// Byte-level BPE from a tokenizer.json, with the tokens that the package tokenizers gives.
//
// Read are: no normalizer or NFC, ByteLevel with or without Digits before it, BPE without dropout,
// and special tokens as they stand. Anything else is refused, since other tokens than those that
// the base was trained on would only look as if they worked.

import { PageError } from "./strict.js";

// Unicode's White_Space, which is not quite JavaScript's \s.
const SPACE = "\\t-\\r \\x85\\xa0\\u1680\\u2000-\\u200a\\u2028\\u2029\\u202f\\u205f\\u3000";
const PIECES = new RegExp(
  "'s|'t|'re|'ve|'m|'ll|'d| ?\\p{L}+| ?\\p{N}+" +
    `| ?[^${SPACE}\\p{L}\\p{N}]+|[${SPACE}]+(?![^${SPACE}])|[${SPACE}]+`, "gu",
);
const SEPARATORS = [
  "<|endoftext|>", "<|end_of_text|>", "</s>", "<eos>", "<|im_end|>", "<s>", "<bos>", "[SEP]",
];

export class Tokenizer {
  constructor(record) {
    const { model, normalizer, pre_tokenizer: before, added_tokens: added = [] } = record;
    const steps = before?.type === "Sequence" ? before.pretokenizers : [before];
    const level = steps.at(-1);
    const known = model?.type === "BPE" && !model.dropout && !model.continuing_subword_prefix &&
      !model.end_of_word_suffix && !model.byte_fallback && level?.type === "ByteLevel" &&
      steps.slice(0, -1).every((step) => step.type === "Digits") &&
      (normalizer === null || normalizer.type === "NFC") &&
      added.every((one) => !one.single_word && !one.lstrip && !one.rstrip);
    if (!known) {
      throw new PageError("tokenizer.json: this page reads byte-level BPE (with Digits, with NFC), " +
        "found another kind; use fedlora device instead");
    }
    this.vocabulary = new Map(Object.entries(model.vocab));
    for (const one of added) this.vocabulary.set(one.content, one.id);
    this.special = new Set(added.filter((one) => one.special).map((one) => one.id));
    this.specialNames = added;
    this.pattern = added.length ? new RegExp(
      added.map((one) => one.content.replace(/[\\^$.*+?()[\]{}|]/g, "\\$&"))
        .sort((a, b) => b.length - a.length).join("|"), "gu",
    ) : null;
    this.nfc = normalizer !== null;
    this.digits = steps.slice(0, -1).map((step) => step.individual_digits);
    this.prefix = level.add_prefix_space;
    this.useRegex = level.use_regex ?? true;
    this.ignoreMerges = model.ignore_merges ?? false;
    this.ranks = new Map(model.merges.map((pair, rank) => [
      typeof pair === "string" ? pair : pair.join(" "), rank,
    ]));
    this.known = new Map(); // tokens of pieces that were seen
    const found = SEPARATORS.find((name) => this.vocabulary.has(name));
    if (!found) throw new PageError(`tokenizer: expected one of ${SEPARATORS.join(", ")}`);
    this.separator = this.vocabulary.get(found);
    this.ends = new Set(SEPARATORS.filter((name) => this.vocabulary.has(name))
      .map((name) => this.vocabulary.get(name)));
  }

  /** Token ids of a text, without special tokens around it. */
  encode(text) {
    const ids = [];
    let from = 0;
    for (const match of this.pattern ? text.matchAll(this.pattern) : []) {
      this.#plain(text.slice(from, match.index), ids);
      ids.push(this.vocabulary.get(match[0]));
      from = match.index + match[0].length;
    }
    this.#plain(text.slice(from), ids);
    return ids;
  }

  #plain(text, ids) {
    if (!text) return;
    let parts = [this.nfc ? text.normalize("NFC") : text];
    for (const single of this.digits) {
      parts = parts.flatMap((part) => part.match(single ? /\p{N}|\P{N}+/gu : /\p{N}+|\P{N}+/gu));
    }
    for (let part of parts) {
      if (this.prefix && !part.startsWith(" ")) part = ` ${part}`;
      for (const piece of this.useRegex ? part.match(PIECES) ?? [] : [part]) {
        if (!this.known.has(piece)) this.known.set(piece, this.#piece(piece));
        ids.push(...this.known.get(piece));
      }
    }
  }

  #piece(piece) {
    const letters = [...new TextEncoder().encode(piece)].map((byte) => LETTERS[byte]);
    const whole = letters.join("");
    if (this.ignoreMerges && this.vocabulary.has(whole)) return [this.vocabulary.get(whole)];
    while (letters.length > 1) {
      let best = Infinity, at = -1;
      for (let i = 0; i + 1 < letters.length; i += 1) {
        const rank = this.ranks.get(`${letters[i]} ${letters[i + 1]}`) ?? Infinity;
        if (rank < best) [best, at] = [rank, i];
      }
      if (at < 0) break;
      letters.splice(at, 2, letters[at] + letters[at + 1]);
    }
    return letters.filter((token) => this.vocabulary.has(token))
      .map((token) => this.vocabulary.get(token));
  }
}

/** How byte-level BPE writes each byte: itself if it prints in Latin-1, else from U+0100 on. */
export const LETTERS = (() => {
  const letters = [];
  let moved = 0x100;
  for (let byte = 0; byte < 256; byte += 1) {
    const prints = (byte > 0x20 && byte < 0x7f) || (byte > 0xa0 && byte !== 0xad);
    letters.push(String.fromCharCode(prints ? byte : moved));
    if (!prints) moved += 1;
  }
  return letters;
})();
