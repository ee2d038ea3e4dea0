// Questions to the server. The browser keeps answers by their ETag: what has not changed is not sent again.

/** What the server says is wrong, in words for a person. */
export class Refusal extends Error {}

/** @typedef {Record<string, any>} Header */
/** @typedef {Float64Array | Float32Array | Int32Array | Int16Array | Uint8Array} Numbers */
/** @typedef {{header: Header, arrays: Record<string, Numbers>}} Answer */

/** @type {Record<string, any>} */
const TYPES = { float64: Float64Array, float32: Float32Array, int32: Int32Array, int16: Int16Array, uint8: Uint8Array };

/**
 * @param {string} route
 * @param {Record<string, string | number | null | undefined>} query
 * @returns {Promise<Response>}
 */
async function get(route, query) {
  const parts = new URLSearchParams();
  for (const [name, value] of Object.entries(query)) {
    if (value !== null && value !== undefined && value !== "") parts.set(name, String(value));
  }
  let response;
  try {
    response = await fetch(`./${route}?${parts}`, { cache: "no-cache" });
  } catch {
    throw new Refusal("The server does not answer: is TensorBoard still running?");
  }
  if (response.headers.get("Content-Type")?.startsWith("application/json")) {
    const content = await response.json();
    if (content.error) throw new Refusal(content.error);
    return content;
  }
  if (!response.ok) throw new Refusal(`The server answered ${response.status}.`);
  return response;
}

/**
 * An answer in JSON.
 * @param {string} route
 * @param {Record<string, string | number | null | undefined>} [query]
 * @returns {Promise<any>}
 */
export async function ask(route, query = {}) {
  return await get(route, query);
}

/**
 * An answer of a header and arrays.
 * @param {string} route
 * @param {Record<string, string | number | null | undefined>} query
 * @returns {Promise<Answer>}
 */
export async function numbers(route, query) {
  const response = await get(route, query);
  const data = await response.arrayBuffer();
  const length = new DataView(data).getUint32(0, true);
  const header = JSON.parse(new TextDecoder().decode(new Uint8Array(data, 4, length)));
  /** @type {Record<string, Numbers>} */
  const arrays = {};
  for (const [name, each] of Object.entries(/** @type {Record<string, any>} */ (header.arrays))) {
    const size = each.shape.reduce((/** @type {number} */ a, /** @type {number} */ b) => a * b, 1);
    arrays[name] = new TYPES[each.dtype](data, 4 + length + each.offset, size);
  }
  return { header, arrays };
}
