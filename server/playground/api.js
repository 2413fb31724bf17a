// Calls to the server. Everything goes through fetch, so that an API key can be sent along.

/** Where the API is: beside this page, also behind a proxy that serves it below a path. */
export const base = new URL(".", document.baseURI).href;
const MAX_STREAMS = 3; // of the six connections a browser opens to one server
const TRIES = 5;

/** What the server refused: `errors` are {field, message}. */
export class ApiError extends Error {
  constructor(status, detail, errors = [], retryAfter = null) {
    super(detail);
    Object.assign(this, { status, errors, retryAfter });
  }
}

let key = stored("sessionStorage") ?? stored("localStorage");
let askForKey = async () => null;
let declined = false; // nobody wanted to give a key: only what changes something asks again

function stored(place) {
  try {
    return globalThis[place].getItem("guided.key");
  } catch {
    return null;
  }
}

/** How to ask for a key; it resolves to the key, or null. */
export function onKeyNeeded(ask) {
  askForKey = ask;
}

export const hasKey = () => Boolean(key);

/** Use a key from now on, remembered for this tab or for this browser; null forgets it. */
export function setKey(value, keep) {
  key = value;
  try {
    sessionStorage.removeItem("guided.key");
    localStorage.removeItem("guided.key");
    if (value) (keep ? localStorage : sessionStorage).setItem("guided.key", value);
  } catch {
    // It holds for this page only.
  }
}

/** A successful response; an ApiError otherwise. A 401 asks for a key and tries again. */
export async function call(path, { method = "GET", body, headers = {}, signal } = {}) {
  const used = key;
  let response;
  try {
    response = await fetch(base + path.replace(/^\//, ""), {
      method,
      signal,
      headers: {
        ...(body ? { "Content-Type": "application/json" } : {}),
        ...(used ? { Authorization: `Bearer ${used}` } : {}),
        ...headers,
      },
      body: body ? JSON.stringify(body) : undefined,
    });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached.");
  }
  if (response.status === 401) {
    // Another call may have been given a key meanwhile.
    const may = method !== "GET" || !declined;
    if (key !== used || (may && (await ask(Boolean(used))))) return call(path, { method, body, headers, signal });
  }
  if (!response.ok) throw await problem(response);
  return response;
}

async function ask(wrong) {
  const given = await askForKey(wrong);
  declined = !given;
  return given;
}

async function problem(response) {
  const told = await response.json().catch(() => ({}));
  const retry = Number(response.headers.get("Retry-After")) || null;
  return new ApiError(response.status, told.detail ?? `The server answered ${response.status}.`, told.errors, retry);
}

/** What is read of a response; an ApiError if the connection breaks in its middle. */
const whole = (reading) =>
  reading.catch((error) => {
    throw error.name === "AbortError" ? error : new ApiError(0, "The connection broke.");
  });

/** What a successful response says, and the file it is. */
export const get = async (path, options) => whole((await call(path, options)).json());
export const blob = async (path, options) => whole((await call(path, options)).blob());

let streams = 0;
const waiting = [];

async function takeTurn() {
  if (streams >= MAX_STREAMS) await new Promise((go) => waiting.push(go));
  else streams += 1;
}

function endTurn() {
  if (waiting.length) waiting.shift()();
  else streams -= 1;
}

/** Events {event, data} of a job until it has ended; a broken connection is taken up where it was. */
export async function* events(path, signal) {
  let last = null;
  let failures = 0;
  await takeTurn();
  try {
    while (true) {
      try {
        const headers = { Accept: "text/event-stream", ...(last ? { "Last-Event-ID": last } : {}) };
        const response = await call(path, { headers, signal });
        for await (const event of parse(response.body)) {
          failures = 0;
          last = event.id ?? last;
          yield { event: event.event, data: JSON.parse(event.data) };
          if (event.event === "done") return;
        }
        failures += 1;
      } catch (error) {
        const passing = !(error instanceof ApiError) || error.status === 0 || error.status >= 500;
        if (error.name === "AbortError" || !passing) throw error;
        failures += 1;
        if (failures >= TRIES) throw error;
      }
      if (failures >= TRIES) throw new ApiError(0, "The connection broke.");
      await new Promise((go) => setTimeout(go, 500 * failures));
    }
  } finally {
    endTurn();
  }
}

async function* parse(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  try {
    while (true) {
      const { value, done } = await reader.read();
      if (done) return;
      text += value.replaceAll("\r", "");
      let end;
      while ((end = text.indexOf("\n\n")) >= 0) {
        const fields = {};
        for (const line of text.slice(0, end).split("\n")) {
          const [, name, rest] = /^(\w+): ?(.*)$/.exec(line) ?? [];
          if (name === "data" && "data" in fields) fields.data += `\n${rest}`;
          else if (name) fields[name] = rest;
        }
        text = text.slice(end + 2);
        if (fields.data !== undefined) yield fields;
      }
    }
  } finally {
    reader.cancel().catch(() => {});
  }
}
