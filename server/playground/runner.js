// Asking for jobs, following them to their end, cancelling them.

import { ApiError, blob, call, events, get } from "./api.js";
import { recipeOf } from "./recipe.js";
import { FINAL, keepSet, newId } from "./sets.js";

const TRIES = 10; // to follow a job where the server is away or asks for patience
const LOOK_S = 2; // between looks at which pictures of a running job are done
const LOOK_MS = 3000; // between looks at a job that waits, of which no events tell

/** Send one job; its view. An own idempotency key makes a second try harmless. */
export async function submit(body) {
  const headers = { "Idempotency-Key": newId() };
  const send = () => get("generate", { method: "POST", body, headers });
  try {
    return await send();
  } catch (error) {
    if (!(error instanceof ApiError) || error.status !== 0) throw error;
    return send();
  }
}

/** A new set of jobs that have been sent: [body, view, place on the axis]. */
export function newSet(sent, { axis = null, title, subtitle }) {
  const jobs = sent.map(([asked, view, value]) => ({
    id: view.id,
    asked,
    value,
    status: view.status,
    total: view.progress.steps_total,
    error: null,
    count: view.num_images,
    pictures: [],
  }));
  return { id: newId(), created: Date.now(), axis, title, subtitle, jobs };
}

/**
 * Follow a set's jobs until all have ended; it is kept after each change that matters.
 *
 * `show` gets what changes: progress(job, done, total, seconds left), preview(job, index, url),
 * ready(job, picture), ended(job).
 */
export async function follow(set, show) {
  const started = new Map();
  await Promise.all(
    set.jobs
      .filter((job) => !FINAL.includes(job.status))
      .map(async (job) => {
        const looking = setInterval(() => look(job, show), LOOK_MS);
        let tries = TRIES;
        while (tries > 0 && !(await attend(set, job, started, show))) tries -= 1;
        clearInterval(looking);
        await keepSet(set);
        show.ended(job);
      }),
  );
}

/** Follow a job to its end; whether it is reached. If not, it is as it was, and can be tried again. */
async function attend(set, job, started, show) {
  try {
    for await (const { event, data } of events(`jobs/${job.id}/events`)) {
      if (event === "preview") show.preview(job, data.index, `data:image/png;base64,${data.png}`);
      else if (event === "progress") await progress(set, job, data, started, show);
      else await state(set, job, data, started, show);
    }
    return true;
  } catch (error) {
    if (!(error instanceof ApiError)) throw error;
    if (error.status === 401 || error.status === 403) {
      job.error = error.message; // it stays unfinished: a reload follows it again
      return true;
    }
    const gone = error.status === 404;
    if (gone) job.status = "gone";
    job.error = gone ? "The server no longer keeps this job." : `${error.message} Reload the page to try again.`;
    if (!gone) await new Promise((go) => setTimeout(go, 1000 * (error.retryAfter ?? 2)));
    return gone;
  }
}

/** Show how far a job is of which no event has told since it was queued. */
async function look(job, show) {
  if (job.status !== "queued") return;
  const view = await get(`jobs/${job.id}`).catch(() => null); // the next look may do
  if (!view || job.status !== "queued") return;
  const { steps_done: done, steps_total: total } = view.progress;
  show.progress(job, done, total, view.eta_s, view.queue_position);
}

async function progress(set, job, { steps_done: done, steps_total: total }, started, show) {
  const now = performance.now() / 1000;
  if (!started.has(job.id)) started.set(job.id, { at: now, done, looked: now });
  const since = started.get(job.id);
  if (job.count > 1 && now - since.looked > LOOK_S) {
    since.looked = now; // some of its pictures may be done
    await state(set, job, await get(`jobs/${job.id}`), started, show);
  }
  const rate = (done - since.done) / (now - since.at);
  show.progress(job, done, total, rate > 0 ? (total - done) / rate : null);
}

async function state(set, job, view, started, show) {
  if (!FINAL.includes(view.status)) job.status = view.status;
  job.error = view.error?.message ?? null;
  const { steps_done: done, steps_total: total } = view.progress;
  const now = performance.now() / 1000;
  if (view.status === "running" && !started.has(job.id)) started.set(job.id, { at: now, done, looked: now });
  show.progress(job, done, total, view.eta_s, view.queue_position);
  for (const image of view.images.filter((image) => image.ready)) {
    if (job.pictures.some((picture) => picture.index === image.index)) continue;
    const file = await blob(`jobs/${job.id}/images/${image.index}?format=png`);
    const picture = {
      index: image.index,
      seed: image.seed,
      label: image.class_label,
      name: image.class_name,
      recipe: recipeOf(view, image),
      steps: view.stages[0].steps,
      file,
    };
    job.pictures.push(picture);
    show.ready(job, picture);
  }
  job.status = view.status; // the end only now: a set that is kept before it is followed again
}

/** Stop what of a set has not ended. */
export async function cancel(set) {
  const running = set.jobs.filter((job) => !FINAL.includes(job.status));
  await Promise.all(running.map((job) => call(`jobs/${job.id}`, { method: "DELETE" })));
}

/** All pictures of a job as the server's npz file. */
export const npz = (job) => blob(`jobs/${job.id}/samples.npz`);
