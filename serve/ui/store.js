// What this browser remembers: settings and the chat in localStorage, the key for this tab unless asked to keep it.
// Where storage is refused or full, the page goes on without; what another page or version left there and is of another
// kind is as if it were not there.

const PREFIX = "lathe.";

export function remembered(name, otherwise, storage = "localStorage") {
  try {
    const text = window[storage].getItem(PREFIX + name);
    const value = text === null ? otherwise : JSON.parse(text);
    return kindOf(value) === kindOf(otherwise) ? value : otherwise;
  } catch {
    return otherwise;
  }
}

function kindOf(value) {
  return value === null ? "null" : Array.isArray(value) ? "array" : typeof value;
}

export function remember(name, value, storage = "localStorage") {
  try {
    if (value === null) window[storage].removeItem(PREFIX + name);
    else window[storage].setItem(PREFIX + name, JSON.stringify(value));
    return true;
  } catch {
    return false;
  }
}

// A tab's own, which it finds again when it is loaded anew; another tab begins with what was last kept in any.
export function rememberedHere(name, otherwise) {
  const mine = remembered(name, otherwise, "sessionStorage");
  return mine === otherwise ? remembered(name, otherwise) : mine;
}

export function rememberHere(name, value) {
  return ["sessionStorage", "localStorage"].map((storage) => remember(name, value, storage)).every(Boolean);
}

export function apiKey() {
  return remembered("key", "", "sessionStorage") || remembered("key", "");
}

export function keepApiKey(key, isKept) {
  remember("key", key || null, "sessionStorage");
  remember("key", isKept && key ? key : null);
}
