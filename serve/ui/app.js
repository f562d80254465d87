// Wires the page: tabs, the picker, settings, the composer and the talk.

import { models, Refused } from "./api.js";
import { Talk } from "./chat.js";
import { element } from "./markdown.js";
import { parse, whole } from "./numbers.js";
import { Pictures } from "./pictures.js";
import { apiKey, keepApiKey, remember, remembered } from "./store.js";

const of = (id) => document.getElementById(id);
const [picker, words, send, stop, system, other, key, keepKey, about] =
  ["model", "words", "send", "stop", "system", "other", "key", "keep-key", "about"].map(of);
const fields = [...document.querySelectorAll("[data-field]")];
let known = [];

// Tabs: each a button that controls a <main>. Another page adds its two elements and nothing here.
const tabs = [...document.querySelectorAll('[role="tab"]')];
for (const tab of tabs) {
  tab.addEventListener("click", () => {
    for (const each of tabs) {
      each.setAttribute("aria-selected", String(each === tab));
      of(each.getAttribute("aria-controls")).hidden = each !== tab;
    }
  });
}

// Light or dark: as the system has it, until somebody says.
const darkness = matchMedia("(prefers-color-scheme: dark)");
function paint() {
  document.documentElement.dataset.theme = remembered("theme", darkness.matches ? "dark" : "light");
}
darkness.addEventListener("change", paint);
of("theme").addEventListener("click", () => {
  remember("theme", document.documentElement.dataset.theme === "dark" ? "light" : "dark");
  paint();
});
paint();

const isNarrow = matchMedia("(max-width: 820px)");
function showSettings(isShown) {
  document.body.classList.toggle("settings-hidden", !isShown);
  of("toggle-settings").setAttribute("aria-expanded", String(isShown));
  of("toggle-settings").textContent = isShown && isNarrow.matches ? "Close" : "Settings";
}
of("toggle-settings").addEventListener("click", () => {
  const isShown = document.body.classList.contains("settings-hidden");
  showSettings(isShown);
  if (!isNarrow.matches) remember("settings-shown", isShown);
});
isNarrow.addEventListener("change", () => showSettings(!isNarrow.matches && remembered("settings-shown", true)));
showSettings(!isNarrow.matches && remembered("settings-shown", true));

// What a request holds besides messages. Throws what is wrong with it.
function request() {
  if (!picker.value) throw new Refused("No model is picked.");
  const body = {};
  const told = other.value.trim();
  if (told) {
    let parsed;
    try {
      parsed = parse(told);
    } catch (error) {
      throw new Refused(`Other fields are no JSON that can be sent: ${error.message}`);
    }
    if (parsed === null || typeof parsed !== "object" || Array.isArray(parsed)) {
      throw new Refused('Other fields are an object, like {"stop": ["END"]}.');
    }
    Object.assign(body, parsed);
  }
  for (const field of fields) {
    const name = field.closest("label").firstChild.textContent.trim();
    if (field.validity.badInput || !field.validity.valid) throw new Refused(`${name}: ${field.validationMessage}`);
    if (field.value === "") continue;
    body[field.dataset.field] = field.tagName === "SELECT" ? field.value === "true" : whole(field.value);
  }
  return { ...body, model: picker.value, system: system.value.trim() };
}

const talk = new Talk(of("messages"), of("to-end"), {
  request,
  onState() {
    send.hidden = talk.isBusy;
    stop.hidden = !talk.isBusy;
    if (!talk.isBusy) words.focus({ preventScroll: true });
  },
  onRefused(error) {
    if (error.status === 401 || error.status === 403) askForKey();
    if (error.status === 404) listModels();
  },
});

function askForKey() {
  showSettings(true);
  key.focus();
}

// The picker: bases, and under each its adapters and experiments.
async function listModels() {
  let found;
  try {
    found = await models();
  } catch (error) {
    about.textContent = error.message;
    if (error.status === 401 || error.status === 403) askForKey();
    if (!known.length) picker.replaceChildren(element("option", { value: "" }, error.status === 401 ? "needs a key" : "no models"));
    picker.disabled = !known.length;
    return;
  }
  if (JSON.stringify(found) === JSON.stringify(known)) return;
  known = found;
  const option = (card) => element("option", { value: card.id }, card.variants ? `${card.id} (experiment)` : card.id);
  const names = new Set(known.map((card) => card.id));
  const bases = known.filter((card) => !card.parent || !names.has(card.parent));
  const groups = bases.flatMap((base) => {
    const children = known.filter((card) => card.parent === base.id);
    return children.length ? [option(base), element("optgroup", { label: `on ${base.id}` }, ...children.map(option))] : [option(base)];
  });
  const wanted = picker.value || remembered("model", "");
  picker.replaceChildren(...groups);
  picker.value = names.has(wanted) ? wanted : bases[0]?.id ?? known[0]?.id ?? "";
  picker.disabled = false;
  picked();
}

function picked() {
  const card = known.find((each) => each.id === picker.value);
  const sees = !card?.input_modalities || card.input_modalities.includes("image");
  of("attach").disabled = !sees;
  of("attach").title = sees ? "Show a picture" : `${card.id} sees no pictures`;
  const parts = [card?.version, card?.parent && `on ${card.parent}`];
  const length = card?.context_window ?? card?.max_model_len;
  if (length) parts.push(`${length.toLocaleString("en")} tokens of context`);
  if (card?.input_modalities) parts.push(card.input_modalities.join(", "));
  about.textContent = parts.filter(Boolean).join(" · ");
}

picker.addEventListener("change", () => {
  remember("model", picker.value);
  picked();
});
// Adapters come and go while a page is open.
picker.addEventListener("focus", listModels);
window.addEventListener("focus", listModels);

// Settings are kept as they are typed.
system.value = remembered("system", "");
other.value = remembered("other", "");
for (const [name, node] of [["system", system], ["other", other]]) {
  node.addEventListener("input", () => remember(name, node.value));
}
const sampling = remembered("sampling", {});
for (const field of fields) {
  field.value = sampling[field.dataset.field] ?? "";
  field.addEventListener("input", () => {
    sampling[field.dataset.field] = field.value;
    remember("sampling", sampling);
  });
}
key.value = apiKey();
keepKey.checked = Boolean(remembered("key", ""));
for (const node of [key, keepKey]) {
  node.addEventListener("change", () => {
    keepApiKey(key.value.trim(), keepKey.checked);
    listModels();
  });
}

// The composer.
const pictures = new Pictures(of("shown"), problem);

function problem(text) {
  const note = element("div", { class: "error", role: "alert" }, text);
  of("composer").prepend(note);
  setTimeout(() => note.remove(), 6000);
}

function grow() {
  words.style.height = "auto";
  words.style.height = `${words.scrollHeight}px`;
}

function submit() {
  const text = words.value.trim();
  if (talk.isBusy || (!text && !pictures.urls.length)) return;
  words.value = "";
  remember("draft", null, "sessionStorage");
  grow();
  talk.say(text, pictures.take());
}

words.value = remembered("draft", "", "sessionStorage");
grow();
words.addEventListener("input", () => {
  remember("draft", words.value, "sessionStorage");
  grow();
});
words.addEventListener("keydown", (event) => {
  // Enter within an input method chooses its word; 229 is how Safari says so.
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing && event.keyCode !== 229) {
    event.preventDefault();
    submit();
  }
});
of("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  submit();
});
stop.addEventListener("click", () => talk.stop());
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape" && talk.isBusy) talk.stop();
});
of("attach").addEventListener("click", () => of("files").click());
of("files").addEventListener("change", async () => {
  await pictures.add([...of("files").files]);
  of("files").value = "";
  words.focus();
});

function shows(event) {
  return !of("attach").disabled && [...(event.dataTransfer?.items ?? [])].some((each) => each.kind === "file");
}

words.addEventListener("paste", (event) => {
  const files = [...event.clipboardData.files].filter((file) => file.type.startsWith("image/"));
  if (!files.length) return;
  event.preventDefault();
  if (of("attach").disabled) problem(of("attach").title);
  else pictures.add(files);
});
document.addEventListener("dragover", (event) => {
  if (![...(event.dataTransfer?.items ?? [])].some((each) => each.kind === "file")) return;
  event.preventDefault();
  of("drop").hidden = !shows(event);
});
document.addEventListener("dragleave", (event) => {
  if (!event.relatedTarget) of("drop").hidden = true;
});
document.addEventListener("drop", (event) => {
  of("drop").hidden = true;
  if (!event.dataTransfer.files.length) return;
  // Or the browser would leave the page and show the file.
  event.preventDefault();
  if (of("attach").disabled) problem(of("attach").title);
  else pictures.add([...event.dataTransfer.files]);
});

of("new-chat").addEventListener("click", () => {
  talk.reset();
  words.focus();
});
of("save").addEventListener("click", () => {
  if (!talk.messages.length) return;
  const file = new Blob([`${talk.row(system.value.trim())}\n`], { type: "application/jsonl" });
  const link = element("a", { href: URL.createObjectURL(file), download: "chat.jsonl" });
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
});

await listModels();
if (document.activeElement !== key) words.focus();
