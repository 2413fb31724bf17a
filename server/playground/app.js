// The page: wires the form, the gallery, the viewer and the jobs view together.

import { ApiError } from "./api.js";
import { $, announce, h, plural, toast } from "./dom.js";
import { Form } from "./form.js";
import { Gallery } from "./gallery.js";
import { setUpJobs, showJobs } from "./jobs.js";
import { setUpKeys } from "./keys.js";
import { className, loadExamples, loadModels, modelOf, paintExample, referenceTo } from "./models.js";
import { cancel, follow, newSet, submit } from "./runner.js";
import { dropSet, isOver, keepSet, onNoRoom, openSets, readSets } from "./sets.js";
import { openViewer } from "./viewer.js";

const SCALES = [0, 1, 2, 4, 8, 12];
const STEPS = [2, 5, 10, 25, 50, 100, 250];

const form = new Form();
const gallery = new Gallery({ cancel: stop, remove, open });

let sending = false;

/** Send bodies, each with its place on an axis, and follow them as one set. */
async function make(bodies, about) {
  sending = true;
  const sent = [];
  try {
    for (const [body, value] of bodies) sent.push([body, await submit(body), value]);
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    form.fail(error);
    announce("The request was refused.");
    if (!sent.length) return;
  } finally {
    sending = false;
  }
  const set = newSet(sent, about);
  await keepSet(set);
  const view = gallery.add(set);
  announce(`${set.title}: asked for`);
  if (matchMedia("(max-width: 60rem)").matches) view.element.scrollIntoView({ block: "start" });
  await follow(set, view);
}

const titleOf = (body) =>
  body.class_label === undefined
    ? (modelOf(body.model)?.class_conditional ? "random classes" : "no class")
    : String(typeof body.class_label === "number" ? className(modelOf(body.model), body.class_label) : body.class_label);

function subtitleOf(body, parts = {}) {
  const scale = "scale" in parts ? parts.scale : body.guidance_scale === undefined ? null : `scale ${body.guidance_scale}`;
  const steps = "steps" in parts ? parts.steps : body.steps ? plural(body.steps, "step") : body.respacing;
  return [body.model, scale, steps, body.sampler, `seed ${body.seed}`].filter(Boolean).join(" · ");
}

async function generate() {
  if (sending) return; // pressed again before the server has answered
  const body = form.read();
  if (!body) {
    form.fail({ errors: [], message: "Please correct the fields marked below." });
    return;
  }
  await make([[body]], { title: titleOf(body), subtitle: subtitleOf(body) });
}

/** What was asked for a picture, for that picture alone. */
function alone(job, picture) {
  const [name, version] = picture.recipe.model.split("@");
  const body = { ...job.asked, model: referenceTo(name, version), num_images: 1, seed: picture.seed };
  if (Number.isInteger(picture.label)) body.class_label = picture.label;
  return body;
}

function again(job, picture) {
  form.load(alone(job, picture), true);
  toast(`The recipe is in the form, and seed ${picture.seed} is locked.`);
  $("form").scrollIntoView({ block: "start" });
  $("generate").focus();
}

function scales(job, picture) {
  const body = alone(job, picture);
  const about = { axis: "scale", title: `${titleOf(body)}: the scale varied` };
  about.subtitle = subtitleOf(body, { scale: null });
  return make(SCALES.map((scale) => [{ ...body, guidance_scale: scale }, scale]), about);
}

function steps(job, picture) {
  const { respacing, ...body } = alone(job, picture);
  const most = modelOf(body.model)?.limits.max_steps ?? Infinity;
  const counts = STEPS.filter((count) => count <= most);
  const bodies = counts.map((count) => [{ ...body, steps: count, preview_every: Math.max(1, Math.round(count / 25)) }, count]);
  const about = { axis: "steps", title: `${titleOf(body)}: from few steps to many` };
  about.subtitle = subtitleOf(body, { steps: null });
  return make(bodies, about);
}

function open(view, job, picture) {
  const act = { again, scales, steps, modelOf: (shown) => modelOf(shown.recipe.model) };
  openViewer(view.set, job, picture, act);
}

async function stop(view) {
  view.stop.disabled = true;
  try {
    await cancel(view.set);
  } catch (error) {
    toast(error.message);
    view.stop.disabled = false;
  }
}

async function remove(view) {
  await dropSet(view.set);
  gallery.drop(view.set);
  announce(`${view.set.title}: removed`);
  ($("sets").firstElementChild ?? $("generate")).focus();
}

async function clear() {
  if (!confirm("Remove all pictures from this browser?")) return;
  for (const { set } of gallery.views.filter((entry) => isOver(entry.set))) {
    await dropSet(set);
    gallery.drop(set);
  }
}

/** Pictures to begin with: one button per class. */
async function showStarters() {
  const { model } = form;
  if (!model?.num_classes) return;
  await loadExamples(model);
  const labels = Array.from({ length: Math.min(model.num_classes, 12) }, (_, label) => label);
  $("starters").replaceChildren(
    ...labels.map((label) => {
      const thumb = h("span", { class: "thumb", "aria-hidden": "true" });
      paintExample(thumb, model, label);
      const choose = () => {
        form.classes.set(label);
        generate();
      };
      return h("button", { type: "button", on: { click: choose } }, thumb, className(model, label));
    }),
  );
}

function route() {
  const jobs = location.hash === "#jobs";
  $("jobs").hidden = !jobs;
  $("create").hidden = jobs;
  for (const link of document.querySelectorAll("nav a")) {
    if (link.hash === (jobs ? "#jobs" : "#create")) link.setAttribute("aria-current", "page");
    else link.removeAttribute("aria-current");
  }
  showJobs(jobs);
}

async function start() {
  setUpKeys();
  setUpJobs();
  $("form").addEventListener("submit", (event) => {
    event.preventDefault();
    generate();
  });
  document.querySelector(".skip").addEventListener("click", (event) => {
    event.preventDefault(); // the hash is the view's
    $("main").focus();
  });
  document.addEventListener("keydown", (event) => {
    const free = !$("create").hidden && !document.querySelector("dialog[open]");
    if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && free) $("form").requestSubmit();
  });
  $("clear").addEventListener("click", clear);
  $("model").addEventListener("change", showStarters);
  onNoRoom(() => toast("This browser has no room for more pictures: remove some, or they are gone with this page."));
  addEventListener("hashchange", route);
  route();
  if (!(await openSets())) toast("This browser keeps no pictures beyond this page.");
  const kept = await readSets();
  gallery.fill(kept);
  try {
    await loadModels();
    form.fill();
    if (!form.model) form.fail(new ApiError(0, "The server has no models yet."));
  } catch (error) {
    form.fail(error);
  }
  await showStarters();
  // What was running when the page was left is followed again.
  for (const set of kept) if (!isOver(set)) follow(set, gallery.viewOf(set));
}

start();
