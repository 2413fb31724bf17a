// What this browser has made, in its IndexedDB: it survives reloads, and the server's forgetting.
//
// A set is what one press of a button asked for: {id, created, axis, title, subtitle, jobs}.
// `axis` is null, or what varies over a strip's jobs: "scale" or "steps". Each of its jobs is
// {id, asked, value, status, total, error, count, pictures}: `asked` the body that was sent, `value` its place on the
// axis, `total` its steps, `pictures` those that are done: {index, seed, label, name, recipe, steps, file}.

const NAME = "guided";
const STORE = "sets";
let database = null;

/** Open it; false if this browser keeps nothing (it then forgets at the end of the page). */
export async function openSets() {
  try {
    database = await new Promise((opened, failed) => {
      const request = indexedDB.open(NAME, 1);
      request.onupgradeneeded = () => request.result.createObjectStore(STORE, { keyPath: "id" });
      request.onsuccess = () => opened(request.result);
      request.onerror = () => failed(request.error);
    });
    return true;
  } catch {
    return false;
  }
}

function run(mode, act) {
  if (!database) return Promise.resolve(null);
  return new Promise((done, failed) => {
    const transaction = database.transaction(STORE, mode);
    const request = act(transaction.objectStore(STORE));
    transaction.oncomplete = () => done(request.result);
    transaction.onerror = () => failed(transaction.error);
    transaction.onabort = () => failed(transaction.error);
  });
}

/** All sets, newest first. */
export async function readSets() {
  const found = (await run("readonly", (store) => store.getAll())) ?? [];
  return found.sort((a, b) => b.created - a.created);
}

let noRoom = () => {};

/** What to do when the browser has no room left. */
export function onNoRoom(tell) {
  noRoom = tell;
}

const dropped = new Set();

/** Keep a set as it is now, unless it has been dropped meanwhile. */
export async function keepSet(set) {
  if (dropped.has(set.id)) return;
  try {
    await run("readwrite", (store) => store.put(set));
  } catch {
    noRoom();
  }
}

/** Forget a set for good. */
export function dropSet({ id }) {
  dropped.add(id);
  return run("readwrite", (store) => store.delete(id));
}

/** An identifier (crypto.randomUUID needs a secure page). */
export const newId = () => [...crypto.getRandomValues(new Uint32Array(4))].map((n) => n.toString(36)).join("");

export const FINAL = ["finished", "failed", "cancelled", "gone"];
export const isOver = (set) => set.jobs.every((job) => FINAL.includes(job.status));
