// What both pages use: requests to the server, elements, numbers.

let token = null;

export const query = new URLSearchParams(location.search);
const key = query.get("token");

/** An address of this server that carries the URL's token, where there is one. */
export const address = path => key ? `${path}${path.includes("?") ? "&" : "?"}token=${encodeURIComponent(key)}` : path;

export class Failure extends Error {}

async function call(path, options) {
  let response;
  try {
    response = await fetch(path, { ...options, headers: { ...options?.headers, "X-Audit-Token": token ?? "" } });
  } catch {
    throw new Failure("The server does not answer. Start it again, then try again; every answer up to here is saved.");
  }
  const body = await response.json().catch(() => ({ error: `the server answered ${response.status}` }));
  if (!response.ok) throw Object.assign(new Failure(body.error), { status: response.status });
  return body;
}

/** Starts, or starts again, a session with the server. */
export async function session() {
  const found = await call(address("/api/session"));
  token = found.token;
  return found;
}

/** A request in the session; one that outlived the server, which may have been restarted, is renewed once. */
export async function request(path, body) {
  const options = body === undefined ? undefined
    : { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body) };
  try {
    return await call(path, options);
  } catch (failure) {
    if (failure.status !== 401) throw failure;
  }
  await session();
  return call(path, options);
}

export const find = id => document.getElementById(id);

/** An element with properties and children; strings become text, never markup. */
export function make(name, properties = {}, ...children) {
  const element = Object.assign(document.createElement(name), properties);
  element.append(...children.filter(child => child !== null));
  return element;
}

/** The same in SVG, with attributes. */
export function draw(name, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", name);
  for (const [key, value] of Object.entries(attributes)) element.setAttribute(key, value);
  element.append(...children);
  return element;
}

export const whole = number => number.toLocaleString("en");
export const percent = share => `${(100 * share).toFixed(share === 1 || share === 0 ? 0 : 1)} %`;
export const nats = score => score === null ? "—" : score.toFixed(3);

export function showLines(id, lines) {
  find(id).replaceChildren(...lines.map(line => make("div", { textContent: line })));
  find(id).hidden = !lines.length;
}
