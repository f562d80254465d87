// Markdown to DOM nodes. Text becomes text nodes and nothing else, so nothing that a model writes is HTML here.
// Links lead to http, https and mailto alone; pictures are links, so that no text makes this page load anything.

const SAFE = /^(https?:|mailto:)/i;
const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*\s*$/;
const RULE = /^ {0,3}([-*_])(\s*\1){2,}\s*$/;
const QUOTE = /^ {0,3}> ?/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])(\s+|$)/;
const TABLE_RULE = /^\s*\|?\s*:?-+:?\s*(\|\s*:?-+:?\s*)*\|?\s*$/;
const MATH = /^ {0,3}(\\\[|\$\$)/;
const MAX_MATH_LINES = 200;
const MAX_DEPTH = 12;

export function element(name, props = {}, ...children) {
  const node = document.createElement(name);
  for (const [key, value] of Object.entries(props)) {
    if (key === "class") node.className = value;
    else if (key.startsWith("on")) node.addEventListener(key.slice(2), value);
    else if (value === true) node.setAttribute(key, "");
    else if (value !== false && value != null) node.setAttribute(key, value);
  }
  node.append(...children.filter((child) => child != null));
  return node;
}

// The text's blocks, each with the source it came from: what has not changed need not be drawn again.
export function blocksOf(text) {
  const lines = text.replace(/\r\n?/g, "\n").split("\n");
  const blocks = [];
  let at = 0;
  while (at < lines.length) {
    if (!lines[at].trim()) {
      at += 1;
      continue;
    }
    const end = endOfBlock(lines, at);
    blocks.push(lines.slice(at, end).join("\n"));
    at = end;
  }
  return blocks;
}

function endOfBlock(lines, at) {
  const fence = FENCE.exec(lines[at]);
  if (fence) {
    for (let end = at + 1; end < lines.length; end++) if (closes(lines[end], fence[1])) return end + 1;
    return lines.length;
  }
  if (HEADING.test(lines[at]) || RULE.test(lines[at])) return at + 1;
  const math = endOfMath(lines, at);
  if (math) return math;
  if (QUOTE.test(lines[at])) {
    let end = at + 1;
    while (end < lines.length && lines[end].trim() && (QUOTE.test(lines[end]) || !begins(lines, end))) end += 1;
    return end;
  }
  if (ITEM.test(lines[at])) return endOfList(lines, at);
  if (isTable(lines, at)) {
    let end = at + 2;
    while (end < lines.length && lines[end].includes("|") && lines[end].trim()) end += 1;
    return end;
  }
  let end = at + 1;
  while (end < lines.length && lines[end].trim() && !begins(lines, end)) end += 1;
  return end;
}

// A formula is shown as it is written, since in Markdown its stars and underscores would be marks. 0: there is none.
function endOfMath(lines, at) {
  const opened = MATH.exec(lines[at]);
  if (!opened) return 0;
  const close = opened[1] === "$$" ? "$$" : "\\]";
  const last = Math.min(lines.length, at + MAX_MATH_LINES);
  for (let end = at; end < last; end++) {
    const rest = end === at ? lines[end].slice(opened[0].length) : lines[end];
    if (rest.includes(close)) return rest.trimEnd().endsWith(close) ? end + 1 : 0;
  }
  return 0;
}

function closes(line, fence) {
  const bare = line.trim();
  return bare.length >= fence.length && bare === fence[0].repeat(bare.length);
}

function begins(lines, at) {
  const line = lines[at];
  return FENCE.test(line) || HEADING.test(line) || RULE.test(line) || QUOTE.test(line) || isTable(lines, at)
    || endOfMath(lines, at) > 0
    || (ITEM.test(line) && !/^\s*\d+[.)]\s/.test(line)) || /^\s*1[.)]\s/.test(line);
}

function isTable(lines, at) {
  return lines[at].includes("|") && at + 1 < lines.length && lines[at + 1].includes("-") && TABLE_RULE.test(lines[at + 1]);
}

function isOrdered(line) {
  return /^\s*\d/.test(line);
}

// A list goes on over blank lines, where what follows is indented or another item of its kind.
function endOfList(lines, at) {
  const indent = ITEM.exec(lines[at])[1].length;
  let fence = null;
  let end = at + 1;
  while (end < lines.length) {
    const line = lines[end];
    const marks = FENCE.exec(line.trimStart());
    if (fence) {
      if (closes(line, fence)) fence = null;
    } else if (marks && indentOf(line) > indent) fence = marks[1];
    else if (!line.trim()) {
      let next = end + 1;
      while (next < lines.length && !lines[next].trim()) next += 1;
      if (next >= lines.length || !continues(lines[at], lines[next], indent)) break;
    } else if (indentOf(line) <= indent && !isItemLike(lines[at], line) && begins(lines, end)) break;
    end += 1;
  }
  return end;
}

function continues(first, line, indent) {
  return indentOf(line) > indent || isItemLike(first, line);
}

function isItemLike(first, line) {
  return ITEM.test(line) && !RULE.test(line) && isOrdered(line) === isOrdered(first);
}

function indentOf(line) {
  return line.length - line.trimStart().length;
}

export function nodesOf(text, depth = 0) {
  if (depth > MAX_DEPTH) return [document.createTextNode(text)];
  return blocksOf(text).map((source) => nodeOf(source, depth));
}

export function nodeOf(source, depth = 0) {
  const lines = source.split("\n");
  const fence = FENCE.exec(lines[0]);
  if (fence) {
    const last = lines.length > 1 && closes(lines[lines.length - 1], fence[1]) ? -1 : undefined;
    return codeBlock(lines.slice(1, last).join("\n"), fence[2].trim());
  }
  const heading = HEADING.exec(lines[0]);
  if (heading) return element(`h${heading[1].length}`, {}, ...inline(heading[2]));
  if (RULE.test(lines[0])) return element("hr");
  if (endOfMath(lines, 0)) return element("div", { class: "math" }, source);
  if (QUOTE.test(lines[0])) {
    return element("blockquote", {}, ...nodesOf(lines.map((line) => line.replace(QUOTE, "")).join("\n"), depth + 1));
  }
  if (ITEM.test(lines[0])) return list(lines, depth);
  if (isTable(lines, 0)) return table(lines);
  return element("p", {}, ...inline(source));
}

function codeBlock(code, language) {
  const copy = element("button", { type: "button" }, "Copy");
  copy.addEventListener("click", () => copied(code, copy));
  return element("div", { class: "code" },
    element("div", { class: "head" }, element("span", {}, language || "text"), copy),
    element("pre", {}, element("code", {}, code)));
}

export async function copied(text, button) {
  const label = button.textContent;
  try {
    await navigator.clipboard.writeText(text);
    button.textContent = "Copied";
  } catch {
    // Without TLS browsers have no clipboard for pages, but at localhost.
    button.textContent = "Cannot copy here";
  }
  setTimeout(() => { button.textContent = label; }, 1500);
}

function list(lines, depth) {
  const indent = ITEM.exec(lines[0])[1].length;
  const ordered = isOrdered(lines[0]);
  const items = [];
  for (const line of lines) {
    const found = ITEM.exec(line);
    if (found && found[1].length <= indent + 1 && isOrdered(line) === ordered) {
      items.push({ width: found[0].length, lines: [line.slice(found[0].length)] });
    } else {
      const item = items[items.length - 1];
      item.lines.push(line.slice(Math.min(item.width, indentOf(line))));
    }
  }
  const start = ordered ? parseInt(lines[0].trim(), 10) : null;
  const made = items.map((item) => {
    const text = item.lines.join("\n").trim();
    const task = /^\[([ xX])\]\s+/.exec(text);
    const nodes = nodesOf(task ? text.slice(task[0].length) : text, depth + 1);
    // A single paragraph of an item stands without its margins.
    const first = nodes[0]?.nodeName === "P" ? [...nodes[0].childNodes, ...nodes.slice(1)] : nodes;
    return element("li", {}, task ? (task[1] === " " ? "☐ " : "☑ ") : null, ...first);
  });
  return element(ordered ? "ol" : "ul", ordered && start !== 1 ? { start } : {}, ...made);
}

function cells(line) {
  const bare = line.trim().replace(/^\|/, "").replace(/\|$/, "");
  const found = [];
  let cell = "";
  let code = false;
  for (let at = 0; at < bare.length; at++) {
    if (bare[at] === "\\" && bare[at + 1] === "|") cell += bare[++at];
    else if (bare[at] === "|" && !code) {
      found.push(cell.trim());
      cell = "";
    } else {
      if (bare[at] === "`") code = !code;
      cell += bare[at];
    }
  }
  return [...found, cell.trim()];
}

function table(lines) {
  const rows = [lines[0], ...lines.slice(2)].map(cells);
  const width = Math.max(...rows.map((each) => each.length));
  const row = (kind, texts) => element("tr", {}, ...Array.from({ length: width }, (_, at) => element(kind, {}, ...inline(texts[at] ?? ""))));
  return element("div", { class: "table" }, element("table", {},
    element("thead", {}, row("th", rows[0])),
    element("tbody", {}, ...rows.slice(1).map((texts) => row("td", texts)))));
}

const WEAK_STAR = /^\*(?=[^\s*])((?:[^*]|\*\*[^*]+\*\*)*?[^\s*])\*(?!\*)/;
const WEAK_LINE = /^_(?=[^\s_])((?:[^_]|_(?=\w))*?[^\s_])_(?!\w)/;
// Where a thing of a line may begin. Letters, digits and spaces cannot, which keeps long lines quick.
const SPECIAL = /[\\`*_~[!<\n$]|https?:\/\//g;
// Pandoc's rule, which leaves prices alone; and two dollars.
const DOLLARS = /^(?:\$\$[^$]+\$\$|\$(?=[^\s$])[^$\n]*[^\s$\\]\$(?!\d))/;

export function inline(text, depth = 0) {
  const nodes = [];
  let plain = "";
  const flush = () => {
    if (plain) nodes.push(document.createTextNode(plain));
    plain = "";
  };
  let at = 0;
  while (at < text.length) {
    SPECIAL.lastIndex = at;
    const special = SPECIAL.exec(text);
    const next = special ? special.index : text.length;
    plain += text.slice(at, next);
    at = next;
    if (at >= text.length) break;
    const found = depth > MAX_DEPTH ? null : span(text, at, depth);
    if (!found) {
      plain += text[at];
      at += 1;
    } else {
      if (typeof found.node === "string") plain += found.node;
      else {
        flush();
        nodes.push(found.node);
      }
      at = found.end;
    }
  }
  flush();
  return nodes;
}

function span(text, at, depth) {
  const rest = text.slice(at, at + 4000);
  const made = (name, inner, length) => ({ node: element(name, {}, ...inline(inner, depth + 1)), end: at + length });
  switch (text[at]) {
    case "\\": {
      const next = text[at + 1];
      if (next === "\n") return { node: element("br"), end: at + 2 };
      const close = next === "(" ? rest.indexOf("\\)", 2) : -1;
      if (close > 0) return formula(rest.slice(0, close + 2), at);
      return next && /[!-/:-@[-`{-~]/.test(next) ? { node: next, end: at + 2 } : null;
    }
    case "\n":
      return text.slice(0, at).endsWith("  ") ? { node: element("br"), end: at + 1 } : { node: "\n", end: at + 1 };
    case "$": {
      const found = DOLLARS.exec(rest);
      return found ? formula(found[0], at) : null;
    }
    case "`": {
      const marks = /^`+/.exec(rest)[0];
      const end = closing(text, at + marks.length, marks);
      if (end < 0) return { node: marks, end: at + marks.length };
      const code = text.slice(at + marks.length, end).replace(/\n/g, " ");
      const bare = /^ .*[^ ].* $/.test(code) ? code.slice(1, -1) : code;
      return { node: element("code", {}, bare), end: end + marks.length };
    }
    case "*":
    case "_": {
      if (text[at] === "_" && /\w/.test(text[at - 1] ?? "")) return null;
      const strong = /^(\*\*|__)(?=\S)([\s\S]*?\S)\1(?!\*)/.exec(rest);
      if (strong) return made("strong", strong[2], strong[0].length);
      const weak = (text[at] === "*" ? WEAK_STAR : WEAK_LINE).exec(rest);
      return weak ? made("em", weak[1], weak[0].length) : null;
    }
    case "~": {
      const struck = /^~~(?=\S)([\s\S]*?\S)~~/.exec(rest);
      return struck ? made("del", struck[1], struck[0].length) : null;
    }
    case "!":
    case "[": {
      const found = /^!?\[((?:[^\][\\]|\\.|\[[^\]]*\])*)\]\(\s*<?([^\s<>()]*(?:\([^\s<>()]*\)[^\s<>()]*)*)>?(?:\s+["'(][^\n]*?["')])?\s*\)/.exec(rest);
      if (!found || !SAFE.test(found[2])) return null;
      return { node: link(found[2], inline(found[1] || found[2], depth + 1)), end: at + found[0].length };
    }
    case "<": {
      // The one tag that models write into cells of tables, which know no other line break.
      const line = /^<br\s*\/?>/i.exec(rest);
      if (line) return { node: element("br"), end: at + line[0].length };
      const found = /^<((?:https?:\/\/|mailto:)[^\s<>]+)>/i.exec(rest);
      return found ? { node: link(found[1], [found[1]]), end: at + found[0].length } : null;
    }
    default: {
      if (/\w/.test(text[at - 1] ?? "")) return null;
      const found = /^https?:\/\/[^\s<>`]*[^\s<>`.,:;!?'"\])}*_]/i.exec(rest);
      return found ? { node: link(found[0], [found[0]]), end: at + found[0].length } : null;
    }
  }
}

function formula(written, at) {
  return { node: element("code", { class: "math" }, written), end: at + written.length };
}

function closing(text, from, marks) {
  for (let at = text.indexOf(marks, from); at >= 0; at = text.indexOf(marks, at)) {
    let end = at;
    while (text[end] === "`") end += 1;
    if (end - at === marks.length) return at;
    at = end;
  }
  return -1;
}

function link(address, children) {
  return element("a", { href: address, target: "_blank", rel: "noopener noreferrer" }, ...children);
}

// A place where a text grows: only blocks that have changed are drawn anew.
export class MarkdownView {
  constructor() {
    this.node = element("div", { class: "text" });
    this.sources = [];
  }

  show(text) {
    const blocks = blocksOf(text);
    let same = 0;
    while (same < blocks.length && blocks[same] === this.sources[same]) same += 1;
    while (this.node.childNodes.length > same) this.node.lastChild.remove();
    this.node.append(...blocks.slice(same).map((source) => nodeOf(source)));
    this.sources = blocks;
  }
}
