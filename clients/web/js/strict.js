// What is refused is refused with one line: where, what was expected, what was found, what to do.

export class PageError extends Error {}

/** The SHA-256 of bytes, in hexadecimal digits. */
export async function sha256(bytes) {
  const digest = new Uint8Array(await crypto.subtle.digest("SHA-256", bytes));
  return [...digest].map((byte) => byte.toString(16).padStart(2, "0")).join("");
}

/** A number that Python would write as a float: 16 stands as 16.0. */
export class Float {
  constructor(value) {
    this.value = value;
  }
}

/** JSON as fedlora's canonical_json writes it: sorted keys, no spaces, UTF-8 as it is. */
export function canonicalJson(value) {
  if (value instanceof Float) return pythonFloat(value.value);
  if (Array.isArray(value)) return `[${value.map(canonicalJson).join(",")}]`;
  if (value !== null && typeof value === "object") {
    const parts = Object.keys(value).sort(byCodePoint)
      .map((key) => `${JSON.stringify(key)}:${canonicalJson(value[key])}`);
    return `{${parts.join(",")}}`;
  }
  return JSON.stringify(value);
}

/** How Python's repr writes a float. */
export function pythonFloat(value) {
  if (!Number.isFinite(value)) throw new PageError(`expected a finite number, found ${value}`);
  if (value === 0) return Object.is(value, -0) ? "-0.0" : "0.0";
  const [digits, exponent] = value.toExponential().split("e");
  const power = Number(exponent);
  if (power < -4 || power >= 16) {
    return `${digits}e${power < 0 ? "-" : "+"}${String(Math.abs(power)).padStart(2, "0")}`;
  }
  const whole = digits.replace(/[-.]/g, "");
  const sign = value < 0 ? "-" : "";
  if (power < 0) return `${sign}0.${"0".repeat(-power - 1)}${whole}`;
  const padded = whole.padEnd(power + 1, "0");
  return `${sign}${padded.slice(0, power + 1)}.${padded.slice(power + 1) || "0"}`;
}

/** Order of Python's strings: by code point, not by UTF-16 unit. */
export function byCodePoint(a, b) {
  const left = [...a], right = [...b];
  for (let i = 0; i < Math.min(left.length, right.length); i += 1) {
    const gap = left[i].codePointAt(0) - right[i].codePointAt(0);
    if (gap) return gap;
  }
  return left.length - right.length;
}
