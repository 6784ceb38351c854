// Shows a hostile text: as text nodes only, with what is invisible or reorders its neighbours made visible.

import { make } from "./common.js";

const NAMES = {
  0x00: "NUL", 0x07: "BEL", 0x08: "BS", 0x0b: "VT", 0x0c: "FF", 0x0d: "CR", 0x1b: "ESC", 0x7f: "DEL", 0x85: "NEL",
  0xad: "SHY", 0x61c: "ALM", 0x200b: "ZWSP", 0x200e: "LRM", 0x200f: "RLM", 0x2028: "LS", 0x2029: "PS", 0x202a: "LRE",
  0x202b: "RLE", 0x202c: "PDF", 0x202d: "LRO", 0x202e: "RLO", 0x2060: "WJ", 0x2066: "LRI", 0x2067: "RLI",
  0x2068: "FSI", 0x2069: "PDI", 0xfeff: "BOM", 0xfffd: "U+FFFD",
};
// Joiners (U+200C, U+200D) stay: Persian, Indic scripts and emoji need them to look right. So does the CR of CR LF.
const HIDDEN = new RegExp("(" + [
  "[\\u0000-\\u0008\\u000b\\u000c\\u000e-\\u001f\\u007f-\\u009f]", "\\r(?!\\n)",
  "[\\u00ad\\u061c\\u180e\\u200b\\u200e\\u200f\\u2028-\\u202e\\u2060-\\u206f\\ufeff\\ufff9-\\ufffd]",
  "[\\ud800-\\udfff]", "[\\ue000-\\uf8ff]", "[\\u{e0000}-\\u{e007f}]",
].join("|") + ")\\1*", "gu");

/** `text` as nodes; a run of one hidden character is one mark. */
export function visible(text) {
  const nodes = document.createDocumentFragment();
  let done = 0;
  for (const match of text.matchAll(HIDDEN)) {
    if (match.index > done) nodes.append(text.slice(done, match.index));
    const code = match[1].codePointAt(0), times = match[0].length / match[1].length;
    const number = `U+${code.toString(16).toUpperCase().padStart(4, "0")}`;
    const name = (NAMES[code] ?? number) + (times > 1 ? `×${times}` : "");
    nodes.append(make("span", { className: "mark", title: number, textContent: name }));
    done = match.index + match[0].length;
  }
  if (done < text.length) nodes.append(text.slice(done));
  return nodes;
}

const BLOCK = 8_000;  // characters of a block, which the browser lays out only when it comes near the window

/** Appends a piece of a text to `area` in blocks. They end at line ends; a line that is longer than a block is cut, and
 *  its cut is marked: one block of a million characters would be laid out anew with every piece. */
export function append(area, piece) {
  let start = 0;
  while (start < piece.length) {
    let stop = Math.min(start + BLOCK, piece.length);
    if (stop < piece.length) {
      const line = piece.lastIndexOf("\n", stop - 1);
      if (line >= start) stop = line + 1;
      else if (/[\ud800-\udbff]/.test(piece[stop - 1])) stop += 1;
    }
    const closed = piece[stop - 1] === "\n";
    const before = area.lastElementChild;
    let block = before?.classList.contains("cut") && Number(before.dataset.size) < BLOCK ? before : null;
    if (!block) {
      block = make("div", { className: "block", dir: "auto" });
      block.dataset.size = 0;
      area.append(block);
    }
    // The last line end of a block is the block's own.
    block.append(visible(piece.slice(start, closed ? stop - 1 : stop)));
    if (closed && !block.firstChild) block.append("\n");
    block.dataset.size = Number(block.dataset.size) + stop - start;
    block.classList.toggle("cut", !closed);
    start = stop;
  }
}
