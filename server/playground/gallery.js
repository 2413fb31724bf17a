// The gallery: one article per set, its pictures live while they are made.

import { $, announce, duration, h, plural } from "./dom.js";
import { FINAL, isOver } from "./sets.js";

const PAGE = 20; // sets shown at once
const urls = new WeakMap();

/** A picture's file as something an <img> can show. */
export function urlOf(picture) {
  if (!urls.has(picture)) urls.set(picture, URL.createObjectURL(picture.file));
  return urls.get(picture);
}

/** A small picture of noise: where sampling begins. */
function noise(size = 32) {
  const canvas = h("canvas", { width: size, height: size });
  const context = canvas.getContext("2d");
  const pixels = context.createImageData(size, size);
  for (let i = 0; i < pixels.data.length; i += 1) {
    const normal = Math.random() + Math.random() + Math.random() + Math.random() - 2;
    pixels.data[i] = i % 4 === 3 ? 255 : 128 + normal * 90;
  }
  context.putImageData(pixels, 0, 0);
  return canvas.toDataURL();
}

/** What a job's place on its strip's axis is called. */
export function placeOf(set, job) {
  if (set.axis === "scale") return `scale ${job.value}`;
  return set.axis === "steps" ? plural(job.value, "step") : "";
}

const describe = (set, job, picture) =>
  [picture.name ?? "picture", placeOf(set, job), `seed ${picture.seed}`].filter(Boolean).join(", ");

/** One set on the page; `act` are the gallery's actions. */
export class SetView {
  constructor(set, act) {
    Object.assign(this, { set, act, tiles: new Map(), steps: new Map(), left: new Map(), ahead: new Map(), ends: new Set() });
    for (const { id, status, total = 0 } of set.jobs) this.steps.set(id, [status === "finished" ? total : 0, total]);
    this.bar = h("progress", { max: 1, value: 0, "aria-label": `Progress of ${set.title}` });
    this.told = h("span", { class: "told" });
    this.stop = h("button", { type: "button", on: { click: () => act.cancel(this) } }, "Cancel");
    this.live = h("div", { class: "live" }, this.bar, this.told, this.stop);
    this.errors = h("div", {});
    this.grid = h("div", { class: set.axis ? "grid strip" : "grid" });
    this.remove = h(
      "button",
      { type: "button", class: "quiet", "aria-label": `Remove ${set.title}`, on: { click: () => act.remove(this) } },
      "Remove",
    );
    const head = h("header", {}, h("h2", { id: `t${set.id}` }, set.title), h("p", { class: "hint" }, set.subtitle), this.remove);
    this.element = h(
      "article",
      { class: "set", id: `s${set.id}`, tabIndex: -1, "aria-labelledby": `t${set.id}` },
      head,
      this.live,
      this.errors,
      this.grid,
    );
    for (const job of set.jobs) this.addTiles(job);
    this.update();
  }

  addTiles(job) {
    const own = [];
    for (let index = 0; index < job.count; index += 1) {
      const image = h("img", { src: noise(), alt: `${this.set.title}, not there yet`, class: "noise" });
      const tile = h("button", { type: "button", class: "tile", disabled: true }, image);
      const figure = h("figure", {}, tile);
      if (this.set.axis) figure.append(h("figcaption", {}, placeOf(this.set, job)));
      this.grid.append(figure);
      own.push({ figure, tile, image });
    }
    this.tiles.set(job.id, own);
    for (const picture of job.pictures) this.ready(job, picture);
  }

  progress(job, done, total, left, ahead) {
    this.steps.set(job.id, [done, total]);
    if (left !== null && left !== undefined) this.left.set(job.id, left);
    this.ahead.set(job.id, ahead ?? 0);
    this.update();
  }

  preview(job, index, url) {
    const { image, tile } = this.tiles.get(job.id)[index];
    if (!tile.disabled) return;
    image.src = url;
    image.className = "preview";
  }

  ready(job, picture) {
    const { image, tile } = this.tiles.get(job.id)[picture.index];
    image.src = urlOf(picture);
    image.className = "";
    image.alt = describe(this.set, job, picture);
    tile.disabled = false;
    tile.onclick = () => this.act.open(this, job, picture);
  }

  /** A job is not followed any more: it has ended, or its end could not be reached. */
  ended(job) {
    this.ends.add(job.id);
    for (const { figure, tile } of this.tiles.get(job.id)) figure.hidden = tile.disabled && !this.set.axis;
    this.update();
    if (isOver(this.set)) announce(this.outcome());
  }

  outcome() {
    const made = this.set.jobs.reduce((sum, job) => sum + job.pictures.length, 0);
    const states = new Set(this.set.jobs.map((job) => job.status));
    if (states.has("failed")) return `${this.set.title}: failed`;
    if (states.has("cancelled")) return `${this.set.title}: cancelled`;
    return `${this.set.title}: ${plural(made, "picture")} done`;
  }

  update() {
    const over = isOver(this.set);
    this.live.hidden = over;
    this.remove.hidden = !over;
    this.element.classList.toggle("running", !over);
    const followed = !over && this.set.jobs.some((job) => !FINAL.includes(job.status) && !this.ends.has(job.id));
    this.element.setAttribute("aria-busy", String(followed));
    this.bar.hidden = this.told.hidden = !followed;
    if (!over) this.showProgress();
    const told = [];
    for (const job of this.set.jobs) {
      const place = placeOf(this.set, job);
      if (job.status === "cancelled") told.push(["hint", "Cancelled."]);
      else if (job.error) told.push(["alert", place ? `${place}: ${job.error}` : job.error]);
    }
    const unique = new Map(told.map((item) => [item[1], item]));
    this.errors.replaceChildren(...[...unique.values()].map(([kind, text]) => h("p", { class: kind }, text)));
  }

  showProgress() {
    let done = 0;
    let total = 0;
    for (const [d, t] of this.steps.values()) [done, total] = [done + d, total + t];
    if (total) this.bar.value = done / total;
    const live = this.set.jobs.filter((job) => !FINAL.includes(job.status));
    const left = Math.max(0, ...live.map((job) => this.left.get(job.id) ?? 0));
    const ahead = Math.max(0, ...live.map((job) => this.ahead.get(job.id) ?? 0));
    const queued = live.every((job) => job.status === "queued");
    const what = queued ? (ahead ? `waiting, ${ahead} before it` : "waiting") : `${done} of ${total} steps`;
    this.told.textContent = left ? `${what} · about ${duration(left)} left` : what;
  }
}

/** All sets on the page, newest first. */
export class Gallery {
  constructor(act) {
    Object.assign(this, { act, views: [], limit: PAGE });
    $("older").addEventListener("click", () => {
      this.limit += PAGE;
      this.show();
    });
  }

  /** Show sets as they were kept. */
  fill(sets) {
    this.views = sets.map((set) => ({ set, view: null }));
    this.show();
  }

  add(set) {
    const entry = { set, view: new SetView(set, this.act) };
    this.views.unshift(entry);
    this.show();
    return entry.view;
  }

  drop(set) {
    this.views = this.views.filter((entry) => entry.set !== set);
    this.show();
  }

  /** The view of a set, made if it was not shown yet. */
  viewOf(set) {
    const entry = this.views.find((entry) => entry.set === set);
    entry.view ??= new SetView(set, this.act);
    return entry.view;
  }

  show() {
    const visible = this.views.slice(0, this.limit).map((entry) => this.viewOf(entry.set).element);
    const present = new Set(visible);
    for (const child of [...$("sets").children]) if (!present.has(child)) child.remove();
    visible.forEach((element, place) => {
      if ($("sets").children[place] !== element) $("sets").insertBefore(element, $("sets").children[place] ?? null);
    });
    $("intro").hidden = this.views.length > 0;
    $("older").hidden = this.views.length <= this.limit;
    $("clear").hidden = this.views.length === 0;
  }
}
