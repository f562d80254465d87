// Pictures to go with the next message: picked, pasted or dropped; sent as they are, but for kinds that only browsers
// know and for what is larger than a request may be.

import { element } from "./markdown.js";

const AS_THEY_ARE = /^image\/(png|jpeg|webp|gif|bmp)$/;
const MAX_BYTES = 6 << 20;
const MAX_SIDE = 2048;

export class Pictures {
  constructor(place, onProblem) {
    this.place = place;
    this.onProblem = onProblem;
    this.urls = [];
  }

  async add(files) {
    for (const file of files) {
      if (!file.type.startsWith("image/")) {
        this.onProblem(`${file.name} is no picture`);
        continue;
      }
      try {
        this.urls.push(await addressOf(file));
      } catch {
        this.onProblem(`${file.name} cannot be read as a picture`);
      }
    }
    this.draw();
  }

  take() {
    const taken = this.urls;
    this.urls = [];
    this.draw();
    return taken;
  }

  draw() {
    this.place.replaceChildren(...this.urls.map((src, at) => element("figure", {},
      element("img", { src, alt: `Picture ${at + 1}` }),
      element("button", {
        type: "button", "aria-label": `Leave picture ${at + 1} out`, onclick: () => { this.urls.splice(at, 1); this.draw(); },
      }, "×"))));
  }
}

async function addressOf(file) {
  if (AS_THEY_ARE.test(file.type) && file.size <= MAX_BYTES) return read(file);
  const bitmap = await createImageBitmap(file);
  const scale = Math.min(1, MAX_SIDE / Math.max(bitmap.width, bitmap.height));
  const canvas = element("canvas", { width: Math.round(bitmap.width * scale), height: Math.round(bitmap.height * scale) });
  canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
  return canvas.toDataURL(file.type === "image/jpeg" ? "image/jpeg" : "image/png", 0.92);
}

function read(file) {
  return new Promise((resolve, reject) => {
    const reader = new FileReader();
    reader.onload = () => resolve(reader.result);
    reader.onerror = () => reject(reader.error);
    reader.readAsDataURL(file);
  });
}
