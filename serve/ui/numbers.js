// JSON whose numbers keep every digit they were written with: JavaScript's own hold integers up to 2^53, seeds and
// what tools are called with may be larger.

export class Digits {
  constructor(source) {
    this.source = source;
  }
}

// A whole number as somebody typed it.
export function whole(text) {
  const value = Number(text);
  return Number.isSafeInteger(value) || !/^-?\d+$/.test(text) ? value : new Digits(String(BigInt(text)));
}

// As JSON.parse, with Digits for numbers that JavaScript has no equal of. Throws what is no JSON, and numbers that a
// browser would change which does not hand on their source (Firefox before 135, Safari before 18.4).
export function parse(text) {
  return JSON.parse(text, (_, value, context) => {
    if (typeof value !== "number" || String(value) === context?.source) return value;
    if (context?.source) return new Digits(context.source);
    if (Number.isFinite(value) && (!Number.isInteger(value) || Number.isSafeInteger(value))) return value;
    throw new RangeError(`this browser changes numbers as large as ${value}`);
  });
}

export function stringify(value, indent) {
  const mark = `digits ${Math.random()} `;
  const text = JSON.stringify(value, (_, each) => (each instanceof Digits ? mark + each.source : each), indent);
  return text.split(`"${mark}`).map((part, index) => (index ? part.replace('"', "") : part)).join("");
}
