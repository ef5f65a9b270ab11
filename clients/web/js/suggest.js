// Whole words for a keyboard: the beam of fedlora/device/suggest.py.
//
// Spellings are "binary strings", one character a byte, which compare as Python's bytes do.

import { softmax } from "./scoring.js";
import { LETTERS } from "./tokenizer.js";

const PIECES = 12, APOSTROPHES = "'’";
const LETTER = /^[\p{L}\p{N}\p{M}]$/u;

const isLetter = (letter) => letter !== undefined && LETTER.test(letter);
const utf8 = new TextDecoder("utf-8", { fatal: true, ignoreBOM: true });
const bytesOf = (text) => String.fromCharCode(...new TextEncoder().encode(text));

/** What each token of a vocabulary can be in a word. */
export class Words {
  constructor(tokenizer, vocabulary) {
    const values = new Map(LETTERS.map((letter, byte) => [letter, String.fromCharCode(byte)]));
    this.spelling = Array(vocabulary).fill("");
    this.begins = new Uint8Array(vocabulary);
    this.continues = new Uint8Array(vocabulary);
    this.ends = [];
    const special = new Set([...tokenizer.special, ...tokenizer.ends]);
    for (const [token, id] of tokenizer.vocabulary) {
      if (id >= vocabulary) continue;
      if (special.has(id)) {
        this.ends.push(id);
        continue;
      }
      const letters = [...token];
      const spelt = letters.every((letter) => values.has(letter))
        ? letters.map((letter) => values.get(letter)).join("") : bytesOf(token);
      this.spelling[id] = spelt;
      this.begins[id] = spelt[0] === " " && mayBePart(spelt.slice(1)) ? 1 : 0;
      this.continues[id] = spelt && mayBePart(spelt) ? 1 : 0;
      if (spelt && !this.continues[id] && !isLetter([...textOf(spelt)][0])) this.ends.push(id);
    }
    this.ids = this.spelling.map((_, id) => id).sort((a, b) => (
      order(this.spelling[a], this.spelling[b]) || a - b));
    const [first] = tokenizer.encode("a");
    this.first = this.spelling[first]?.[0] === " " ? " " : "";
  }

  /** The tokens that may follow `spelt` in a word that begins with `need`. */
  allowed(spelt, need) {
    const mask = !spelt && need[0] === " " ? this.begins : this.continues;
    const rest = need.slice(spelt.length);
    if (!rest) return this.ids.filter((id) => mask[id]).sort((a, b) => a - b);
    const found = [];
    for (let n = 1; n <= rest.length; n += 1) {
      found.push(...this.#range(rest.slice(0, n), `${rest.slice(0, n)}\0`));
    }
    const past = rest.slice(0, -1) + String.fromCharCode(rest.charCodeAt(rest.length - 1) + 1);
    return [...found, ...this.#range(`${rest}\0`, past).filter((id) => mask[id])];
  }

  #range(low, high) {
    return this.ids.slice(this.#place(low), this.#place(high));
  }

  #place(text) {
    let low = 0, high = this.ids.length;
    while (low < high) {
      const middle = (low + high) >> 1;
      if (order(this.spelling[this.ids[middle]], text) < 0) low = middle + 1;
      else high = middle;
    }
    return low;
  }
}

/** At most k words {word, probability}, the most probable first. */
export async function suggest(decoder, tokenizer, words, text, k = 3) {
  const width = Math.max(8, 2 * k), vocabulary = words.spelling.length;
  const [before, need] = splitText(text, words.first);
  let read = await decoder.resume([tokenizer.separator, ...tokenizer.encode(before)]);
  const found = new Map();
  let beam = [{ spelt: "", p: 1 }];
  for (let piece = 0; piece <= PIECES; piece += 1) {
    const grown = [];
    beam.forEach(({ spelt, p }, row) => {
      const following = softmax(read.logits, row * vocabulary, vocabulary);
      const word = wholeWord(spelt, need);
      if (word !== null) {
        const ended = words.ends.reduce((sum, id) => sum + following[id], 0);
        found.set(word, (found.get(word) ?? 0) + p * ended);
      }
      for (const token of words.allowed(spelt, need)) {
        grown.push({ row, token, p: p * following[token], spelt: spelt + words.spelling[token] });
      }
    });
    if (piece === PIECES) break;
    const least = found.size >= k ? [...found.values()].sort((a, b) => b - a)[k - 1] : 0;
    beam = grown.sort((a, b) => b.p - a.p).slice(0, width).filter((one) => one.p > least);
    if (!beam.length) break;
    read = await decoder.more(read, beam.map((one) => one.row), beam.map((one) => one.token));
  }
  return [...found].map(([word, probability]) => ({ word, probability }))
    .sort((a, b) => b.probability - a.probability || order(a.word, b.word)).slice(0, k);
}

/** The text before the word that is wanted, and the bytes that the word begins with. */
export function splitText(text, first = "") {
  const letters = [...text];
  let start = letters.length;
  const back = () => {
    while (start && isLetter(letters[start - 1])) start -= 1;
  };
  back();
  // An apostrophe between letters belongs to the word.
  while (start > 1 && APOSTROPHES.includes(letters[start - 1]) && isLetter(letters[start - 2])) {
    start -= 1;
    back();
  }
  const before = letters.slice(0, start).join(""), typed = bytesOf(letters.slice(start).join(""));
  if (!before.trim()) return ["", first + typed];
  if (/\s$/u.test(before) || !typed) return [before.trimEnd(), ` ${typed}`];
  return [before, typed];
}

function wholeWord(spelt, need) {
  if (spelt.length < need.length) return null;
  const word = textOf(spelt.startsWith(" ") ? spelt.slice(1) : spelt);
  return word && isLetter([...word][0]) && mayBePart(bytesOf(word)) ? word : null;
}

function mayBePart(spelt) {
  const text = textOf(spelt);
  if (text === null) return true; // part of a character: seen when the word is whole
  const letters = [...text];
  return letters.every((letter, i) => (
    isLetter(letter) || (APOSTROPHES.includes(letter) && isLetter(letters[i + 1]))));
}

function textOf(spelt) {
  try {
    return utf8.decode(Uint8Array.from(spelt, (letter) => letter.charCodeAt(0)));
  } catch {
    return null;
  }
}

function order(a, b) {
  return a < b ? -1 : a > b ? 1 : 0;
}
