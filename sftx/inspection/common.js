const SVG = "http://www.w3.org/2000/svg";
const SIGNS = {"\n": "⏎", "\t": "⇥", "\r": "␍", "\u00a0": "⍽"};

// A character that changes the direction of the text around it is shown by its code point instead.
const DIRECTIONS = /[\u202a-\u202e\u2066-\u2069]/g;
const shown = (text) => text.replace(DIRECTIONS, (sign) => `\u27e8U+${sign.charCodeAt(0).toString(16).toUpperCase()}\u27e9`);
// Returns the values of the page, with all text in a form that can be shown.
function page_data() {
  return JSON.parse(document.getElementById("data").textContent,
    (_, value) => (typeof value === "string" ? shown(value) : value));
}

// Everything is made of text nodes and attributes, so that no text of a run or a row is parsed as HTML.
function make(tag, options, ...children) {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(options || {})) node.setAttribute(name, value);
  node.append(...children);
  return node;
}
function draw(tag, options, text) {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(options)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  return node;
}

// Returns the text as nodes, with a visible sign for each line break, tab and run of spaces.
function signed(text) {
  if (text === "") return [make("span", {class: "sign"}, "…")];
  if (/^ +$/.test(text)) return [make("span", {class: "sign"}, "·".repeat(text.length))];
  const parts = [];
  for (const part of text.split(/([\n\t\r\u00a0])/)) {
    if (part in SIGNS) parts.push(make("span", {class: "sign"}, SIGNS[part]));
    if (part === "\n" || part === "\t") parts.push(part);
    else if (part && !(part in SIGNS)) parts.push(part);
  }
  return parts;
}
