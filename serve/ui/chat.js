// The conversation: its messages, how they are drawn, how the next one is asked for. Knows no header and no settings;
// `ask` gives it what a request holds besides messages.

import { chat, Refused } from "./api.js";
import { copied, element, MarkdownView } from "./markdown.js";
import { parse, stringify } from "./numbers.js";
import { rememberedHere, rememberHere } from "./store.js";

const NEAR_THE_END = 80;
const FEWEST_FOR_A_RATE = 8;

function isMessage(each) {
  const isListOf = (kind, list) => list === undefined || (Array.isArray(list) && list.every((one) => one !== null && typeof one === kind));
  return ["user", "assistant"].includes(each?.role) && typeof each.text === "string"
    && isListOf("string", each.pictures) && isListOf("object", each.calls) && isListOf("number", each.seconds);
}

export class Talk {
  constructor(log, toEnd, { request, onState, onRefused }) {
    this.log = log;
    this.toEnd = toEnd;
    this.request = request;
    this.onState = onState;
    this.onRefused = onRefused;
    this.messages = rememberedHere("chat", []).filter(isMessage);
    this.abort = null;
    this.underWay = null;
    this.editing = null;
    this.drawnNodes = new WeakMap();
    this.views = new WeakMap();
    this.log.addEventListener("scroll", () => this.showToEnd());
    this.toEnd.addEventListener("click", () => this.scrollToEnd());
    addEventListener("beforeunload", () => this.stop());
    addEventListener("pagehide", () => this.underWay && this.keep());
    // A keyboard on the screen takes half of the talk's height.
    new ResizeObserver(() => this.wasAtEnd && this.scrollToEnd()).observe(this.log);
    this.draw();
    this.scrollToEnd();
  }

  get isBusy() {
    return this.abort !== null;
  }

  say(text, pictures) {
    if (this.isBusy) return;
    this.messages.push({ role: "user", text, pictures });
    this.answer();
  }

  stop() {
    this.abort?.abort();
  }

  reset() {
    this.stop();
    this.messages = [];
    this.editing = null;
    this.keep();
    this.draw();
  }

  // As a line of training data, with what the system prompt is now.
  row(system) {
    return JSON.stringify({ messages: this.wire(system) });
  }

  wire(system) {
    const written = this.messages.filter((each) => each.role === "user" || each.text || each.thought).map((each) => {
      if (each.role === "user") {
        const shown = (each.pictures ?? []).map((url) => ({ type: "image_url", image_url: { url } }));
        const content = shown.length ? [...shown, { type: "text", text: each.text }] : each.text;
        return { role: "user", content };
      }
      const thought = each.thought ? { reasoning_content: each.thought } : {};
      return { role: "assistant", content: each.text, ...thought };
    });
    return system ? [{ role: "system", content: system }, ...written] : written;
  }

  async answer() {
    let body;
    try {
      const { system, ...fields } = this.request();
      body = { ...fields, messages: this.wire(system) };
    } catch (error) {
      this.messages.push({ role: "assistant", text: "", error: error.message });
      this.keep();
      this.draw();
      this.scrollToEnd();
      return;
    }
    const message = { role: "assistant", model: body.model, text: "", thought: "", calls: [] };
    this.messages.push(message);
    this.underWay = message;
    const abort = this.abort = new AbortController();
    this.keep();
    this.draw();
    this.scrollToEnd();
    this.onState();
    const began = performance.now();
    let first = null;
    let refused = null;
    try {
      for await (const chunk of chat(body, abort.signal)) {
        first ??= performance.now();
        take(message, chunk);
        this.redraw(message);
      }
    } catch (error) {
      if (error.name === "AbortError") message.stopped = true;
      else {
        message.error = error instanceof Refused ? error.message : String(error);
        refused = error;
      }
    }
    if (first !== null) message.seconds = [(first - began) / 1000, (performance.now() - began) / 1000];
    if (this.abort === abort) this.abort = this.underWay = null;
    if (this.messages.includes(message)) {
      this.keep();
      this.draw();
    }
    this.onState();
    if (refused) this.onRefused(refused);
  }

  // Ask again for the answer at `index`, or for the one behind it.
  retry(index) {
    if (this.isBusy) return;
    const end = this.messages[index].role === "user" ? index + 1 : index;
    this.messages.length = end;
    if (end) this.answer();
  }

  // A turn of the user goes with its answers.
  remove(index) {
    let end = index + 1;
    if (this.messages[index].role === "user") {
      while (end < this.messages.length && this.messages[end].role !== "user") end += 1;
    }
    this.messages.splice(index, end - index);
    this.keep();
    this.draw();
  }

  // An answer under way is kept as far as it came, as one that was stopped.
  keep() {
    const kept = this.messages.map((each) => (each === this.underWay ? { ...each, stopped: true } : each));
    if (rememberHere("chat", kept)) return;
    // Pictures are what is large.
    rememberHere("chat", kept.map((each) => ({ ...each, pictures: [] })));
  }

  // Nodes of messages that are as they were stay, with what is selected, opened or scrolled in them.
  draw() {
    const isAtEnd = this.isAtEnd();
    const nodes = this.messages.map((message, index) => {
      const isComing = this.isBusy && index === this.messages.length - 1;
      const key = JSON.stringify([index, this.editing === index, isComing, message.text, message.error, message.finish]);
      const before = this.drawnNodes.get(message);
      if (before?.key === key) return before.node;
      const node = this.drawn(message, index, isComing);
      this.drawnNodes.set(message, { key, node });
      return node;
    });
    if (!nodes.length) {
      nodes.push(element("div", { class: "empty" }, element("h1", {}, "What shall it be?"),
        "Pick a model or an adapter above, and ask."));
    }
    nodes.forEach((node, at) => {
      if (this.log.children[at] !== node) this.log.insertBefore(node, this.log.children[at] ?? null);
    });
    while (this.log.children.length > nodes.length) this.log.lastChild.remove();
    if (isAtEnd) this.scrollToEnd();
    else this.showToEnd();
  }

  // While an answer comes: its own node, once a frame.
  redraw(message) {
    if (this.isDue) return;
    this.isDue = true;
    const draw = () => {
      this.isDue = false;
      const isAtEnd = this.isAtEnd();
      this.views.get(message)?.show();
      if (isAtEnd) this.scrollToEnd();
      else this.showToEnd();
    };
    // A page in the background has no frames, and goes on.
    if (document.hidden) setTimeout(draw, 250);
    else requestAnimationFrame(draw);
  }

  drawn(message, index, isComing) {
    const isUser = message.role === "user";
    const node = element("article", { class: `message ${isUser ? "user" : "assistant"}` });
    node.append(element("div", { class: "who" }, isUser ? "You" : message.model ?? ""));
    if (message.pictures?.length) {
      node.append(element("div", { class: "pictures" },
        ...message.pictures.map((src) => element("img", { src, alt: "Picture that was shown" }))));
    }
    if (this.editing === index) {
      node.append(this.editor(message, index));
      return node;
    }
    const view = isUser ? element("div", { class: "body" }, message.text) : new AnswerView(message);
    node.append(isUser ? view : view.node);
    if (!isUser) {
      this.views.set(message, view);
      view.show();
    }
    if (isComing) view.begin();
    else node.append(this.actions(message, index));
    return node;
  }

  actions(message, index) {
    const act = (label, does, title) => element("button", { type: "button", title, onclick: does }, label);
    const copy = act("Copy", () => copied(message.text, copy));
    const free = (does) => () => { if (!this.isBusy) does(); };
    return element("div", { class: "actions" }, copy,
      act("Edit", free(() => { this.editing = index; this.draw(); })),
      act("Retry", free(() => this.retry(index)), "Ask again; what follows is dropped"),
      act("Delete", free(() => this.remove(index))),
      message.role === "user" ? null : element("span", { class: "usage" }, told(message)));
  }

  editor(message, index) {
    const words = element("textarea", { "aria-label": "Edit the message", rows: Math.min(14, message.text.split("\n").length + 1) });
    words.value = message.text;
    const done = (asks) => {
      message.text = words.value;
      this.editing = null;
      this.keep();
      if (asks) this.retry(index);
      else this.draw();
    };
    const buttons = [
      element("button", { type: "button", onclick: () => { this.editing = null; this.draw(); } }, "Cancel"),
      element("button", { type: "button", onclick: () => done(false) }, "Save"),
    ];
    if (message.role === "user") {
      buttons.push(element("button", { type: "button", class: "primary", onclick: () => done(true) }, "Save and ask"));
    }
    queueMicrotask(() => words.focus());
    return element("div", { class: "edit" }, words, element("div", { class: "row" }, ...buttons));
  }

  isAtEnd() {
    return this.log.scrollHeight - this.log.scrollTop - this.log.clientHeight < NEAR_THE_END;
  }

  scrollToEnd() {
    this.log.scrollTop = this.log.scrollHeight;
    this.showToEnd();
  }

  showToEnd() {
    this.toEnd.hidden = this.wasAtEnd = this.isAtEnd();
  }
}

function take(message, chunk) {
  if (chunk.usage) message.usage = chunk.usage;
  if (chunk.model) message.model = chunk.model;
  for (const choice of chunk.choices ?? []) {
    if (choice.index) continue;
    const delta = choice.delta ?? {};
    message.thought += delta.reasoning_content ?? delta.reasoning ?? "";
    message.text += delta.content ?? "";
    for (const part of delta.tool_calls ?? []) {
      const call = (message.calls[part.index ?? message.calls.length] ??= { name: "", arguments: "" });
      call.name += part.function?.name ?? "";
      call.arguments += part.function?.arguments ?? "";
    }
    message.finish = choice.finish_reason ?? message.finish;
  }
}

// 'stopped · 34 tokens, 28 a second, the first after 0.2 s'
function told(message) {
  const parts = [];
  if (message.stopped) parts.push("stopped");
  if (message.finish === "length") parts.push("cut off by its length");
  const tokens = message.usage?.completion_tokens;
  if (tokens) {
    const [first, whole] = message.seconds ?? [];
    const rate = tokens >= FEWEST_FOR_A_RATE && whole > first ? `, ${((tokens - 1) / (whole - first)).toFixed(1)} a second` : "";
    parts.push(`${tokens} tokens${rate}${first === undefined ? "" : `, the first after ${first.toFixed(1)} s`}`);
  }
  return parts.join(" · ");
}

class AnswerView {
  constructor(message) {
    this.message = message;
    this.thoughtText = element("div", { class: "text" });
    this.thought = element("details", { class: "thought", hidden: true, open: message.isOpen ?? false },
      element("summary", {}, "Thoughts"), this.thoughtText);
    this.thought.addEventListener("toggle", () => { message.isOpen = this.thought.open; });
    this.calls = element("div");
    this.text = new MarkdownView();
    this.waiting = element("span", { class: "waiting", hidden: true }, "Thinking");
    this.error = element("div", { class: "error", role: "alert", hidden: true });
    this.node = element("div", { class: "body" }, this.thought, this.text.node, this.calls, this.waiting, this.error);
  }

  begin() {
    this.isComing = true;
    this.show();
  }

  show() {
    const { thought, text, calls, error } = this.message;
    this.thought.hidden = !thought;
    if (this.shownThought !== thought) {
      // As it is: thoughts are no markdown, and long.
      this.thoughtText.textContent = this.shownThought = thought ?? "";
      this.thoughtText.style.whiteSpace = "pre-wrap";
    }
    this.text.show(text);
    if (calls?.length) {
      const isOpen = [...this.calls.children].map((each) => each.open);
      this.calls.replaceChildren(...calls.filter(Boolean).map((call, at) => element("details", { class: "call", open: isOpen[at] ?? true },
        element("summary", {}, `Calls ${call.name}`), element("pre", {}, element("code", {}, pretty(call.arguments))))));
    }
    this.waiting.hidden = !(this.isComing && !text && !calls?.length);
    this.waiting.textContent = thought ? "Thinking" : "Waiting";
    this.error.hidden = !error;
    this.error.textContent = error ?? "";
  }
}

function pretty(json) {
  try {
    return stringify(parse(json), 2);
  } catch {
    return json;
  }
}
