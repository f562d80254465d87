// What this browser remembers: settings and the chat in localStorage, the key for this tab unless asked to keep it.
// Where storage is refused or full, the page goes on without.

const PREFIX = "lathe.";

export function remembered(name, otherwise, storage = "localStorage") {
  try {
    const text = window[storage].getItem(PREFIX + name);
    return text === null ? otherwise : JSON.parse(text);
  } catch {
    return otherwise;
  }
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

export function apiKey() {
  return remembered("key", "", "sessionStorage") || remembered("key", "");
}

export function keepApiKey(key, isKept) {
  remember("key", key || null, "sessionStorage");
  remember("key", isKept && key ? key : null);
}
