// The jobs view: the queue, what runs, what has ended, and the workers, with live numbers.

import { call, get } from "./api.js";
import { $, duration, h, plural, toast } from "./dom.js";

const EVERY_MS = 1500;
const PER_PAGE = 25;
const SAMPLES = 40;
const SMOOTH = 4; // looks to average over: workers tell of their progress now and then

let timer = null;
let shown = false;
let cursors = [];
let before = null; // {at, steps: Map of job -> steps done}
const speeds = [];

/** Start or stop looking, as the view is shown or not. */
export function showJobs(show) {
  shown = show;
  clearTimeout(timer);
  if (show) look();
}

export function setUpJobs() {
  $("status").addEventListener("change", () => turn([]));
  $("jobs-newest").addEventListener("click", () => turn([]));
  $("jobs-older").addEventListener("click", () => turn([...cursors, $("jobs-older").dataset.cursor]));
  document.addEventListener("visibilitychange", () => shown && showJobs(true));
}

function turn(to) {
  cursors = to;
  before = null; // other jobs come into sight, with steps of long ago
  showJobs(true);
}

async function look() {
  clearTimeout(timer);
  if (!shown || document.hidden) return;
  const asked = cursors; // a new one after each turn: what was asked before it is not shown
  const query = new URLSearchParams({ limit: PER_PAGE });
  if ($("status").value) query.set("status", $("status").value);
  if (cursors.length) query.set("cursor", cursors.at(-1));
  let again = true;
  let wait = 0;
  try {
    const [fleet, list] = await Promise.all([get("workers"), get(`jobs?${query}`)]);
    if (asked !== cursors) return;
    $("jobs-error").hidden = true;
    measure(list.jobs);
    showTiles(fleet, list.jobs);
    showWorkers(fleet.workers);
    showList(list);
  } catch (error) {
    if (asked !== cursors) return;
    $("jobs-error").textContent = error.message;
    $("jobs-error").hidden = false;
    again = error.status !== 401;
    wait = 1000 * (error.retryAfter ?? 0);
  }
  clearTimeout(timer);
  if (again) timer = setTimeout(look, Math.max(wait, EVERY_MS));
}

/** Steps per second since the last look, from the progress of the jobs in sight. */
function measure(jobs) {
  const now = performance.now() / 1000;
  const steps = new Map(jobs.filter((job) => job.kind === "sample").map((job) => [job.id, job.progress.steps_done]));
  if (before) {
    let made = 0;
    for (const [id, done] of steps) made += before.steps.has(id) ? Math.max(0, done - before.steps.get(id)) : done;
    const known = [...steps.keys()].some((id) => before.steps.has(id)) || before.steps.size === 0;
    if (known) speeds.push(made / (now - before.at));
    if (speeds.length > SAMPLES) speeds.shift();
  }
  before = { at: now, steps };
}

function showTiles({ workers, queues }, jobs) {
  const lanes = workers.flatMap((worker) => worker.lanes);
  const sum = (values) => values.reduce((a, b) => a + b, 0);
  const queued = sum(queues.map((queue) => queue.parts));
  const oldest = Math.max(0, ...queues.map((queue) => queue.oldest_age_s));
  const running = sum(lanes.map((lane) => lane.running));
  const width = sum(lanes.map((lane) => lane.width));
  const held = sum(lanes.map((lane) => lane.waiting));
  const latest = speeds.slice(-SMOOTH);
  const speed = sum(latest) / Math.max(1, latest.length);
  const able = sum(workers.map((worker) => worker.steps_per_second));
  const ended = jobs.filter((job) => job.status === "finished").length;
  const tiles = [
    ["queued", "In the queue", queued, queued ? `oldest waits ${duration(oldest)}` : "nothing waits"],
    ["running", "Pictures being made", running, `room for ${width}${held ? `, ${held} wait at a worker` : ""}`],
    ["alive", "Workers alive", workers.length, [...new Set(workers.map((w) => w.device))].join(", ") || "none"],
    ["speed", "Steps per second", speed.toFixed(speed && speed < 10 ? 1 : 0), able ? `${able.toFixed(0)} while busy` : "not measured yet"],
    ["finished", "Finished", ended, `of the ${plural(jobs.length, "job")} below`],
  ];
  $("tiles").replaceChildren(
    ...tiles.map(([id, name, value, more]) =>
      h(
        "div",
        { class: "tile-number", id: `n-${id}` },
        h("dt", {}, name),
        h("dd", { class: "number" }, String(value)),
        h("dd", { class: "hint" }, more),
        id === "speed" ? sparkline(speeds) : null,
      ),
    ),
  );
}

function sparkline(values) {
  const svg = document.createElementNS("http://www.w3.org/2000/svg", "svg");
  svg.setAttribute("viewBox", `0 0 ${SAMPLES - 1} 10`);
  svg.setAttribute("preserveAspectRatio", "none");
  svg.setAttribute("aria-hidden", "true");
  const top = Math.max(...values, 1e-9);
  const points = values.map((value, i) => `${SAMPLES - values.length + i},${(9.5 - (value / top) * 9).toFixed(2)}`);
  const line = document.createElementNS(svg.namespaceURI, "polyline");
  line.setAttribute("points", points.join(" "));
  svg.append(line);
  const box = h("dd", { class: "spark" });
  box.append(svg);
  return box;
}

const row = (...cells) => h("tr", {}, ...cells.map((cell) => (cell instanceof HTMLElement ? cell : h("td", {}, cell))));
const headings = (...names) => h("thead", {}, h("tr", {}, ...names.map((name) => h("th", { scope: "col" }, name))));
const empty = (columns, text) => h("tbody", {}, h("tr", {}, h("td", { colSpan: columns, class: "hint" }, text)));

function showWorkers(workers) {
  const rows = workers.map((worker) =>
    row(
      h("th", { scope: "row", title: worker.name }, `${worker.hostname} · ${worker.name.slice(0, 8)}`),
      `${worker.device}, ${worker.dtype}`,
      worker.models.join(", "),
      worker.lanes.map((l) => `${l.model}@${l.version}: ${l.running} of ${l.width}`).join("; ") || "nothing loaded",
      worker.steps_per_second ? `${worker.steps_per_second.toFixed(0)} steps/s` : "–",
      duration((Date.now() - Date.parse(worker.started_at)) / 1000),
    ),
  );
  const body = rows.length ? h("tbody", {}, ...rows) : empty(6, "No worker is alive: jobs wait until one starts (guided worker).");
  $("workers").replaceChildren(headings("Worker", "Device", "Takes", "Now", "Speed", "Up for"), body);
}

function showList({ jobs, next_cursor: next }) {
  const focused = document.activeElement?.dataset?.cancel;
  const rows = jobs.map((job) => {
    const over = ["finished", "failed", "cancelled"].includes(job.status);
    const state = h("td", {}, h("span", { class: `state ${job.status}` }, job.status));
    if (job.error) state.append(h("span", { class: "hint" }, ` ${job.error.message}`));
    const what = job.kind === "train" ? `training a ${job.what}` : `${job.model}, ${plural(job.num_images, "picture")}`;
    const stop = { type: "button", class: "quiet", "data-cancel": job.id, "aria-label": `Cancel job ${job.id.slice(0, 8)}` };
    const bar = h("progress", { max: 1, value: job.progress.fraction, "aria-label": `Progress of job ${job.id.slice(0, 8)}` });
    return row(
      h("th", { scope: "row", title: job.id }, job.id.slice(0, job.kind === "train" ? 14 : 8)),
      state,
      what,
      h("td", {}, bar, ` ${Math.floor(job.progress.fraction * 100)}%`),
      new Date(job.created_at).toLocaleTimeString(),
      took(job),
      h("td", {}, over ? "" : h("button", { ...stop, on: { click: () => cancel(job) } }, "Cancel")),
    );
  });
  const body = rows.length ? h("tbody", {}, ...rows) : empty(7, "No jobs here.");
  $("joblist").replaceChildren(headings("Job", "Status", "What", "Progress", "Asked", "Took", h("span", { class: "sr" }, "Cancel")), body);
  if (focused) $("joblist").querySelector(`[data-cancel="${focused}"]`)?.focus();
  $("jobs-older").hidden = !next;
  $("jobs-older").dataset.cursor = next ?? "";
  $("jobs-newest").hidden = cursors.length === 0;
}

function took(job) {
  const until = job.ended_at ? Date.parse(job.ended_at) : Date.now();
  return job.started_at ? duration((until - Date.parse(job.started_at)) / 1000) : "–";
}

async function cancel(job) {
  try {
    await call(job.links.cancel, { method: "DELETE" });
  } catch (error) {
    toast(error.message);
  }
  look();
}
